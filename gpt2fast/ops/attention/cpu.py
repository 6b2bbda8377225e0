"""Attention on the C++ kernels (csrc/attention/attention_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import DTYPE_CODES

ALL_KEYS = 1 << 40  # a diagonal beyond every key: not causal


def _place(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides over b, t, h of a (B, T, H, D) tensor with contiguous D."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


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
    batch, queries, heads, size = q.shape
    keys, threads = k.shape[1], torch.get_num_threads()
    kernels = cpu_kernels()
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, batch, heads, queries), dtype=torch.float32)
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
        DTYPE_CODES[q.dtype],
        threads,
    )
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
        DTYPE_CODES[q.dtype],
        threads,
    )
