"""A training step of Hugging Face's GPT-2, as it is and after the one line that swaps our kernels in.

Forward with labels, backward, clipping, torch's fused AdamW on both sides, attention by sdpa.
Processes and rounds as in test_training_step.py.
"""

from typing import Any

import pytest

from benchmarks.conftest import report_to
from benchmarks.harness import pick
from benchmarks.step_worker import SWAP_VARIANTS
from benchmarks.test_training_step import Results, measure

#: (model, batch, length): rounds counted, after two that are not.
SHAPES: dict[tuple[str, int, int], int] = pick(
    {("gpt2", 4, 64): 7, ("gpt2", 4, 256): 5}, {("gpt2", 32, 1024): 12}, {("nano", 1, 8): 1}
)


@pytest.fixture(scope="module")
def measured() -> Results:
    return {}


@pytest.mark.parametrize("variant", SWAP_VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_hugging_face(
    benchmark: Any, measured: Results, shape: tuple[str, int, int], variant: str
) -> None:
    if shape not in measured:
        op = "training step of Hugging Face's GPT-2"
        measured[shape] = measure(*shape, SHAPES[shape], SWAP_VARIANTS, op)
    report_to(benchmark, *measured[shape][variant])
