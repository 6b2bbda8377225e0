"""The GELU-MLP as torch.library ops and the autograd Function on them."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import load, native
from gpt2fast.ops.linear.cpu import preference
from gpt2fast.ops.registry import call, once_differentiable, register, rows


def _forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    y, h = load("gelu_mlp", backend).forward(
        rows(x), fc_weight, fc_bias, proj_weight, proj_bias, save
    )
    return y.view(*x.shape[:-1], proj_weight.shape[0]), h


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    need: list[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    dx, *others = load("gelu_mlp", backend).backward(
        rows(dy), rows(x), h, fc_weight, fc_bias, proj_weight, need
    )
    return None if dx is None else dx.view(x.shape), *others


def _fake_forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    y = x.new_empty((*x.shape[:-1], proj_weight.shape[0]))
    h = x.new_empty((x.shape[:-1].numel(), fc_weight.shape[0])) if save else None
    return y, h


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    need: list[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    hidden, out = fc_weight.shape[0], proj_weight.shape[0]
    return (
        x.new_empty(x.shape) if need[0] else None,
        x.new_empty(fc_weight.shape) if need[1] else None,
        x.new_empty((hidden,), dtype=torch.float32) if need[2] else None,
        x.new_empty(proj_weight.shape) if need[3] else None,
        x.new_empty((out,), dtype=torch.float32) if need[4] else None,
    )


gelu_mlp_forward = register(
    "gelu_mlp_forward(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight,"
    " Tensor? proj_bias, bool save, str backend) -> (Tensor, Tensor?)",
    _forward,
    _fake_forward,
)
gelu_mlp_backward = register(
    "gelu_mlp_backward(Tensor dy, Tensor x, Tensor h, Tensor fc_weight, Tensor? fc_bias,"
    " Tensor proj_weight, bool[] need, str backend)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    _backward,
    _fake_backward,
)


class GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc_weight: Tensor,
        fc_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        backend: str,
    ) -> Tensor:
        inputs = (x, fc_weight, fc_bias, proj_weight, proj_bias)
        kernels = native() if backend == "cpu" else None
        found = None if kernels is None else kernels.gelu_mlp_forward(*inputs, True)
        y, h = call(gelu_mlp_forward, *inputs, True, backend) if found is None else found
        ctx.save_for_backward(x, h, fc_weight, fc_bias, proj_weight, proj_bias)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, fc_weight, fc_bias, proj_weight, proj_bias = ctx.saved_tensors
        given, need = (dy, x, h, fc_weight, fc_bias, proj_weight), list(ctx.needs_input_grad[:5])
        kernels = native() if ctx.backend == "cpu" else None
        found = None if kernels is None else kernels.gelu_mlp_backward(*given, *need, preference())
        if found is None:
            found = call(gelu_mlp_backward, *given, need, ctx.backend)
        dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias = found
        return (
            dx,
            dfc_weight,
            dfc_bias.to(fc_bias.dtype) if need[2] else None,
            dproj_weight,
            dproj_bias.to(proj_bias.dtype) if need[4] else None,
            None,
        )
