"""The kernel launches of GPT-2, for the ahead-of-time report and for tuning.

A case calls a Triton backend as the op does, on meta tensors of GPT-2's sizes; what it would launch
is recorded (gpt2fast.ops.triton_common.recording). benchmarks/tune.py runs the same cases on a GPU.
"""

from collections.abc import Callable
from functools import partial

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


#: "meta" to record launches; benchmarks/tune.py sets a GPU to run them.
device = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor: without data, or on a GPU with random numbers."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "meta":
        return tensor
    return tensor.normal_() if dtype.is_floating_point else tensor.zero_()


def _layer_norm(width: int, x_dtype: torch.dtype) -> None:
    backend = load("layer_norm", "triton")
    x = empty(ROWS, width, dtype=x_dtype)
    weight, statistics = empty(width, dtype=FP32), empty(2, ROWS, dtype=FP32)
    backend.forward(x, None, weight, weight, 1e-5)
    backend.forward(x, x, weight, weight, 1e-5)
    backend.backward(x, None, x, weight, statistics, True, True)
    backend.backward(x, x, x, weight, statistics, True, True)


for _size, _width in WIDTHS.items():
    for _dtype in (BF16, FP32):
        case(f"layer_norm {_size} {str(_dtype).removeprefix('torch.')}")(
            lambda width=_width, dtype=_dtype: _layer_norm(width, dtype)
        )


def _gelu(dtype: torch.dtype) -> None:
    backend = load("gelu", "triton")
    x, bias = empty(ROWS, 3072, dtype=dtype), empty(3072, dtype=FP32)
    backend.forward(x, bias)
    backend.backward(x, x, bias, True, True)


for _dtype in (BF16, FP32):
    case(f"gelu gpt2 {str(_dtype).removeprefix('torch.')}")(lambda dtype=_dtype: _gelu(dtype))


def _gelu_mlp(width: int, dtype: torch.dtype) -> None:
    backend = load("gelu_mlp", "triton")
    x, h = empty(ROWS, width, dtype=dtype), empty(ROWS, 4 * width, dtype=dtype)
    fc_weight, proj_weight = (
        empty(*s, dtype=dtype) for s in ((4 * width, width), (width, 4 * width))
    )
    fc_bias, proj_bias = empty(4 * width, dtype=FP32), empty(width, dtype=FP32)
    backend.forward(x, fc_weight, fc_bias, proj_weight, proj_bias, True)
    backend.backward(x, x, h, fc_weight, fc_bias, proj_weight, [True] * 5)


for _size, _width in WIDTHS.items():
    case(f"gelu_mlp {_size} bfloat16")(lambda width=_width: _gelu_mlp(width, BF16))
for _dtype in (torch.float16, FP32):
    case(f"gelu_mlp gpt2 {str(_dtype).removeprefix('torch.')}")(
        lambda dtype=_dtype: _gelu_mlp(768, dtype)
    )


def _embedding(width: int, dtype: torch.dtype) -> None:
    backend = load("embedding", "triton")
    idx = empty(BATCH, LENGTH, dtype=torch.int64)
    wte, wpe = empty(50304, width, dtype=dtype), empty(LENGTH, width, dtype=dtype)
    backend.forward(idx, wte, wpe, 0)
    dy = empty(BATCH, LENGTH, width, dtype=dtype)
    backend.backward(dy, idx, 50304, LENGTH, 0, True, True)


for _size in ("gpt2", "gpt2-xl"):
    for _dtype in (BF16, FP32):
        case(f"embedding {_size} {str(_dtype).removeprefix('torch.')}")(
            lambda width=WIDTHS[_size], dtype=_dtype: _embedding(width, dtype)
        )


def _adamw(dtype: torch.dtype, masters: bool, capturable: bool, seeded: bool = False) -> None:
    backend = load("adamw", "triton")
    shapes = [(50304, 768), (1024, 768), (2304, 768), (2304,), (768,)]
    params = [empty(*shape, dtype=dtype) for shape in shapes]
    wide = [empty(*shape, dtype=FP32) for shape in shapes]
    scalar = empty(dtype=FP32)
    backend.global_norm(params)
    backend.adamw_(
        params,
        params,
        wide,
        wide,
        wide if masters else [],
        [scalar] * len(params) if capturable else [],
        scalar if capturable else None,
        scalar,
        empty(dtype=torch.int64) if seeded else None,
        *(7.0, 6e-4, 0.9, 0.95, 1e-8, 0.1),
    )


for _dtype, _masters in ((FP32, False), (BF16, False), (BF16, True)):
    for _capturable in (False, True):
        _name = f"adamw {str(_dtype).removeprefix('torch.')}"
        _name += " master" * _masters + " capturable" * _capturable
        case(_name)(lambda d=_dtype, m=_masters, c=_capturable: _adamw(d, m, c))
        if _dtype == BF16 and not _masters:
            _name += " stochastic"
            case(_name)(lambda c=_capturable: _adamw(BF16, False, c, True))


def _cross_entropy(dtype: torch.dtype, stride: int, features: float) -> None:
    backend = load("cross_entropy", "triton")
    logits = empty(ROWS, stride, dtype=dtype)[:, :50257]
    targets, statistics = empty(ROWS, dtype=torch.int64), empty(ROWS, 2, dtype=FP32)
    losses, count = empty(ROWS, dtype=FP32), empty(dtype=FP32)
    options = (-100, features, features)
    backend.forward(logits, targets, *options, "mean", 50257)
    backend.backward(count, logits, targets, statistics, logits, *options, "mean", 50257)
    fused = (logits, targets, losses, losses, statistics, count, *options, 50257, True)
    backend.forward_rows(*fused)
    if stride > 50257:  # the padded vocabulary, whose last columns are no classes
        padded = empty(ROWS, stride, dtype=dtype)
        backend.forward(padded, targets, *options, "mean", 50257)
        backend.backward(count, padded, targets, statistics, padded, *options, "mean", 50257)
        backend.forward_rows(padded, *fused[1:])


for _dtype in (BF16, FP32):
    for _stride in (50304, 50257):
        for _features in (0.0, 0.1):
            case(
                f"cross_entropy {_stride} {str(_dtype).removeprefix('torch.')}"
                + (" smoothing+z" if _features else "")
            )(partial(_cross_entropy, _dtype, _stride, _features))


def _linear_cross_entropy(width: int, dtype: torch.dtype) -> None:
    backend = load("linear_cross_entropy", "triton")
    x, weight = empty(ROWS, width, dtype=dtype), empty(50304, width, dtype=dtype)
    targets, statistics = empty(ROWS, dtype=torch.int64), empty(ROWS, 2, dtype=FP32)
    options = (-100, 0.0, 0.0, "mean", 50257, 512 << 20)
    backend.forward(x, weight, targets, *options, False, False)
    backend.forward(x, weight, targets, *options, True, True)
    backend.backward(empty(dtype=FP32), x, weight, targets, statistics, *options, True, True)
    backend.scale(empty(ROWS, width, dtype=FP32), empty(dtype=FP32))


for _size, _width in WIDTHS.items():
    for _dtype in (BF16, FP32) if _size == "gpt2" else (BF16,):
        case(f"linear_cross_entropy {_size} {str(_dtype).removeprefix('torch.')}")(
            partial(_linear_cross_entropy, _width, _dtype)
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
