"""The public GELU function."""

from torch import Tensor

from gpt2fast.backends import choose, least, native
from gpt2fast.ops.checks import check_floating, check_parameter
from gpt2fast.ops.gelu import autograd, reference
from gpt2fast.ops.registry import PYTORCH, apply, enter


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Tanh-GELU of x + bias: 0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), z = x + bias.

    Args:
        x: (..., C), float32, bfloat16 or float16; rows may be strided.
        bias: (C,) or None. May be float32 beside a half-precision x; it is added in fp32.

    Returns:
        A tensor of x's shape and dtype, computed in fp32.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units",
    https://arxiv.org/abs/1606.08415; GPT-2's form of it.

    >>> gpt2fast.functional.gelu(torch.tensor([[-1.0, 0.0, 1.0]]))
    tensor([[-0.1588,  0.0000,  0.8412]])
    """
    kernels = native()
    if kernels is not None:
        way = kernels.gelu_way(x, bias, least("gelu"))
        if way == PYTORCH:
            return reference.gelu(x, bias)
        if way:
            return enter(way, autograd.Gelu, x, bias, "cpu")
    check_floating("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have a last dimension of at least one, got shape {tuple(x.shape)}"
        )
    check_parameter("bias", bias, "x", x, (x.shape[-1],), "the last dimension of x")
    backend = choose(x, "gelu")
    if backend == "reference":
        return reference.gelu(x, bias)
    return apply(autograd.Gelu, x, bias, backend)
