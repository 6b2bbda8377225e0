"""gelu with bias, and the whole GELU-MLP, at the width of GPT-2 124M."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, cases, compiled, cpu
from gpt2fast.functional import gelu, gelu_mlp

WIDTH = 768


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def eager_mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    hidden = F.gelu(F.linear(x, fc_weight, fc_bias), approximate="tanh")
    return F.linear(hidden, proj_weight, proj_bias)


def gelu_case(rows: int) -> Case:
    size = 4 * rows * 4 * WIDTH
    return Case(
        "gelu",
        f"[{rows}, {4 * WIDTH}] fp32 + bias",
        {"x": torch.randn(rows, 4 * WIDTH), "bias": torch.randn(4 * WIDTH)},
        {
            "torch eager": eager_gelu,
            "torch.compile": compiled(eager_gelu),
            "gpt2fast cpu": cpu(gelu),
        },
        forward=(2 * size, 0),
        backward=(3 * size, 0),
    )


def mlp_case(rows: int) -> Case:
    inputs = {
        "x": torch.randn(rows, WIDTH),
        "fc_weight": 0.02 * torch.randn(4 * WIDTH, WIDTH),
        "fc_bias": torch.randn(4 * WIDTH),
        "proj_weight": 0.02 * torch.randn(WIDTH, 4 * WIDTH),
        "proj_bias": torch.randn(WIDTH),
    }
    weights, flops = 4 * 8 * WIDTH**2, 16 * rows * WIDTH**2
    return Case(
        "gelu_mlp",
        f"[{rows}, {WIDTH}] fp32",
        inputs,
        {
            "torch eager": eager_mlp,
            "torch.compile": compiled(eager_mlp),
            "gpt2fast cpu": cpu(gelu_mlp),
        },
        forward=(weights + 4 * rows * 6 * WIDTH, flops),
        backward=(2 * weights + 4 * rows * 7 * WIDTH, 2 * flops),
    )


@cases(
    *(partial(gelu_case, rows) for rows in (256, 1024)),
    *(partial(mlp_case, rows) for rows in (256, 1024)),
)
def test_gelu(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
