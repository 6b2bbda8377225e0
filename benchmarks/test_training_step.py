"""The whole training step of GPT-2: forward, backward, clipping, AdamW.

Each variant lives in a process of its own. On a CPU, in fp32, they step in turn; on a GPU, in bf16
autocast, one after another, since their memory would not fit beside each other. The floor is the time
of the step's matrix products (attention's causal half included) at the rate of torch.mm, or of our
kernel where that is faster, measured between the rounds; memory is the peak of the process.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.conftest import report_to
from benchmarks.harness import DTYPE_NAME, GPU, pick
from benchmarks.step_worker import VARIANTS
from gpt2fast import GPT, GPTConfig

#: (model, batch, length): rounds counted, after two that are not.
SHAPES: dict[tuple[str, int, int], int] = pick(
    {("gpt2", 4, 64): 9, ("gpt2", 4, 256): 5, ("gpt2", 1, 1024): 5},
    {("gpt2", 64, 1024): 12, ("gpt2-medium", 32, 1024): 8},
    {("nano", 1, 8): 1},
)
SIZES = {"gpt2": "124M", "gpt2-medium": "355M"}


class Worker:
    """A variant's process."""

    def __init__(self, variant: str, model: str, batch: int, length: int) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.step_worker",
                variant,
                model,
                str(batch),
                str(length),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("step", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with {self.process.wait()}: {self.process.args}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(
    model: str,
    batch: int,
    length: int,
    rounds: int,
    variants: Sequence[str] = VARIANTS,
    op: str = "training step of GPT-2",
) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Seconds and table numbers of every variant."""
    answers: dict[str, list[dict[str, float]]] = {}
    ceilings = []
    for together in [[variant] for variant in variants] if GPU else [variants]:
        workers = {variant: Worker(variant, model, batch, length) for variant in together}
        answers |= {variant: [] for variant in together}
        try:
            for _ in range(2 + rounds):
                ceilings.append(harness.ceilings())
                for variant, worker in workers.items():
                    answers[variant].append(worker.step())
        finally:
            for worker in workers.values():
                worker.close()
    first = [steps[0]["loss"] for steps in answers.values()]
    assert max(first) - min(first) < 0.2, f"the variants do not train the same model: {first}"
    with torch.device("meta"):
        flops = GPT(GPTConfig.from_name(model)).flops_per_token(length) * batch * length
    floor = flops / statistics.median(rate for _, rate in ceilings)
    results = {}
    for variant, steps in answers.items():
        seconds = [step["seconds"] for step in steps[2:]]
        median = statistics.median(seconds)
        results[variant] = (
            seconds,
            {
                "op": f"{op} {SIZES.get(model, model)}",
                "label": f"B{batch} T{length} {DTYPE_NAME}",
                "variant": variant,
                "direction": "step",
                "bytes": 0,
                "flops": flops,
                "tokens": batch * length,
                "gigaflops_per_second": flops / median / 1e9,
                "floor_seconds": floor,
                "fraction_of_roofline": floor / median,
                "peak_bytes": max(step["peak"] for step in steps),
            },
        )
    return results


Results = dict[tuple[str, int, int], dict[str, tuple[list[float], dict[str, Any]]]]


@pytest.fixture(scope="module")
def measured_steps() -> Results:
    return {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_training_step(
    benchmark: Any, measured_steps: Results, shape: tuple[str, int, int], variant: str
) -> None:
    if shape not in measured_steps:
        measured_steps[shape] = measure(*shape, SHAPES[shape])
    report_to(benchmark, *measured_steps[shape][variant])
