"""GELU on the CUDA kernels (csrc/gelu/gelu.cu)."""

import torch
from torch import Tensor

from gpt2fast.ops.cuda_common import launch, parameter, processors_of
from gpt2fast.ops.registry import DTYPE_CODES

#: Threads of the backward on a multiprocessor, and of a block.
RESIDENT, THREADS = 1024, 128


def forward(x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """On rows x (R, C): gelu(x + bias) (R, C), into the contiguous `out` (or x) where given."""
    y = x.new_empty(x.shape) if out is None else out
    dtype = DTYPE_CODES[x.dtype]
    launch("gelu_forward", x, x.stride(0), *parameter(bias, x), y, *x.shape, dtype)
    return y


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_input: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (dx (R, C), dbias (C,) fp32), None where not needed."""
    dx = x.new_empty(x.shape) if need_input else None
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
    count, columns = x.shape
    across = -(-columns * x.element_size() // (16 * THREADS))
    strips = max(1, min(processors_of(x) * (RESIDENT // THREADS) // across, count))
    dbias = partials = None
    if need_bias:
        dbias = x.new_empty((columns,), dtype=torch.float32)
        partials = x.new_empty((strips, columns), dtype=torch.float32)
    launch(
        "gelu_backward",
        dy,
        dy.stride(0),
        x,
        x.stride(0),
        *parameter(bias, x),
        dx,
        activation,
        dbias,
        partials,
        strips,
        count,
        columns,
        DTYPE_CODES[x.dtype],
    )
    return dbias
