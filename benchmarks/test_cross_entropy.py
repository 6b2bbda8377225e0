"""Cross-entropy over GPT-2's vocabulary, and the tied head fused with it."""

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
from gpt2fast.functional import cross_entropy, linear_cross_entropy

VOCABULARY, PADDED, WIDTH = pick((50257, 50304, 768), (50257, 50304, 768), (500, 512, 64))
ROWS = pick((256, 1024), (8192, 65536), (4,))
# On a GPU the logits are those of the padded head, whose rows are aligned.
COLUMNS = pick(VOCABULARY, PADDED, PADDED)


def eager_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def eager_head(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def loss_case(rows: int) -> Case:
    size = DTYPE.itemsize * rows * COLUMNS
    inputs = {"logits": randn(rows, COLUMNS), "targets": randint(VOCABULARY, rows)}
    return Case(
        "cross_entropy",
        f"[{rows}, {COLUMNS}] {DTYPE_NAME}",
        inputs,
        {
            "torch eager": eager_loss,
            "torch.compile": compiled(eager_loss),
            **ours(cross_entropy),
        },
        forward=(size, 0),
        backward=(2 * size, 0),
    )


def head_case(rows: int) -> Case:
    inputs = {
        "x": randn(rows, WIDTH),
        "weight": randn(PADDED, WIDTH, std=0.02),
        "targets": randint(VOCABULARY, rows),
    }
    flops = 2 * rows * WIDTH * PADDED
    weights = DTYPE.itemsize * PADDED * WIDTH
    return Case(
        "linear_cross_entropy",
        f"[{rows}, {WIDTH}] -> {PADDED} {DTYPE_NAME}",
        inputs,
        {
            "torch eager": eager_head,
            "torch.compile": compiled(eager_head),
            **ours(partial(linear_cross_entropy, vocab_size=VOCABULARY)),
        },
        forward=(weights, flops),
        backward=(2 * weights, 2 * flops),
    )


@cases(*(partial(loss_case, rows) for rows in ROWS))
def test_cross_entropy(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)


# Ours computes the gradients in the forward pass, so only the sum of both is a comparison.
@cases(*(partial(head_case, rows) for rows in ROWS), directions=("both",))
def test_linear_cross_entropy(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
