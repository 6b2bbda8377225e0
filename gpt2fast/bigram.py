"""Bigram models that are trained and not counted: baselines for the same trainer.

    one-hot:    logits = W2 tanh(W1 onehot(x) + b)
    embedding:  logits = W2 tanh(W1 E[x] + b)

x is the current token; what came before it has no effect. No such model can be better on its
training text than the table of counts (`gpt2fast.training.baseline`). The embedding's form is that of
Bengio et al. 2003 (https://www.jmlr.org/papers/v3/bengio03a.html) with a context of one token.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from gpt2fast.model import GPT, GPTConfig, KVCache

__all__ = ["BIGRAMS", "EmbeddingBigram", "OneHotBigram"]


class _OneHotBody(nn.Module):
    """tanh(W1 onehot(x) + b); `wte` is W2, which `GPT.head` and the loss apply."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.input = nn.Embedding(config.padded_vocab_size, config.n_embd)  # a column of W1 a row
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.h = nn.ModuleList()
        self.gradient_checkpointing = False

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """idx (B, T) -> (B, T, C). Of a cache only the length is kept; the rest is a GPT's."""
        if cache is not None:
            cache.length += idx.shape[1]
        return torch.tanh(self.activation(idx))

    def activation(self, idx: Tensor) -> Tensor:
        """(B, T, C) before the tanh."""
        return self.input(idx) + self.bias


class _EmbeddingBody(_OneHotBody):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def activation(self, idx: Tensor) -> Tensor:
        return self.linear(self.input(idx)) + self.bias


class OneHotBigram(GPT):
    """A multilayer perceptron on the one-hot current token, with a GPT's methods.

    Takes tokens (B, T), int64, as :class:`gpt2fast.GPT` does; formula and source are the module's.

    >>> config = gpt2fast.GPTConfig(1, 1, 8, vocab_size=10, block_size=16)
    >>> logits, loss = OneHotBigram(config)(torch.tensor([[3, 1]]), torch.tensor([[1, 4]]))
    """

    model_type = "bigram-onehot"
    body: type[nn.Module] = _OneHotBody

    def flops_per_token(self, length: int) -> float:
        """6 per weight that is multiplied: the looked-up input is not."""
        transformer = self.transformer
        assert isinstance(transformer, _OneHotBody)
        return 6.0 * (self.num_parameters() - transformer.input.weight.numel())


class EmbeddingBigram(OneHotBigram):
    """A multilayer perceptron on the embedding of the current token, with a GPT's methods.

    Takes tokens (B, T), int64, as :class:`gpt2fast.GPT` does; formula and source are the module's.

    >>> config = gpt2fast.GPTConfig(1, 1, 8, vocab_size=10, block_size=16)
    >>> EmbeddingBigram(config)(torch.tensor([[3, 1]])).shape
    torch.Size([1, 2, 10])
    """

    model_type = "bigram-embedding"
    body = _EmbeddingBody


BIGRAMS: Final[dict[str, type[GPT]]] = {
    kind.model_type: kind for kind in (OneHotBigram, EmbeddingBigram)
}
