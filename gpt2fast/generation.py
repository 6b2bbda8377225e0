"""Sampling from a GPT, with a key/value cache or without: the same text either way.

The model sees a window of the sequence. While the sequence fits block_size the window is all of it
(of a longer prompt, the last block_size tokens). When a full window has to take one more token, it
is cut to the last half and grows again: so a cache is filled anew once in block_size/2 tokens,
where a window sliding by single tokens would need it at every token, positions being absolute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2fast.backends import choose

if TYPE_CHECKING:
    from gpt2fast.data.tokenizers import Tokenizer
    from gpt2fast.decoding import Decoder, Weights
    from gpt2fast.model import GPT

__all__ = ["filter_logits", "generate", "prompt_tokens", "stream", "window_start"]


def window_start(length: int, prompt: int, block_size: int) -> int:
    """The first position that the model sees of `length` tokens, of which `prompt` were given.

    >>> [window_start(n, 3, 8) for n in range(3, 15)]
    [0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 10]
    """
    cut = max(0, prompt - block_size)
    used = length - cut
    if used <= block_size:
        return cut
    half = max(1, block_size // 2)
    return length - half - (used - block_size - 1) % (block_size - half + 1)


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with -inf for all but the candidates, of the dtype that comes in.

    `top_k` keeps the k largest. `top_p` then keeps the fewest of the largest whose probabilities
    sum to at least p, at least one (nucleus sampling, Holtzman et al. 2020).

    >>> filter_logits(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2)
    tensor([[-inf, 2., 1.]])
    """
    count = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    if count == logits.shape[-1] and top_p is None:
        return logits
    values, tokens = logits.topk(count, dim=-1)  # sorted, largest first
    if top_p is not None:
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        drop = before >= top_p
        drop[..., 0] = False
        values = values.masked_fill(drop, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(-1, tokens, values)


def stream(
    model: GPT | Decoder,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | int | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    weights: Weights | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, int64 (B,), up to `max_new_tokens` times.

    The model is in evaluation mode while this runs.

    Args:
        model: the model.
        idx: the prompt (B, T), int64, T >= 1; of more than block_size tokens the last are seen.
        max_new_tokens: at most this many.
        temperature: divides the logits; 0 takes the largest (greedy).
        top_k, top_p: see `filter_logits`.
        generator: of idx's device, or a seed for one; None draws from PyTorch's global one.
        stop_token: a row that drew it repeats it; the end comes when all rows have.
        use_cache: False computes every window whole: slow, and the definition.
        weights: "float32", "bfloat16" or "int8" decode on the CPU with a copy of the weights in this
            form, made at every call: for several calls make a :class:`gpt2fast.decoding.Decoder`
            once. None: as the model is, on a CPU by the same kernels where they suit.

    Raises:
        TypeError, ValueError: at the call, naming the argument.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16))
    >>> for token in stream(model, torch.tensor([[3, 1, 4]]), 2, temperature=0):
    ...     print(token.shape, token.dtype)
    torch.Size([1]) torch.int64
    torch.Size([1]) torch.int64
    """
    _check(model, idx, max_new_tokens, temperature, top_k, top_p, stop_token)
    if not use_cache and (weights is not None or not hasattr(model, "hidden")):
        raise ValueError("use_cache=False computes with the model's own weights only")
    if isinstance(generator, int):
        generator = torch.Generator(idx.device).manual_seed(generator)
    steps = _stream(
        _decoder(model, weights) if use_cache else model,
        idx,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        generator,
        stop_token,
        use_cache,
    )
    return iter(steps)


def generate(
    model: GPT | Decoder,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | int | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    weights: Weights | None = None,
) -> Tensor:
    """The prompt idx (B, T) and up to `max_new_tokens` tokens more, int64; see `stream`.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16))
    >>> gpt2fast.generate(model, torch.tensor([[3, 1, 4]]), 5, top_k=3, generator=1).shape
    torch.Size([1, 8])
    """
    new = stream(
        model,
        idx,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        stop_token=stop_token,
        use_cache=use_cache,
        weights=weights,
    )
    return torch.cat([idx, *(tokens[:, None] for tokens in new)], dim=1)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The ids of a prompt, int64 (1, T); of an empty one end-of-text, or the vocabulary's newline.

    Raises:
        ValueError: the vocabulary lacks a character.

    >>> from gpt2fast.data import ByteTokenizer
    >>> prompt_tokens(ByteTokenizer(), "Hi")
    tensor([[ 72, 105]])
    """
    if prompt:
        ids = tokenizer.encode(prompt).tolist()
    elif tokenizer.eot_token is not None:
        ids = [tokenizer.eot_token]
    else:
        newline = [i for i, piece in enumerate(tokenizer.token_bytes) if piece == b"\n"]
        ids = newline[:1] or [0]
    return torch.tensor([ids], dtype=torch.int64)


