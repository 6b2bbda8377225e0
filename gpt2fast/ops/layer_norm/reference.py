"""Layer norm in plain PyTorch: the specification, differentiated by PyTorch."""

import torch
from torch import Tensor

from gpt2fast.ops.random import dropout_mask


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    if weight is not None and weight.dtype != x.dtype:  # .to() takes a microsecond for nothing, too
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def kept(shape: torch.Size, dropout_p: float, seed: Tensor) -> Tensor:
    """Dropout's mask of x of `shape` (..., C), bool: row r and column c are kept as query r and key c
    of attention's first head are."""
    rows = (1, 1, shape[:-1].numel(), shape[-1])
    return dropout_mask(seed, rows, dropout_p).view(shape)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """s = dropout(x) + residual and layer_norm(s)."""
    if seed is not None:
        keep = kept(x.shape, dropout_p, seed)
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        x = (x * factor).masked_fill(~keep, 0.0)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)
