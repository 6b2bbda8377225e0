"""Token + position embedding of GPT-2 124M."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    DTYPE,
    DTYPE_NAME,
    Case,
    cases,
    compiled,
    ours,
    pick,
    randint,
    randn,
)
from gpt2fast.functional import embedding

PADDED, POSITIONS, WIDTH = 50304, 1024, 768


def eager(idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return F.embedding(idx, wte) + wpe[: idx.shape[1]]


def case(batch: int, length: int) -> Case:
    tokens = DTYPE.itemsize * batch * length * WIDTH
    tables = DTYPE.itemsize * (PADDED + POSITIONS) * WIDTH  # the dense gradients, written once
    return Case(
        "embedding",
        f"B{batch} T{length} V{PADDED} {DTYPE_NAME}",
        {
            "idx": randint(50257, batch, length),
            "wte": randn(PADDED, WIDTH),
            "wpe": randn(POSITIONS, WIDTH),
        },
        {"torch eager": eager, "torch.compile": compiled(eager), **ours(embedding)},
        forward=(2 * tokens, 0),
        backward=(2 * tokens + tables, 0),
    )


@cases(*(partial(case, *shape) for shape in pick(((4, 64), (4, 256)), ((64, 1024),), ((2, 8),))))
def test_embedding(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
