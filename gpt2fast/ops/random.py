"""Random words as a hash, so that any block of them can be computed alone, on any machine.

Every backend computes exactly these bits: csrc/common/random.h, csrc/common/cuda.h, triton_common.py.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) after which every input bit moves every output bit."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def random_words(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """A 32-bit word, in int64, for each (b, h, i, j), which broadcast; all int64 and not negative.

    A row (b, h, i) has two words of its own, since with one word two rows of many would too often
    be the same.
    """
    seed = seed.reshape(())
    start = _scramble(((seed & _WORD) + 0x9E3779B9) & _WORD) ^ ((seed >> 32) & _WORD)
    first = _scramble((_scramble((_scramble(start) + b) & _WORD) + h) & _WORD)
    second = _scramble((_scramble((_scramble(start ^ 0x85EBCA6B) + b) & _WORD) + h) & _WORD)
    first = _scramble(first ^ i)
    second = _scramble((second + i * 0x9E3779B9) & _WORD)
    x = (j * 0x9E3779B9 + first) & _WORD
    x = (((x ^ (x >> 16)) * 0x7FEB352D) & _WORD) ^ second
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def dropout_mask(
    seed: Tensor, shape: tuple[int, ...], dropout_p: float, first_batch: int = 0
) -> Tensor:
    """Which of the (B, H, Tq, Tk) = `shape` probabilities are kept: bool.

    The first 24 bits of :func:`random_words` are compared with `dropout_p`. Batch entries are
    counted from `first_batch` on.
    """
    batch, heads, queries, keys = (
        torch.arange(n, device=seed.device).view([-1 if d == axis else 1 for d in range(4)])
        for axis, n in enumerate(shape)
    )
    words = random_words(seed, batch + first_batch, heads, queries, keys)
    return (words >> 8) >= int(dropout_p * 2**24 + 0.5)
