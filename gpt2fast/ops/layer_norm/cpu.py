"""Layer norm on the C++ kernels (csrc/layer_norm/layer_norm_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import DTYPE_CODES, empty_like, pointer


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """On rows x (R, C): (x + residual or None, y (R, C), statistics: mean, rstd (2, R) fp32)."""
    y = empty_like(x)
    total = None if residual is None else empty_like(x)
    count, columns = x.shape
    statistics = torch.empty((2, count), dtype=torch.float32)
    mean = statistics.data_ptr()
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
        mean,
        mean + 4 * count,
        count,
        columns,
        eps,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
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
    (count, columns), threads = x.shape, torch.get_num_threads()
    dx = empty_like(x) if need_input else None
    mean = statistics.data_ptr()
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
        mean,
        mean + 4 * count,
        pointer(dx),
        pointer(dweight),
        pointer(dbias),
        pointer(workspace),
        count,
        columns,
        DTYPE_CODES[x.dtype],
        threads,
    )
    return dx, dweight, dbias


def _fp32(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.float().contiguous()
