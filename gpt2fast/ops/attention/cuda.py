"""Attention on the CUDA kernels (csrc/attention).

attention.cu serves bf16 and fp16 on tensor cores, attention_fma.cu what it does not take; the C++
chooses. attention_hopper.cu (wgmma and TMA) serves head size 64 on Hopper, without dropout and not
for documents. Each pass chooses for itself: what is saved between them is the same.
"""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.ops.cuda_common import is_hopper, launch, processors_of
from gpt2fast.ops.registry import DTYPE_CODES, dropout_numbers

WIDEST = 256
HOPPER_SIZE = 64  # of a head


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


def _suits_tma(t: Tensor) -> bool:
    """Whether rows, heads and batches begin at multiples of 16 bytes and do not overlap."""
    return t.data_ptr() % 16 == 0 and all(s % 8 == 0 and s >= HOPPER_SIZE for s in t.stride()[:3])


def _hopper_options(
    views: tuple[Tensor, ...],
    queries: int,
    keys: int,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
) -> tuple[Any, ...] | None:
    """What attention_hopper.cu takes after the tensors; None where it does not serve: every query
    must see a key, too."""
    q = views[0]
    if not (
        is_hopper(q)
        and q.dtype != torch.float32
        and q.shape[3] == HOPPER_SIZE
        and queries > 0
        and keys > 0
        and (diagonal is None or diagonal >= 0)
        and scale > 0
        and dropout_p == 0
        and all(_suits_tma(t) for t in views)
    ):
        return None
    sizes = (q.shape[0], q.shape[2], queries, keys, diagonal is not None, diagonal or 0)
    return (*sizes, scale, DTYPE_CODES[q.dtype], processors_of(q))


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
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, batch, heads, queries), dtype=torch.float32)
    views = (q, k, v, out)
    if options := _hopper_options(views, queries, k.shape[1], diagonal, scale, dropout_p):
        launch("attention_hopper_forward", *_views(*views), lse, *options)
        return out, lse
    problem = _problem(q, None, queries, k.shape[1], diagonal, scale, dropout_p, seed)
    launch("attention_forward", *_views(*views), lse, *problem)
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
    views, lengths = (dout, q, k, v, out, dq, dk, dv), (q.shape[1], k.shape[1])
    if options := _hopper_options(views, *lengths, diagonal, scale, dropout_p):
        delta = torch.empty_like(lse[0])
        launch("attention_hopper_backward", *_views(*views), lse, delta, *options)
        return
    problem = _problem(q, None, *lengths, diagonal, scale, dropout_p, seed)
    _run_backward(views, lse, problem)


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
