"""The kernel launches of GPT-2 on each GPU, for the ahead-of-time report: no GPU, no data.

A case calls a Triton backend as the op does, on meta tensors of GPT-2's sizes; what it would launch
is recorded (gpt2fast.ops.triton_common.recording).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2fast.backends import load

#: Every case by name.
CASES: dict[str, Callable[[], None]] = {}

BF16, FP32 = torch.bfloat16, torch.float32
BATCH, LENGTH = 64, 1024
ROWS = BATCH * LENGTH
WIDTHS = {"gpt2": 768, "gpt2-medium": 1024, "gpt2-large": 1280, "gpt2-xl": 1600}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a case."""

    def decorate(function: Callable[[], None]) -> Callable[[], None]:
        CASES[name] = function
        return function

    return decorate


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer_norm(width: int, x_dtype: torch.dtype) -> None:
    backend = load("layer_norm", "triton")
    x = empty(ROWS, width, dtype=x_dtype)
    weight, statistics = empty(width, dtype=FP32), empty(ROWS, dtype=FP32)
    backend.forward(x, None, weight, weight, 1e-5)
    backend.forward(x, x, weight, weight, 1e-5)
    backend.backward(x, None, x, weight, statistics, statistics, True, True)
    backend.backward(x, x, x, weight, statistics, statistics, True, True)


for _size, _width in WIDTHS.items():
    for _dtype in (BF16, FP32):
        case(f"layer_norm {_size} {str(_dtype).removeprefix('torch.')}")(
            lambda width=_width, dtype=_dtype: _layer_norm(width, dtype)
        )


def _attention(heads: int, size: int, dtype: torch.dtype = BF16, dropout_p: float = 0.0) -> None:
    backend = load("attention", "triton")
    qkv = empty(BATCH, LENGTH, 3, heads, size, dtype=dtype)
    q, k, v = qkv.unbind(2)
    seed = empty(dtype=torch.int64) if dropout_p else None
    options = (0, size**-0.5, dropout_p, seed)
    out, lse = backend.forward(q, k, v, *options)
    backend.backward(out, q, k, v, out, lse, *torch.empty_like(qkv).unbind(2), *options)


def _documents(heads: int, size: int) -> None:
    backend = load("attention", "triton")
    qkv = empty(ROWS, 3, heads, size)
    q, k, v = qkv.unbind(1)
    starts = empty(BATCH + 1, dtype=torch.int32)
    options = (starts, starts, LENGTH, LENGTH, True, size**-0.5, 0.0, None)
    out, lse = backend.varlen_forward(q, k, v, *options)
    backend.varlen_backward(out, q, k, v, out, lse, *torch.empty_like(qkv).unbind(1), *options)


case("attention gpt2 bfloat16")(lambda: _attention(12, 64))
case("attention gpt2-xl bfloat16")(lambda: _attention(25, 64))
case("attention gpt2 bfloat16 dropout")(lambda: _attention(12, 64, dropout_p=0.1))
case("attention gpt2 float32")(lambda: _attention(12, 64, FP32))
case("attention head size 80 bfloat16")(lambda: _attention(12, 80))
case("attention head size 128 bfloat16")(lambda: _attention(12, 128))
case("attention gpt2 documents bfloat16")(lambda: _documents(12, 64))
