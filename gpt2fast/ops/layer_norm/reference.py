"""Layer norm in plain PyTorch: the specification, differentiated by PyTorch."""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    weight, bias = (p if p is None else p.to(x.dtype) for p in (weight, bias))
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """s = x + residual and layer_norm(s)."""
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)
