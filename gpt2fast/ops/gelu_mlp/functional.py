"""The public GELU-MLP function."""

import torch
from torch import Tensor

from gpt2fast.backends import choose, native
from gpt2fast.ops.checks import (
    autocast,
    check_floating,
    check_parameter,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from gpt2fast.ops.gelu_mlp import autograd, reference
from gpt2fast.ops.linear.cpu import preference
from gpt2fast.ops.registry import WITHOUT_GRADIENT, apply, enter


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
) -> Tensor:
    """GPT-2's MLP: gelu(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias, with the tanh-GELU.

    Args:
        x: (..., C), float32, bfloat16 or float16. Under autocast, fp32 x and weights are cast to
            autocast's dtype, as by nn.Linear.
        fc_weight: (H, C), the layout of nn.Linear; of x's dtype. GPT-2 has H = 4 C.
        fc_bias: (H,) or None. May be float32 beside half-precision weights.
        proj_weight: (D, H), of x's dtype. GPT-2 has D = C.
        proj_bias: (D,) or None. May be float32 beside half-precision weights.

    Returns:
        (..., D) of x's dtype (under autocast, of autocast's).

    For the backward, x and x @ fc_weight.T are kept; the activation is computed again.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2).

    >>> x, fc, proj = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randn(8, 32)
    >>> gpt2fast.functional.gelu_mlp(x, fc, torch.zeros(32), proj, None).shape
    torch.Size([2, 5, 8])
    """
    inputs = (x, fc_weight, fc_bias, proj_weight, proj_bias)
    kernels = native()
    if kernels is not None and (way := kernels.gelu_mlp_way(*inputs, preference())):
        if way == WITHOUT_GRADIENT:
            return kernels.gelu_mlp_forward(*inputs, False)[0]
        return enter(way, autograd.GeluMlp, *inputs, "cpu")
    check_floating("x", x)
    check_floating("fc_weight", fc_weight)
    check_floating("proj_weight", proj_weight)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have a last dimension of at least one, got shape {tuple(x.shape)}"
        )
    for name, weight in (("fc_weight", fc_weight), ("proj_weight", proj_weight)):
        if weight.dim() != 2 or weight.shape[0] == 0:
            raise ValueError(
                f"{name} must have shape (out, in) with out of at least one,"
                f" got {tuple(weight.shape)}"
            )
        check_same_device(name, weight, "x", x)
    hidden, out = fc_weight.shape[0], proj_weight.shape[0]
    check_shape("fc_weight", fc_weight, (hidden, x.shape[-1]), "(H, the last dimension of x)")
    check_shape("proj_weight", proj_weight, (out, hidden), "(D, the first dimension of fc_weight)")
    check_parameter("fc_bias", fc_bias, "x", x, (hidden,), "the first dimension of fc_weight")
    check_parameter("proj_bias", proj_bias, "x", x, (out,), "the first dimension of proj_weight")
    x, fc_weight, proj_weight = (t for t in autocast(x, fc_weight, proj_weight) if t is not None)
    check_same_dtype("fc_weight", fc_weight, "x", x)
    check_same_dtype("proj_weight", proj_weight, "x", x)
    backend = choose(x, "gelu_mlp")
    if backend == "reference":
        return reference.gelu_mlp(x, fc_weight, fc_bias, proj_weight, proj_bias)
    inputs = (x, fc_weight, fc_bias, proj_weight, proj_bias)
    if torch.is_grad_enabled():
        return apply(autograd.GeluMlp, *inputs, backend)
    return autograd.gelu_mlp_forward(*inputs, False, backend)[0]
