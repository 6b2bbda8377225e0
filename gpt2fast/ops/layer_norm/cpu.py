"""Layer norm on the C++ kernels (csrc/layer_norm/layer_norm_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import DTYPE_CODES, pointer


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """On rows x (R, C): (x + residual or None, y (R, C), mean (R,) fp32, rstd (R,) fp32)."""
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    weight, bias = _fp32(weight), _fp32(bias)
    cpu_kernels().layer_norm_forward(
        x.data_ptr(),
        x.stride(0),
        pointer(residual),
        0 if residual is None else residual.stride(0),
        pointer(weight),
        pointer(bias),
        pointer(total),
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        *x.shape,
        eps,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return total, y, mean, rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx (R, C), dweight (C,) fp32, dbias (C,) fp32), None where not needed."""
    columns, threads = x.shape[1], torch.get_num_threads()
    dx = x.new_empty(x.shape) if need_input else None
    dweight = dbias = workspace = None
    if need_parameters:
        dweight, dbias = (x.new_empty((columns,), dtype=torch.float32) for _ in range(2))
        workspace = x.new_empty((threads, 4 * columns), dtype=torch.float32)
    weight = _fp32(weight)
    cpu_kernels().layer_norm_backward(
        dy.data_ptr(),
        dy.stride(0),
        pointer(dsum),
        0 if dsum is None else dsum.stride(0),
        x.data_ptr(),
        x.stride(0),
        pointer(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        pointer(dx),
        pointer(dweight),
        pointer(dbias),
        pointer(workspace),
        *x.shape,
        DTYPE_CODES[x.dtype],
        threads,
    )
    return dx, dweight, dbias


def _fp32(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()
