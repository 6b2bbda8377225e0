"""A whole transformer block as one op, in fp32 on a CPU: GPT-2 124M's, and one of a small model."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, DTYPE, DTYPE_NAME, Case, cases, compiled, ours, randn
from gpt2fast.ops.block import functional
from gpt2fast.ops.block.autograd import NAMES

if DEVICE.type != "cpu":
    pytest.skip("on a GPU it is the ops one by one", allow_module_level=True)

HEAD_SIZE = 64


def eager(x: Tensor, **given: Tensor) -> Tensor:
    batch, length, width = x.shape
    y = F.layer_norm(x, (width,), given["ln_1_weight"], given["ln_1_bias"])
    parts = F.linear(y, given["attn_weight"], given["attn_bias"]).split(width, dim=2)
    q, k, v = (part.view(batch, length, -1, HEAD_SIZE).transpose(1, 2) for part in parts)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = y.transpose(1, 2).reshape(x.shape)
    x = x + F.linear(y, given["proj_weight"], given["proj_bias"])
    y = F.layer_norm(x, (width,), given["ln_2_weight"], given["ln_2_bias"])
    y = F.gelu(F.linear(y, given["fc_weight"], given["fc_bias"]), approximate="tanh")
    return x + F.linear(y, given["out_weight"], given["out_bias"])


def together(x: Tensor, **given: Tensor) -> Tensor:
    parameters = [given[name] for name, _ in NAMES]
    found = functional.block(x, None, parameters, x.shape[2] // HEAD_SIZE)
    if found is None:
        pytest.skip("PyTorch's BLAS computes the products here: the ops run one by one")
    return found[0] + found[1]


def case(batch: int, length: int, width: int) -> Case:
    shapes = {
        "attn": (3 * width, width),
        "proj": (width, width),
        "fc": (4 * width, width),
        "out": (width, 4 * width),
    }
    inputs = {"x": randn(batch, length, width)}
    for name, _ in NAMES:
        layer, _, kind = name.rpartition("_")
        rows, columns = shapes.get(layer, (width, 0))
        matrix = columns and kind == "weight"
        inputs[name] = randn(rows, columns, std=0.02) if matrix else randn(rows)
    weights = DTYPE.itemsize * 12 * width**2
    activations = DTYPE.itemsize * batch * length * width
    flops = batch * length * (24 * width**2 + 2 * width * length)
    return Case(
        "block",
        f"B{batch} T{length} C{width} {DTYPE_NAME}",
        inputs,
        {"torch eager": eager, "torch.compile": compiled(eager), **ours(together)},
        forward=(weights + 13 * activations, flops),
        backward=(2 * weights + 26 * activations, 2 * flops),
    )


@cases(partial(case, 1, 64, 128), partial(case, 4, 64, 768), partial(case, 1, 1024, 768))
def test_block(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
