"""A language model in plain PyTorch: its own names, three projections, the loss outside the model.

`gpt2fast.optimize(model)` finds the parts by what they compute; head and loss are fused although
the script takes the loss itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpt2fast
from gpt2fast.examples._common import Result, Step, arguments, run


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """x + inner(norm(x))."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class LanguageModel(nn.Module):
    def __init__(self, vocab_size: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.body = nn.Sequential()
        for _ in range(layers):
            self.body.append(Residual(width, Attention(width, heads)))
            feed_forward = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.GELU(approximate="tanh"),
                nn.Linear(4 * width, width),
            )
            self.body.append(Residual(width, feed_forward))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.body(x)))


def training_step(model: nn.Module) -> Step:
    """The loss of the logits that the model returned, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        logits = model(x)
        loss = criterion(logits.reshape(-1, logits.shape[-1]), y.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main(argv: list[str] | None = None) -> Result:
    """Trains the model as it is and swapped; see ``--help``."""
    options = arguments(__doc__, argv)

    def make(vocab_size: int) -> nn.Module:
        return LanguageModel(
            vocab_size, options.block_size, options.layers, options.heads, options.width
        )

    return run(options, make, training_step, gpt2fast.optimize)


if __name__ == "__main__":
    main()
