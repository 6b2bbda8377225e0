"""The public linear function."""

import torch
from torch import Tensor

from gpt2fast.backends import choose, native
from gpt2fast.ops.linear import autograd, cpu, reference
from gpt2fast.ops.registry import PYTORCH, apply, enter


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear.

    On a CPU whose BLAS is slow for the few hundred rows of a training step there (see
    `gpt2fast info`), fp32 products are our own kernel's; all others are PyTorch's.

    Args:
        x: (..., C), floating point.
        weight: (D, C), of x's dtype and device.
        bias: (D,) or None.

    Returns:
        (..., D) of x's dtype (under autocast, of autocast's).

    Raises:
        RuntimeError: what PyTorch's own function raises: wrong shapes, dtypes or devices.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear.html.

    >>> gpt2fast.functional.linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4)).shape
    torch.Size([2, 4])
    """
    kernels = native()
    if kernels is not None:
        way = kernels.linear_way(x, weight, bias, cpu.preference(), cpu.WORK)
        if way == PYTORCH:
            return reference.linear(x, weight, bias)
        if way:
            return enter(way, autograd.Linear, x, weight, bias)
    if not _is_ours(x, weight, bias):
        return reference.linear(x, weight, bias)
    return apply(autograd.Linear, x, weight, bias)


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    given = [x, weight] if bias is None else [x, weight, bias]
    return suits(x.numel() // max(1, x.shape[-1]), x.numel() * weight.shape[0], *given)


def suits(rows: int, work: int, *given: Tensor) -> bool:
    """Whether a layer of `rows` rows and `work` multiplications may run on our products now."""
    return (
        cpu.serves(rows <= cpu.FEW_ACROSS, work, *given)
        and all(t.is_contiguous() for t in given)
        and not torch.is_autocast_enabled("cpu")
        and choose(given[0]) == "cpu"
    )
