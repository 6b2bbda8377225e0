"""GELU on the C++ kernels (csrc/gelu/gelu_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import DTYPE_CODES, empty_like, pointer


def forward(x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """On rows x (R, C): gelu(x + bias) (R, C), into the contiguous `out` where it is given."""
    y = empty_like(x) if out is None else out
    bias = _fp32(bias)
    cpu_kernels().gelu_forward(
        x.data_ptr(),
        x.stride(0),
        pointer(bias),
        y.data_ptr(),
        *x.shape,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_input: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (dx (R, C), dbias (C,) fp32), None where not needed."""
    dx = empty_like(x) if need_input else None
    return dx, backward_into(dy, x, bias, dx, None, need_bias)


def backward_into(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    activation: Tensor | None,
    need_bias: bool,
) -> Tensor | None:
    """Writes dx (which may be dy) and gelu(x + bias) to contiguous tensors (R, C) where given.

    Returns dbias (C,) fp32 where needed.
    """
    columns, threads = x.shape[1], torch.get_num_threads()
    dbias = workspace = None
    if need_bias:
        dbias = x.new_empty((columns,), dtype=torch.float32)
        workspace = x.new_empty((threads, 2 * columns), dtype=torch.float32)
    bias = _fp32(bias)
    cpu_kernels().gelu_backward(
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        pointer(bias),
        pointer(dx),
        pointer(activation),
        pointer(dbias),
        pointer(workspace),
        *x.shape,
        DTYPE_CODES[x.dtype],
        threads,
    )
    return dbias


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
