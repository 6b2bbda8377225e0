"""Layer norm as torch.library ops and the autograd Functions on them."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import load
from gpt2fast.ops.registry import call, once_differentiable, register, rows, shaped


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    _, y, statistics = load("layer_norm", backend).forward(rows(x), None, weight, bias, eps)
    return shaped(y, x), statistics


def _add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    total, y, statistics = load("layer_norm", backend).forward(
        rows(x), rows(residual), weight, bias, eps, dropout_p, seed
    )
    return shaped(total, x), shaped(y, x), statistics


def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    need_input: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx, dweight, dbias = load("layer_norm", backend).backward(
        rows(dy),
        None if dsum is None else rows(dsum),
        rows(x),
        weight,
        statistics,
        need_input,
        need_parameters,
    )
    return None if dx is None else shaped(dx, x), dweight, dbias


def _dropout(x: Tensor, dropout_p: float, seed: Tensor, backend: str) -> Tensor:
    return shaped(load("layer_norm", backend).dropout(rows(x), dropout_p, seed), x)


def _fake_dropout(x: Tensor, dropout_p: float, seed: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_statistics(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[:-1].numel()), dtype=torch.float32)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_statistics(x)


def _fake_add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_statistics(x)


def _fake_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
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
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    in_cpp=True,
)
add_layer_norm_forward = register(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps,"
    " float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    _fake_add_forward,
    in_cpp=True,
)
layer_norm_backward = register(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor statistics,"
    " bool need_input, bool need_parameters, str backend)"
    " -> (Tensor?, Tensor?, Tensor?)",
    _backward,
    _fake_backward,
    in_cpp=True,
)


dropout_rows = register(
    "dropout_rows(Tensor x, float dropout_p, Tensor seed, str backend) -> Tensor",
    _dropout,
    _fake_dropout,
)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
    ) -> Tensor:
        y, statistics = call(layer_norm_forward, x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, statistics)
        ctx.bias_dtype, ctx.backend = None if bias is None else bias.dtype, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        need = (need_x, need_weight or need_bias)
        dx, dweight, dbias = call(
            layer_norm_backward, dy, None, x, weight, statistics, *need, ctx.backend
        )
        return (
            dx,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
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
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        total, y, statistics = call(
            add_layer_norm_forward, x, residual, weight, bias, eps, dropout_p, seed, backend
        )
        ctx.save_for_backward(total, weight, statistics, seed)
        ctx.dropout_p = dropout_p
        ctx.set_materialize_grads(False)  # the last sum of a model has no gradient of its own
        ctx.bias_dtype, ctx.backend = None if bias is None else bias.dtype, backend
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, statistics, seed = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        ds: Any = dsum
        dweight: Any = None
        dbias: Any = None
        if dy is None:
            need_weight = need_bias = False
        else:
            need = (need_x or need_residual, need_weight or need_bias)
            ds, dweight, dbias = call(
                layer_norm_backward, dy, dsum, total, weight, statistics, *need, ctx.backend
            )
        dx = ds if need_x else None
        if dx is not None and seed is not None:
            dx = call(dropout_rows, dx, ctx.dropout_p, seed, ctx.backend)
        return (
            dx,
            ds if need_residual else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
            None,
            None,
        )
