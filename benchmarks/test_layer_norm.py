"""layer_norm and add_layer_norm at the width of GPT-2 124M."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPE, DTYPE_NAME, Case, cases, compiled, pick, randn
from benchmarks.harness import ours as on_ours
from gpt2fast.functional import add_layer_norm, layer_norm

WIDTH = 768
ROWS = pick((256, 1024), (8192, 65536), (4,))


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, bias)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, (WIDTH,), weight, bias)


def case(add: bool, rows: int) -> Case:
    eager: Callable[..., object] = eager_add if add else eager_norm
    ours: Callable[..., object] = add_layer_norm if add else layer_norm
    inputs = {
        "x": randn(rows, WIDTH),
        "weight": randn(WIDTH),
        "bias": randn(WIDTH),
    }
    if add:
        inputs["residual"] = randn(rows, WIDTH)
    size = DTYPE.itemsize * rows * WIDTH
    return Case(
        "add_layer_norm" if add else "layer_norm",
        f"[{rows}, {WIDTH}] {DTYPE_NAME}",
        inputs,
        {"torch eager": eager, "torch.compile": compiled(eager), **on_ours(ours)},
        forward=((4 if add else 2) * size, 0),
        backward=((4 if add else 3) * size, 0),
    )


@cases(
    *(
        partial(case, add, rows)
        for add in (False, True)
        for rows in pick((256, 1024), (8192, 65536), (4,))
    )
)
def test_layer_norm(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
