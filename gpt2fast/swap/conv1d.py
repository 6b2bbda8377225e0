"""GPT-2's MLP on weights that lie as Hugging Face's Conv1D keeps them: (in, out).

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
from torch.autograd.function import once_differentiable

from gpt2fast.backends import choose
from gpt2fast.ops.checks import autocast
from gpt2fast.ops.gelu.autograd import gelu_backward, gelu_forward
from gpt2fast.ops.gelu_mlp import reference
from gpt2fast.ops.registry import apply, call


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
        h = torch.mm(x, fc_weight)
        activation = call(gelu_forward, h, fc_bias, backend)
        ctx.save_for_backward(x, h, fc_weight, fc_bias, proj_weight)
        ctx.proj_bias_dtype, ctx.backend = proj_bias.dtype, backend
        return torch.addmm(proj_bias.to(x.dtype), activation, proj_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, fc_weight, fc_bias, proj_weight = ctx.saved_tensors
        need_x, need_fc, need_fc_bias, need_proj, need_proj_bias = ctx.needs_input_grad[:5]
        dx = dfc = dfc_bias = dproj = dproj_bias = None
        if need_proj:
            dproj = torch.mm(call(gelu_forward, h, fc_bias, ctx.backend).t(), dy)
        if need_x or need_fc or need_fc_bias:
            dact = torch.mm(dy, proj_weight.t())
            dh, dfc_bias = call(
                gelu_backward, dact, h, fc_bias, need_x or need_fc, need_fc_bias, ctx.backend
            )
            if need_x:
                dx = torch.mm(dh, fc_weight.t())
            if need_fc:
                dfc = torch.mm(x.t(), dh)
            if need_fc_bias:
                dfc_bias = dfc_bias.to(fc_bias.dtype)
        if need_proj_bias:
            dproj_bias = dy.sum(0, dtype=torch.float32).to(ctx.proj_bias_dtype)
        return dx, dfc, dfc_bias, dproj, dproj_bias, None


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
    rows = x.reshape(-1, x.shape[-1])
    y = apply(_Conv1dMlp, rows, fc_weight, fc_bias, proj_weight, proj_bias, backend)
    return y.view(*x.shape[:-1], proj_weight.shape[1])
