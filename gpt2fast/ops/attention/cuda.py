"""Attention on the CUDA kernels (csrc/attention/attention.cu, attention_fma.cu)."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.ops.cuda_common import launch
from gpt2fast.ops.registry import DTYPE_CODES, dropout_numbers

WIDEST = 256


def _views(*tensors: Tensor) -> list[Any]:
    """Each tensor with its strides over b, t, h; over b they are 0 for documents (total, H, D)."""
    strides = [(0, *t.stride()[:2]) if t.dim() == 3 else t.stride()[:3] for t in tensors]
    return [a for t, s in zip(tensors, strides, strict=True) for a in (t, *s)]


def _problem(
    q: Tensor,
    documents: tuple[Tensor, Tensor] | None,
    queries: int,
    keys: int,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """What the kernels take after the tensors: strides of lse, sizes, options."""
    rows, heads, size = q.shape[-3:]
    if size > WIDEST:
        raise ValueError(f"the CUDA attention takes head sizes of at most {WIDEST}, got {size}")
    if documents is None:
        batch, lse_strides = q.shape[0], (heads * rows, rows, q.shape[0] * heads * rows)
    else:
        batch, lse_strides = documents[0].shape[0] - 1, (0, rows, heads * rows)
    return (
        *lse_strides,
        *(documents or (None, None)),
        seed,
        batch,
        heads,
        queries,
        keys,
        size,
        diagonal is not None,
        diagonal or 0,
        scale,
        *dropout_numbers(dropout_p),
        DTYPE_CODES[q.dtype],
    )


def _run_backward(views: tuple[Tensor, ...], lse: Tensor, problem: tuple[Any, ...]) -> None:
    delta = torch.empty_like(lse[0])
    launch("attention_backward", *_views(*views), lse, delta, *problem)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse and its rounding error in base 2, (2, B, H, Tq) fp32).

    q, k, v: (B, T, H, D) views with contiguous D.
    """
    batch, queries, heads, _ = q.shape
    problem = _problem(q, None, queries, k.shape[1], diagonal, scale, dropout_p, seed)
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, batch, heads, queries), dtype=torch.float32)
    launch("attention_forward", *_views(q, k, v, out), lse, *problem)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes the gradients into dq, dk, dv: (B, T, H, D) views with contiguous D, as the inputs."""
    problem = _problem(q, None, q.shape[1], k.shape[1], diagonal, scale, dropout_p, seed)
    _run_backward((dout, q, k, v, out, dq, dk, dv), lse, problem)


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse and its rounding error in base 2, (2, H, total queries) fp32).

    q, k, v: (total, H, D) views with contiguous D; starts: (B + 1,) contiguous.
    """
    total, heads, _ = q.shape
    diagonal = 0 if causal else None  # the kernel takes each document's own
    problem = _problem(
        q, (q_starts, k_starts), max_queries, max_keys, diagonal, scale, dropout_p, seed
    )
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, heads, total), dtype=torch.float32)
    launch("attention_forward", *_views(q, k, v, out), lse, *problem)
    return out, lse


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes the gradients into dq, dk, dv: (total, H, D) views with contiguous D, as the inputs."""
    diagonal = 0 if causal else None
    problem = _problem(
        q, (q_starts, k_starts), max_queries, max_keys, diagonal, scale, dropout_p, seed
    )
    _run_backward((dout, q, k, v, out, dq, dk, dv), lse, problem)
