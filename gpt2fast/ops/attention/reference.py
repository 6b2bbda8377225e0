"""Attention in plain PyTorch: the specification, differentiated by PyTorch."""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) after which every input bit moves every output bit."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def dropout_mask(seed: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """Which of the (B, H, Tq, Tk) = `shape` probabilities are kept: bool.

    A hash of (seed, b, h, i, j) in 32-bit words, so that any block of it can be computed alone, on
    any machine. Its first 24 bits are compared with `dropout_p`. A row (b, h, i) has two words of
    its own, since with one word two rows of a large batch would too often have the same mask.
    Every backend computes exactly these bits.
    """
    batch, heads, queries, keys = (
        torch.arange(n, device=seed.device).view([-1 if d == axis else 1 for d in range(4)])
        for axis, n in enumerate(shape)
    )
    seed = seed.reshape(())
    start = _scramble(((seed & _WORD) + 0x9E3779B9) & _WORD) ^ ((seed >> 32) & _WORD)
    first = _scramble((_scramble((_scramble(start) + batch) & _WORD) + heads) & _WORD)
    other = _scramble((_scramble(start ^ 0x85EBCA6B) + batch) & _WORD)
    second = _scramble((other + heads) & _WORD)
    first = _scramble(first ^ queries)
    second = _scramble((second + queries * 0x9E3779B9) & _WORD)
    x = (keys * 0x9E3779B9 + first) & _WORD
    x = (((x ^ (x >> 16)) * 0x7FEB352D) & _WORD) ^ second
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    x = x ^ (x >> 16)
    return (x >> 8) >= int(dropout_p * 2**24 + 0.5)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """softmax(scale q k^T) v on (B, T, H, D); query i sees keys j <= i + diagonal (None: all).

    The softmax is fp32 for half-precision inputs. A query that sees no key gives 0.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    scores = (q @ k.transpose(-1, -2)) * scale
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if diagonal is not None:
        queries, keys = scores.shape[-2:]
        i = torch.arange(queries, device=q.device)[:, None]
        hidden = torch.arange(keys, device=q.device) > i + diagonal
        scores = scores.masked_fill(hidden, -math.inf)
        # all-hidden rows are nan in the softmax; their gradient ends at the fill above
        probabilities = torch.softmax(scores, -1).masked_fill(hidden, 0.0)
    else:
        probabilities = torch.softmax(scores, -1)
    if seed is not None:
        keep = dropout_mask(seed, tuple(probabilities.shape), dropout_p)
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        probabilities = (probabilities * factor).masked_fill(~keep, 0.0)
    return (probabilities.to(v.dtype) @ v).transpose(1, 2)
