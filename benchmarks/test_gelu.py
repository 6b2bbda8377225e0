"""gelu with bias, and the whole GELU-MLP, at the width of GPT-2 124M."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPE, DTYPE_NAME, Case, cases, compiled, ours, pick, randn
from gpt2fast.functional import gelu, gelu_mlp

WIDTH = pick(768, 768, 32)
ROWS = pick((256, 1024), (8192, 65536), (4,))


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def eager_mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    hidden = F.gelu(F.linear(x, fc_weight, fc_bias), approximate="tanh")
    return F.linear(hidden, proj_weight, proj_bias)


def gelu_case(rows: int) -> Case:
    size = DTYPE.itemsize * rows * 4 * WIDTH
    return Case(
        "gelu",
        f"[{rows}, {4 * WIDTH}] {DTYPE_NAME} + bias",
        {"x": randn(rows, 4 * WIDTH), "bias": randn(4 * WIDTH)},
        {
            "torch eager": eager_gelu,
            "torch.compile": compiled(eager_gelu),
            **ours(gelu),
        },
        forward=(2 * size, 0),
        backward=(3 * size, 0),
    )


def mlp_case(rows: int) -> Case:
    inputs = {
        "x": randn(rows, WIDTH),
        "fc_weight": randn(4 * WIDTH, WIDTH, std=0.02),
        "fc_bias": randn(4 * WIDTH),
        "proj_weight": randn(WIDTH, 4 * WIDTH, std=0.02),
        "proj_bias": randn(WIDTH),
    }
    weights, flops = DTYPE.itemsize * 8 * WIDTH**2, 16 * rows * WIDTH**2
    return Case(
        "gelu_mlp",
        f"[{rows}, {WIDTH}] {DTYPE_NAME}",
        inputs,
        {
            "torch eager": eager_mlp,
            "torch.compile": compiled(eager_mlp),
            **ours(gelu_mlp),
        },
        forward=(weights + DTYPE.itemsize * rows * 6 * WIDTH, flops),
        backward=(2 * weights + DTYPE.itemsize * rows * 7 * WIDTH, 2 * flops),
    )


@cases(
    *(partial(case, rows) for case in (gelu_case, mlp_case) for rows in ROWS),
)
def test_gelu(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
