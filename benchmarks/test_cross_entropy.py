"""Cross-entropy over GPT-2's vocabulary, and the tied head fused with it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, cases, compiled, cpu
from gpt2fast.functional import cross_entropy, linear_cross_entropy

VOCABULARY, PADDED, WIDTH = 50257, 50304, 768


def eager_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def eager_head(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def loss_case(rows: int) -> Case:
    size = 4 * rows * VOCABULARY
    inputs = {
        "logits": torch.randn(rows, VOCABULARY),
        "targets": torch.randint(VOCABULARY, (rows,)),
    }
    return Case(
        "cross_entropy",
        f"[{rows}, {VOCABULARY}] fp32",
        inputs,
        {
            "torch eager": eager_loss,
            "torch.compile": compiled(eager_loss),
            "gpt2fast cpu": cpu(cross_entropy),
        },
        forward=(size, 0),
        backward=(2 * size, 0),
    )


def head_case(rows: int) -> Case:
    inputs = {
        "x": torch.randn(rows, WIDTH),
        "weight": 0.02 * torch.randn(PADDED, WIDTH),
        "targets": torch.randint(VOCABULARY, (rows,)),
    }
    flops = 2 * rows * WIDTH * PADDED
    weights = 4 * PADDED * WIDTH
    return Case(
        "linear_cross_entropy",
        f"[{rows}, {WIDTH}] -> {PADDED} fp32",
        inputs,
        {
            "torch eager": eager_head,
            "torch.compile": compiled(eager_head),
            "gpt2fast cpu": cpu(partial(linear_cross_entropy, vocab_size=VOCABULARY)),
        },
        forward=(weights, flops),
        backward=(2 * weights, 2 * flops),
    )


@cases(*(partial(loss_case, rows) for rows in (256, 1024)))
def test_cross_entropy(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)


# Ours computes the gradients in the forward pass, so only the sum of both is a comparison.
@cases(*(partial(head_case, rows) for rows in (256, 1024)), directions=("both",))
def test_linear_cross_entropy(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