def _decoder(model: GPT | Decoder, weights: Weights | None) -> GPT | Decoder:
    """What continues the cache: kernels for few rows, or the model itself where they do not suit."""
    from gpt2fast.decoding import Decoder, suits

    if isinstance(model, Decoder):
        if weights not in (None, model.weights):
            raise ValueError(f"weights={weights!r}, but the decoder has {model.weights}")
        return model
    if weights is not None:
        return Decoder(model, weights)
    parameters = list(model.parameters())
    fp32 = all(parameter.dtype == torch.float32 for parameter in parameters)
    if fp32 and choose(parameters[0]) == "cpu" and suits(model):
        return Decoder(model, "float32")
    return model


@torch.no_grad()
def _stream(
    model: GPT | Decoder,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    stop_token: int | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    from gpt2fast.decoding import Decoder

    was_training = model.training
    model.eval()
    try:
        window: _Window
        if use_cache or isinstance(model, Decoder):
            window = _CachedWindow(model, idx)
        else:
            window = _WholeWindow(model, idx)
        done = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
        for count in range(max_new_tokens):
            token = _pick(window.logits().float(), temperature, top_k, top_p, generator)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            yield token
            if stop_token is not None and bool(done.all()):
                return
            if count + 1 < max_new_tokens:
                window.append(token)
    finally:
        model.train(was_training)


def _pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token a row: logits (B, V) -> (B,). V leaves out the padding of the vocabulary."""
    if temperature == 0:
        if logits.device.type == "cpu":  # NumPy's takes half the time of torch's
            return torch.from_numpy(logits.numpy().argmax(-1))
        return logits.argmax(-1)
    # The largest logit is 0 before the division: a tiny temperature then gives -inf, not inf.
    logits = logits - logits.amax(-1, keepdim=True)
    chances = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


class _Window:
    """What the model sees of the sequence."""

    def __init__(self, model: GPT | Decoder, idx: Tensor) -> None:
        self.block_size = model.config.block_size
        self.prompt = idx.shape[1]
        self.length = self.prompt  # of the whole sequence
        self.tokens = idx[:, self.start() :]  # of the window

    def start(self) -> int:
        return window_start(self.length, self.prompt, self.block_size)

    def append(self, token: Tensor) -> None:
        before = self.start()
        self.length += 1
        self.tokens = torch.cat([self.tokens, token[:, None]], dim=1)
        if self.start() != before:
            self.tokens = self.tokens[:, self.start() - before :]

    def logits(self) -> Tensor:
        """Of the last position, (B, vocab_size)."""
        raise NotImplementedError


class _WholeWindow(_Window):
    """The window computed whole for every token."""

    def __init__(self, model: GPT, idx: Tensor) -> None:
        super().__init__(model, idx)
        self.model = model

    def logits(self) -> Tensor:
        return self.model.head(self.model.hidden(self.tokens)[:, -1])


class _CachedWindow(_Window):
    """The window with the keys and values of all but its new tokens kept."""

    def __init__(self, model: GPT | Decoder, idx: Tensor) -> None:
        super().__init__(model, idx)
        self.model = model
        self.cache = model.new_cache(idx.shape[0])

    def append(self, token: Tensor) -> None:
        before = self.start()
        super().append(token)
        if self.start() != before:
            self.cache.length = 0

    def logits(self) -> Tensor:
        return self.model.forward_cached(self.tokens[:, self.cache.length :], self.cache)


def _check(
    model: GPT | Decoder,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_token: int | None,
) -> None:
    vocab_size = model.config.vocab_size
    if not isinstance(idx, Tensor) or idx.dtype != torch.int64:
        came = idx.dtype if isinstance(idx, Tensor) else type(idx).__name__
        raise TypeError(f"idx must be an int64 tensor of token ids, got {came}")
    if idx.dim() != 2 or 0 in idx.shape:
        raise ValueError(f"idx must have shape (B, T) with B, T >= 1, got {tuple(idx.shape)}")
    low, high = int(idx.min()), int(idx.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"idx must hold ids in 0 to {vocab_size - 1}, got {low} to {high}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ValueError(f"stop_token must be in 0 to {vocab_size - 1}, got {stop_token}")
