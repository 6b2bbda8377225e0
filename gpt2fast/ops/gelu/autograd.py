"""GELU as torch.library ops and the autograd Function on them."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import load
from gpt2fast.ops.registry import call, once_differentiable, register, rows, shaped


def _forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return shaped(load("gelu", backend).forward(rows(x), bias), x)


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_input: bool, need_bias: bool, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    dx, dbias = load("gelu", backend).backward(rows(dy), rows(x), bias, need_input, need_bias)
    return None if dx is None else shaped(dx, x), dbias


def _fake_forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_input: bool, need_bias: bool, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    dx = x.new_empty(x.shape) if need_input else None
    return dx, x.new_empty((x.shape[-1],), dtype=torch.float32) if need_bias else None


gelu_forward = register(
    "gelu_forward(Tensor x, Tensor? bias, str backend) -> Tensor",
    _forward,
    _fake_forward,
    in_cpp=True,
)
gelu_backward = register(
    "gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool need_input, bool need_bias, str backend)"
    " -> (Tensor?, Tensor?)",
    _backward,
    _fake_backward,
    in_cpp=True,
)


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.backend = backend
        return call(gelu_forward, x, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[:2]
        dx, dbias = call(gelu_backward, dy, x, bias, need_x, need_bias, ctx.backend)
        return dx, dbias.to(bias.dtype) if need_bias else None, None
