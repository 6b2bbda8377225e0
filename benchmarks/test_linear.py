"""A linear layer at the width of GPT-2 124M: c_attn, whose weight is (3 C, C), in fp32 on a CPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F

from benchmarks.harness import DEVICE, DTYPE, DTYPE_NAME, Case, cases, compiled, ours, pick, randn
from gpt2fast.functional import linear

if DEVICE.type != "cpu":
    pytest.skip("on a GPU it is PyTorch's", allow_module_level=True)

WIDTH = pick(768, 768, 32)
ROWS = pick((256, 1024), (256,), (4,))


def case(rows: int) -> Case:
    weight, activations = DTYPE.itemsize * 3 * WIDTH**2, DTYPE.itemsize * rows * 4 * WIDTH
    flops = 6 * rows * WIDTH**2
    inputs = {
        "x": randn(rows, WIDTH),
        "weight": randn(3 * WIDTH, WIDTH, std=0.02),
        "bias": randn(3 * WIDTH),
    }
    return Case(
        "linear",
        f"[{rows}, {WIDTH}] {DTYPE_NAME}",
        inputs,
        {"torch eager": F.linear, "torch.compile": compiled(F.linear), **ours(linear)},
        forward=(weight + activations, flops),
        backward=(2 * weight + 2 * activations, 2 * flops),
    )


@cases(*(partial(case, rows) for rows in ROWS))
def test_linear(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
