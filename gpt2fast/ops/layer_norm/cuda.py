"""Layer norm on the CUDA kernels (csrc/layer_norm/layer_norm.cu)."""

import torch
from torch import Tensor

from gpt2fast.ops.cuda_common import launch, parameter, processors_of
from gpt2fast.ops.registry import DTYPE_CODES, dropout_numbers

#: Blocks of the backward for each multiprocessor, as many as its registers hold.
BLOCKS = 4


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """On rows x (R, C): (s = x + residual or None, y (R, C), statistics: mean, rstd (2, R) fp32).

    With a seed, s = dropout(x) + residual.
    """
    count, columns = x.shape
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    statistics = x.new_empty((2, count), dtype=torch.float32)
    launch(
        "layer_norm_forward",
        x,
        x.stride(0),
        residual,
        0 if residual is None else residual.stride(0),
        *parameter(weight, x),
        *parameter(bias, x),
        total,
        y,
        statistics,
        seed,
        count,
        columns,
        eps,
        *dropout_numbers(dropout_p),
        DTYPE_CODES[x.dtype],
    )
    return total, y, statistics


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx (R, C), dweight (C,) fp32, dbias (C,) fp32), None where not needed."""
    count, columns = x.shape
    dx = x.new_empty(x.shape) if need_input else None
    blocks = max(1, min(processors_of(x) * BLOCKS, count))
    dweight = dbias = partials = None
    if need_parameters:
        dweight, dbias = (x.new_empty((columns,), dtype=torch.float32) for _ in range(2))
        partials = x.new_empty((blocks, 2 * columns), dtype=torch.float32)
    launch(
        "layer_norm_backward",
        dy,
        dy.stride(0),
        dsum,
        0 if dsum is None else dsum.stride(0),
        x,
        x.stride(0),
        *parameter(weight, x),
        statistics,
        dx,
        dweight,
        dbias,
        partials,
        blocks,
        count,
        columns,
        DTYPE_CODES[x.dtype],
    )
    return dx, dweight, dbias


def dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """The rows x (R, C) with `forward`'s mask: dropped elements 0, kept ones / (1 - dropout_p)."""
    out = x.new_empty(x.shape)
    numbers = dropout_numbers(dropout_p)
    launch("dropout_rows", x, x.stride(0), out, seed, *x.shape, *numbers, DTYPE_CODES[x.dtype])
    return out
