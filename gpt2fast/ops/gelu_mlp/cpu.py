"""The GELU-MLP on matrix products (ops/linear) and the C++ kernels (csrc/gelu, csrc/linear).

Forward saves h = x fc_weight^T without its bias: the GELU kernel adds the bias while it reads h,
and the product needs no pass to spread a bias first. Backward makes one pass over h and dact, which
writes the activation (for dproj_weight), dh over dact in place, and the bias gradient.
"""

import torch
from torch import Tensor

from gpt2fast.ops.gelu.cpu import backward_into
from gpt2fast.ops.gelu.cpu import forward as gelu_forward
from gpt2fast.ops.linear.cpu import column_sum, matmul

#: Rows whose activation exists at a time in the forward: enough for the BLAS to run at full rate.
CHUNK = 1024


def forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """On rows x (R, C): y (R, D), and where `save` h = x fc_weight^T (R, H)."""
    count, hidden = x.shape[0], fc_weight.shape[0]
    y = x.new_empty((count, proj_weight.shape[0]))
    size = min(count, CHUNK)
    activation = x.new_empty((size, hidden))
    h = x.new_empty((count, hidden)) if save else None
    proj_bias = None if proj_bias is None else proj_bias.to(x.dtype)
    for begin in range(0, count, CHUNK):
        end = min(begin + CHUNK, count)
        act = activation[: end - begin]
        # Without a backward the GELU runs in place: nobody needs h.
        part = act if h is None else h[begin:end]
        matmul(x[begin:end], fc_weight.t(), out=part)
        gelu_forward(part, fc_bias, act)
        matmul(act, proj_weight.t(), proj_bias, out=y[begin:end])
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, fc_weight, fc_bias (fp32), proj_weight, proj_bias (fp32) where needed."""
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = need
    dx = dfc_weight = dfc_bias = dproj_weight = activation = None
    if need_x or need_fc_weight or need_fc_bias:
        dh = matmul(dy, proj_weight)
        activation = torch.empty_like(h) if need_proj_weight else None
        written = dh if need_x or need_fc_weight else None
        dfc_bias = backward_into(dh, h, fc_bias, written, activation, need_fc_bias)
        if need_x:
            dx = matmul(dh, fc_weight)
        if need_fc_weight:
            dfc_weight = matmul(dh.t(), x)
    elif need_proj_weight:
        activation = gelu_forward(h, fc_bias)
    if activation is not None:
        dproj_weight = matmul(dy.t(), activation)
    dproj_bias = column_sum(dy) if need_proj_bias else None
    return dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias
