"""The CUDA kernel launches of GPT-2, for the static report: backends called on tensors without data."""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2fast.backends import load

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 64 * 1024
WIDTHS = {"gpt2": 768, "gpt2-medium": 1024, "gpt2-large": 1280, "gpt2-xl": 1600}

#: Every case by name.
CASES: dict[str, Callable[[], None]] = {}


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_norm(width: int, dtype: torch.dtype) -> None:
    backend = load("layer_norm", "cuda")
    x, seed = empty(ROWS, width, dtype=dtype), empty(dtype=torch.int64)
    weight, statistics = empty(width, dtype=FP32), empty(2, ROWS, dtype=FP32)
    backend.forward(x, None, weight, weight, 1e-5)
    backend.forward(x, x, weight, weight, 1e-5, 0.1, seed)
    backend.backward(x, x, x, weight, statistics, True, True)
    backend.dropout(x, 0.1, seed)


def cross_entropy(columns: int, dtype: torch.dtype) -> None:
    backend = load("cross_entropy", "cuda")
    logits, targets = empty(ROWS, columns, dtype=dtype), empty(ROWS, dtype=torch.int64)
    losses, statistics = empty(ROWS, dtype=FP32), empty(ROWS, 2, dtype=FP32)
    count = backend.count_of(targets, -100, "mean")
    rest = (targets, losses, losses, statistics, count, -100, 0.0, 0.0, 50257)
    backend.forward_rows(logits, *rest, False)
    backend.forward_rows(logits, *rest, True)
    backend.backward_rows(losses, 0, logits, targets, statistics, count, logits, *rest[-4:])
    backend.reduced(losses, count, "mean")


def gelu(width: int, dtype: torch.dtype) -> None:
    backend = load("gelu", "cuda")
    x, bias = empty(ROWS, 4 * width, dtype=dtype), empty(4 * width, dtype=dtype)
    backend.forward(x, bias)
    backend.backward(x, x, bias, True, True)


def gelu_mlp(width: int, dtype: torch.dtype) -> None:
    backend = load("gelu_mlp", "cuda")
    x, h = empty(ROWS, width, dtype=dtype), empty(ROWS, 4 * width, dtype=dtype)
    fc_weight, proj_weight = (
        empty(*s, dtype=dtype) for s in ((4 * width, width), (width, 4 * width))
    )
    fc_bias, proj_bias = empty(4 * width, dtype=FP32), empty(width, dtype=FP32)
    for turn in (lambda t: t, lambda t: t.t().contiguous().t()):  # as nn.Linear, as Conv1D
        fc, proj = turn(fc_weight), turn(proj_weight)
        backend.forward(x, fc, fc_bias, proj, proj_bias, True)
        backend.backward(x, x, h, fc, fc_bias, proj, [True] * 5)


def linear_cross_entropy(width: int, dtype: torch.dtype) -> None:
    backend = load("linear_cross_entropy", "cuda")
    x, weight = empty(ROWS, width, dtype=dtype), empty(50304, width, dtype=dtype)
    targets, statistics = empty(ROWS, dtype=torch.int64), empty(ROWS, 2, dtype=FP32)
    options = (-100, 0.0, 0.0, "mean", 50257, 512 << 20)
    backend.forward(x, weight, targets, *options, False, False)
    backend.forward(x, weight, targets, *options, True, True)
    backend.backward(empty(dtype=FP32), x, weight, targets, statistics, *options, True, True)
    backend.scale(empty(ROWS, width, dtype=FP32), empty(dtype=FP32))


def embedding(width: int, dtype: torch.dtype) -> None:
    backend = load("embedding", "cuda")
    idx, dy = empty(64, 1024, dtype=torch.int64), empty(64, 1024, width, dtype=dtype)
    wte, wpe = empty(50304, width, dtype=dtype), empty(1024, width, dtype=dtype)
    backend.forward(idx, wte, wpe, 0)
    backend.backward(dy, idx, 50304, 1024, 0, True, True)


def adamw(width: int, dtype: torch.dtype) -> None:
    backend = load("adamw", "cuda")
    p, m, scalar = (
        empty(50304, width, dtype=dtype),
        empty(50304, width, dtype=FP32),
        empty(dtype=FP32),
    )
    masters = [] if dtype == FP32 else [m]
    betas = (0.9, 0.95, 1e-8, 0.1)
    seed = empty(dtype=torch.int64)
    for kept, word in ((masters, None), ([], None if dtype == FP32 else seed)):
        backend.adamw_([p], [p], [m], [m], kept, [scalar], None, scalar, word, 0.0, 1e-3, *betas)
    backend.global_norm([p])


HEADS = {"gpt2": 12, "gpt2-medium": 16, "gpt2-large": 20, "gpt2-xl": 25}


def attention(heads: int, dtype: torch.dtype, size: int = 64) -> None:
    """A batch with its packed qkv and the same as documents, each with dropout and without."""
    backend = load("attention", "cuda")
    qkv, seed = empty(64, 1024, 3, heads, size, dtype=dtype), empty(dtype=torch.int64)
    starts = empty(65, dtype=torch.int32)
    for dropout, word in ((0.0, None), (0.1, seed)):
        q, k, v = qkv.unbind(2)
        options = (0, 0.125, dropout, word)
        out, lse = backend.forward(q, k, v, *options)
        backend.backward(out, q, k, v, out, lse, q, k, v, *options)
        q, k, v = qkv.flatten(0, 1).unbind(1)
        longest = (starts, starts, 1024, 1024, True, 0.125, dropout, word)
        out, lse = backend.varlen_forward(q, k, v, *longest)
        backend.varlen_backward(out, q, k, v, out, lse, q, k, v, *longest)


for _dtype in (BF16, FP32):
    _name = str(_dtype).removeprefix("torch.")
    for _size, _width in WIDTHS.items():
        for _op in (layer_norm, gelu, gelu_mlp, linear_cross_entropy, embedding, adamw):
            CASES[f"{_op.__name__} {_size} {_name}"] = lambda op=_op, width=_width, dtype=_dtype: (
                op(width, dtype)
            )
    for _size, _heads in HEADS.items():
        CASES[f"attention {_size} {_name}"] = lambda heads=_heads, dtype=_dtype: attention(
            heads, dtype
        )
    for _columns in (50257, 50304):
        CASES[f"cross_entropy {_columns} {_name}"] = lambda columns=_columns, dtype=_dtype: (
            cross_entropy(columns, dtype)
        )
