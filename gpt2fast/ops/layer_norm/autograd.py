"""Layer norm as torch.library ops and the autograd Functions on them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2fast.backends import load
from gpt2fast.ops.registry import is_plain, register, rows


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _, y, mean, rstd = load("layer_norm", backend).forward(rows(x), None, weight, bias, eps)
    return y if x.dim() == 2 else y.view(x.shape), mean, rstd


def _add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, y, mean, rstd = load("layer_norm", backend).forward(
        rows(x), rows(residual), weight, bias, eps
    )
    return total.view(x.shape), y.view(x.shape), mean, rstd


def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_input: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx, dweight, dbias = load("layer_norm", backend).backward(
        rows(dy),
        None if dsum is None else rows(dsum),
        rows(x),
        weight,
        mean,
        rstd,
        need_input,
        need_parameters,
    )
    return None if dx is None else dx.view(x.shape), dweight, dbias


def _fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[:-1].numel(),)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_fake_statistics(x)


def _fake_add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), *_fake_statistics(x)


def _fake_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_input: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = x.new_empty(x.shape) if need_input else None
    if not need_parameters:
        return dx, None, None
    columns = x.shape[-1]
    dweight = x.new_empty((columns,), dtype=torch.float32)
    return dx, dweight, torch.empty_like(dweight)


layer_norm_forward = register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
add_layer_norm_forward = register(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward,
    _fake_add_forward,
)
layer_norm_backward = register(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor mean,"
    " Tensor rstd, bool need_input, bool need_parameters, str backend)"
    " -> (Tensor?, Tensor?, Tensor?)",
    _backward,
    _fake_backward,
)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
    ) -> Tensor:
        forward: Callable[..., Any] = _forward if is_plain(x) else layer_norm_forward
        y, mean, rstd = forward(x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        backward: Callable[..., Any] = _backward if is_plain(dy) else layer_norm_backward
        dx, dweight, dbias = backward(
            dy, None, x, weight, mean, rstd, need_x, need_weight or need_bias, ctx.backend
        )
        return (
            dx,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            None,
            None,
        )


class AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        forward: Callable[..., Any] = _add_forward if is_plain(x) else add_layer_norm_forward
        total, y, mean, rstd = forward(x, residual, weight, bias, eps, backend)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)  # the last sum of a model has no gradient of its own
        ctx.backend = backend
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, dsum, None, None, None, None
        total, weight, bias, mean, rstd = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        backward: Callable[..., Any] = _backward if is_plain(dy) else layer_norm_backward
        dx, dweight, dbias = backward(
            dy,
            dsum,
            total,
            weight,
            mean,
            rstd,
            need_x or need_residual,
            need_weight or need_bias,
            ctx.backend,
        )
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            None,
            None,
        )
