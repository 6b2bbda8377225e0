"""GELU in plain PyTorch: the specification, differentiated by PyTorch."""

import torch
from torch import Tensor


def gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) with z = x + bias."""
    if bias is not None:
        x = x + (bias if bias.dtype == x.dtype else bias.to(x.dtype))
    return torch.nn.functional.gelu(x, approximate="tanh")
