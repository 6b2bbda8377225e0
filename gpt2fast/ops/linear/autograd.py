"""The linear layer as torch.library ops and the autograd Function on them: fp32, on a CPU."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import native
from gpt2fast.ops.linear import cpu
from gpt2fast.ops.registry import call, once_differentiable, register, rows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.forward(rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _backward(dy: Tensor, x: Tensor, weight: Tensor, need: list[bool]) -> Gradients:
    dx, dweight, dbias = cpu.backward(rows(dy), rows(x), weight, need)
    return None if dx is None else dx.view(x.shape), dweight, dbias


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, need: list[bool]) -> Gradients:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (x.new_empty(s) if n else None for s, n in zip(shapes, need, strict=True))
    return dx, dweight, dbias


linear_forward = register(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, _fake_forward
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
        kernels = native()
        found = None if kernels is None else kernels.linear_forward(x, weight, bias)
        return call(linear_forward, x, weight, bias) if found is None else found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        if (kernels := native()) is not None:
            found = kernels.linear_backward(dy, x, weight, *need, cpu.preference())
            if found is not None:
                return found
        return call(linear_backward, dy, x, weight, list(need))
