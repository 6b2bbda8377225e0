"""Whether a replacement computes what the original does: on a probe batch, outputs and gradients.

Two questions. Is it the same mathematics? Both run in fp64, where ours is the reference
implementation, and must agree to 1e-9 of the largest value: an erf-GELU, another epsilon, another
order of q, k and v stand out by many powers of ten. Is the kernel accurate? Both run in the module's
own dtype, and the kernel's error against the original in fp64 may be twice the original's, plus
three units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAME = 1e-9
ULPS = 3


def is_tanh_gelu(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether `function` is the tanh form of GELU, to 1e-9, over [-8, 8]."""
    x = torch.linspace(-8, 8, 201, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return False
    return bool((y - F.gelu(x, approximate="tanh")).abs().max() < SAME)
