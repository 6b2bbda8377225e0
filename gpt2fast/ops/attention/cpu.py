"""Attention on the C++ kernels (csrc/attention/attention_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.attention.reference import documents
from gpt2fast.ops.registry import DTYPE_CODES

ALL_KEYS = 1 << 40  # a diagonal beyond every key: not causal


def _place(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides over b, t, h of a (B, T, H, D) tensor with contiguous D."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    first_batch: int,
) -> None:
    batch, queries, heads, size = q.shape
    keys, threads = k.shape[1], torch.get_num_threads()
    kernels = cpu_kernels()
    floats = kernels.attention_forward_workspace(keys, size, threads)
    workspace = q.new_empty((floats,), dtype=torch.float32)
    kernels.attention_forward(
        *_place(q),
        *_place(k),
        *_place(v),
        *_place(out),
        lse.data_ptr(),
        workspace.data_ptr(),
        batch,
        heads,
        queries,
        keys,
        size,
        ALL_KEYS if diagonal is None else diagonal,
        scale,
        dropout_p,
        0 if seed is None else int(seed),
        first_batch,
        DTYPE_CODES[q.dtype],
        threads,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse and its rounding error, (2, B, H, Tq) fp32).

    q, k, v: (B, T, H, D) views with contiguous D.
    """
    batch, queries, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, batch, heads, queries), dtype=torch.float32)
    _forward(q, k, v, out, lse, diagonal, scale, dropout_p, seed, 0)
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
    first_batch: int = 0,
) -> None:
    """Writes the gradients into dq, dk, dv: (B, T, H, D) views with contiguous D, as the inputs.

    Dropout counts batch entries from `first_batch` on.
    """
    batch, queries, heads, size = q.shape
    keys, threads = k.shape[1], torch.get_num_threads()
    kernels = cpu_kernels()
    floats = kernels.attention_backward_workspace(batch * heads, queries, keys, size, threads)
    workspace = q.new_empty((floats,), dtype=torch.float32)
    kernels.attention_backward(
        *_place(dout),
        *_place(q),
        *_place(k),
        *_place(v),
        *_place(out),
        lse.data_ptr(),
        *_place(dq),
        *_place(dk),
        *_place(dv),
        workspace.data_ptr(),
        batch,
        heads,
        queries,
        keys,
        size,
        ALL_KEYS if diagonal is None else diagonal,
        scale,
        dropout_p,
        0 if seed is None else int(seed),
        first_batch,
        DTYPE_CODES[q.dtype],
        threads,
    )


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
    """(out like q, contiguous; lse and its rounding error of one document after the other, flat in
    (2, H, total queries) fp32). q, k, v: (total, H, D) views with contiguous D."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, q.shape[1], q.shape[0]), dtype=torch.float32)
    for b, (queries, keys) in enumerate(documents(q, k, q_starts, k_starts, max_queries, max_keys)):
        q_, k_, v_ = (t[rows].unsqueeze(0) for t, rows in ((q, queries), (k, keys), (v, keys)))
        out_, lse_ = out[queries].unsqueeze(0), _of_document(lse, queries)
        diagonal = (keys.stop - keys.start) - (queries.stop - queries.start) if causal else None
        _forward(q_, k_, v_, out_, lse_, diagonal, scale, dropout_p, seed, b)
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
    for b, (queries, keys) in enumerate(documents(q, k, q_starts, k_starts, max_queries, max_keys)):
        dout_, q_, out_, dq_ = (t[queries].unsqueeze(0) for t in (dout, q, out, dq))
        k_, v_, dk_, dv_ = (t[keys].unsqueeze(0) for t in (k, v, dk, dv))
        diagonal = (keys.stop - keys.start) - (queries.stop - queries.start) if causal else None
        lse_ = _of_document(lse, queries)
        backward(
            dout_, q_, k_, v_, out_, lse_, dq_, dk_, dv_, diagonal, scale, dropout_p, seed, b
        )  # fmt: skip


def _of_document(lse: Tensor, queries: slice) -> Tensor:
    """A document's (2, H, Tq) in the memory of the (2, H, total) tensor."""
    per_query = 2 * lse.shape[1]
    return lse.view(-1)[queries.start * per_query : queries.stop * per_query]
