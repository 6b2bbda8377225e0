"""GPT-2's projections and MLP on weights as Hugging Face's Conv1D keeps them: (in, out).

`functional.gelu_mlp` would take them as ``weight.t()`` views without a copy, but would hand back
gradients that lie the other way round, which autograd then copies, transposing, into the parameter's
layout. Here every product writes the layout that it is wanted in:

    h = x W_fc;  act = gelu(h + b_fc);  y = act W_proj + b_proj
    dW_proj = act^T dy;  dh = gelu'(h + b_fc) (dy W_proj^T);  dW_fc = x^T dh;  dx = dh W_fc^T

Saved for backward: x and h. The activation is computed again, one pass over h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import choose
from gpt2fast.ops.checks import autocast
from gpt2fast.ops.gelu.autograd import gelu_backward, gelu_forward
from gpt2fast.ops.gelu_mlp import reference
from gpt2fast.ops.linear.cpu import column_sum, matmul
from gpt2fast.ops.linear.functional import suits
from gpt2fast.ops.registry import apply, call, is_eager, once_differentiable, rows


class _Conv1dMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc_weight: Tensor,
        fc_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        backend: str,
    ) -> Tensor:
        h = matmul(x, fc_weight)
        activation = call(gelu_forward, h, fc_bias, backend)
        ctx.save_for_backward(x, h, fc_weight, fc_bias, proj_weight)
        ctx.proj_bias_dtype, ctx.backend = proj_bias.dtype, backend
        return matmul(activation, proj_weight, proj_bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, fc_weight, fc_bias, proj_weight = ctx.saved_tensors
        need_x, need_fc, need_fc_bias, need_proj, need_proj_bias = ctx.needs_input_grad[:5]
        dx = dfc = dfc_bias = dproj = dproj_bias = None
        if need_proj:
            dproj = matmul(call(gelu_forward, h, fc_bias, ctx.backend).t(), dy)
        if need_x or need_fc or need_fc_bias:
            dact = matmul(dy, proj_weight.t())
            dh, dfc_bias = call(
                gelu_backward, dact, h, fc_bias, need_x or need_fc, need_fc_bias, ctx.backend
            )
            if need_x:
                dx = matmul(dh, fc_weight.t())
            if need_fc:
                dfc = matmul(x.t(), dh)
            if need_fc_bias:
                dfc_bias = dfc_bias.to(fc_bias.dtype)
        if need_proj_bias:
            dproj_bias = dy.sum(0, dtype=torch.float32).to(ctx.proj_bias_dtype)
        return dx, dfc, dfc_bias, dproj, dproj_bias, None


class _Conv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy, need = rows(dy), ctx.needs_input_grad
        return (
            matmul(dy, weight.t()) if need[0] else None,
            matmul(x.t(), dy) if need[1] else None,
            column_sum(dy) if need[2] else None,
        )


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight + bias``: Conv1D's forward, on our product where that is the faster one.

    Args:
        x: (..., C), floating point.
        weight, bias: (C, D) and (D,).
    """
    flat = rows(x)
    given = (flat, weight, bias)
    if is_eager(*given) and suits(flat.shape[0], flat.numel() * weight.shape[1], *given):
        y = apply(_Conv1d, *given)
    else:
        y = torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def conv1d_gelu_mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """``gelu(x @ fc_weight + fc_bias) @ proj_weight + proj_bias`` with the tanh-GELU.

    Args:
        x: (..., C), float32, bfloat16 or float16.
        fc_weight, fc_bias: (C, H) and (H,).
        proj_weight, proj_bias: (H, D) and (D,).

    Returns:
        (..., D) of x's dtype (under autocast, of autocast's).
    """
    x, fc_weight, proj_weight = (t for t in autocast(x, fc_weight, proj_weight) if t is not None)
    backend = choose(x, "gelu_mlp")
    if backend == "reference":
        return reference.gelu_mlp(x, fc_weight.t(), fc_bias, proj_weight.t(), proj_bias)
    y = apply(_Conv1dMlp, rows(x), fc_weight, fc_bias, proj_weight, proj_bias, backend)
    return y.view(*x.shape[:-1], proj_weight.shape[1])
