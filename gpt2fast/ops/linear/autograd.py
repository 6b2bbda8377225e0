"""The linear layer as torch.library ops and the autograd Function on them: fp32, on a CPU."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.ops.linear import cpu
from gpt2fast.ops.registry import call, once_differentiable, register, rows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _backward(dy: Tensor, x: Tensor, weight: Tensor, need: list[bool]) -> Gradients:
    return cpu.backward(rows(dy), x, weight, need)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, need: list[bool]) -> Gradients:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (x.new_empty(s) if n else None for s, n in zip(shapes, need, strict=True))
    return dx, dweight, dbias


linear_forward = register(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor", cpu.forward, _fake_forward
)
linear_backward = register(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool[] need)"
    " -> (Tensor?, Tensor?, Tensor?)",
    _backward,
    _fake_backward,
)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return call(linear_forward, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return call(linear_backward, dy, x, weight, list(ctx.needs_input_grad))
