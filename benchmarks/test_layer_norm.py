"""layer_norm and add_layer_norm at the width of GPT-2 124M."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, cases, compiled, cpu
from gpt2fast.functional import add_layer_norm, layer_norm

WIDTH = 768


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, bias)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, (WIDTH,), weight, bias)


def case(add: bool, rows: int) -> Case:
    eager: Callable[..., object] = eager_add if add else eager_norm
    ours: Callable[..., object] = add_layer_norm if add else layer_norm
    inputs = {
        "x": torch.randn(rows, WIDTH),
        "weight": torch.randn(WIDTH),
        "bias": torch.randn(WIDTH),
    }
    if add:
        inputs["residual"] = torch.randn(rows, WIDTH)
    size = 4 * rows * WIDTH
    return Case(
        "add_layer_norm" if add else "layer_norm",
        f"[{rows}, {WIDTH}] fp32",
        inputs,
        {"torch eager": eager, "torch.compile": compiled(eager), "gpt2fast cpu": cpu(ours)},
        forward=((4 if add else 2) * size, 0),
        backward=((4 if add else 3) * size, 0),
    )


@cases(*(partial(case, add, rows) for add in (False, True) for rows in (256, 1024)))
def test_layer_norm(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
