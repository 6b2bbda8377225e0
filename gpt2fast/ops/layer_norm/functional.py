"""The public layer norm functions."""

import torch
from torch import Tensor

from gpt2fast.backends import choose, least, native
from gpt2fast.ops.checks import (
    check_dropout,
    check_floating,
    check_number,
    check_parameter,
    check_tensor,
    distinct,
    dropout_seed,
)
from gpt2fast.ops.layer_norm import autograd, reference
from gpt2fast.ops.registry import apply, enter


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_floating("x", x)
    check_number("eps", eps)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have a last dimension of at least one, got shape {tuple(x.shape)}"
        )
    meaning = "the last dimension of x"
    check_parameter("weight", weight, "x", x, (x.shape[-1],), meaning)
    check_parameter("bias", bias, "x", x, (x.shape[-1],), meaning)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer norm over the last dimension: (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        x: (..., C), float32, bfloat16 or float16; rows may be strided.
        weight: (C,) or None (ones). May be float32 beside a half-precision x.
        bias: (C,) or None (zeros).
        eps: added to the variance.

    Returns:
        A tensor of x's shape and dtype. Statistics are fp32 whatever x's dtype.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source: Ba et al. 2016, "Layer Normalization", https://arxiv.org/abs/1607.06450.

    >>> gpt2fast.functional.layer_norm(torch.tensor([[1.0, 3.0]]), bias=torch.full((2,), 5.0))
    tensor([[4.0000, 6.0000]])
    """
    kernels = native()
    if kernels is not None:
        way = kernels.layer_norm_way(x, weight, bias, eps, least("layer_norm"))
        if way.__class__ is not int:  # the result of PyTorch's own op, for a small input
            return way
        if way:
            return enter(way, autograd.LayerNorm, x, weight, bias, eps, "cpu")
    _check(x, weight, bias, eps)
    backend = choose(x, "layer_norm")
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    return apply(autograd.LayerNorm, x, weight, bias, eps, backend)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Residual add and layer norm in one pass over memory: s = x + residual, y = layer_norm(s).

    Args:
        x: (..., C), float32, bfloat16 or float16: the branch that is added.
        residual: of x's shape; where the dtypes differ (a half-precision branch under autocast), the
            wider one is taken for both, as in torch's addition.
        weight, bias, eps: as for :func:`layer_norm`.
        dropout_p: probability with which an element of x is dropped before the addition; the others
            are divided by 1 - dropout_p. The mask follows from one number of torch's generator.

    Returns:
        (s, y), both of x's shape and the dtype of x + residual.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    >>> gpt2fast.functional.add_layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2))
    (tensor([[2., 4.]]), tensor([[-1.0000,  1.0000]]))
    """
    kernels = native()
    if kernels is not None:
        small = least("layer_norm")
        way = kernels.add_layer_norm_way(x, residual, weight, bias, eps, dropout_p, small)
        if way.__class__ is not int:  # as above
            return way
        if way:
            arguments = (x, residual, weight, bias, eps, 0.0, None, "cpu")
            return enter(way, autograd.AddLayerNorm, *arguments)
    _check(x, weight, bias, eps)
    check_tensor("residual", residual)
    check_parameter("residual", residual, "x", x, x.shape, "that of x")
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    x, residual = distinct(x, residual)
    check_dropout(dropout_p)
    seed = dropout_seed(dropout_p, x.device)
    backend = choose(x, "layer_norm", native=seed is None)
    options = (weight, bias, eps, dropout_p, seed)
    if backend == "reference":
        return reference.add_layer_norm(x, residual, *options)
    return apply(autograd.AddLayerNorm, x, residual, *options, backend)
