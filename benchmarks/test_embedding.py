"""Token + position embedding of GPT-2 124M."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, cases, compiled, cpu
from gpt2fast.functional import embedding

PADDED, POSITIONS, WIDTH = 50304, 1024, 768


def eager(idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return F.embedding(idx, wte) + wpe[: idx.shape[1]]


def case(batch: int, length: int) -> Case:
    tokens = 4 * batch * length * WIDTH
    tables = 4 * (PADDED + POSITIONS) * WIDTH  # the dense gradients, written once
    return Case(
        "embedding",
        f"B{batch} T{length} V{PADDED} fp32",
        {
            "idx": torch.randint(50257, (batch, length)),
            "wte": torch.randn(PADDED, WIDTH),
            "wpe": torch.randn(POSITIONS, WIDTH),
        },
        {"torch eager": eager, "torch.compile": compiled(eager), "gpt2fast cpu": cpu(embedding)},
        forward=(2 * tokens, 0),
        backward=(2 * tokens + tables, 0),
    )


@cases(partial(case, 4, 64), partial(case, 4, 256))
def test_embedding(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
