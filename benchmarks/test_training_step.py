"""The whole training step of GPT-2 124M in fp32: forward, backward, clipping, AdamW.

Each variant lives in a process of its own and steps in turn with the others. The floor is the time
of the step's matrix products (attention's causal half included) at the rate of torch.mm measured
between the rounds; memory is the peak of the whole process.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.conftest import report_to
from benchmarks.step_worker import VARIANTS
from gpt2fast import GPT, GPTConfig

MODEL = "gpt2"
SHAPES = {(4, 64): 9, (4, 256): 5}  # (batch, length): rounds counted, after two that are not


class Worker:
    """A variant's process."""

    def __init__(self, variant: str, batch: int, length: int) -> None:
        self.variant = variant
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.step_worker",
                variant,
                MODEL,
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
            raise RuntimeError(f"the {self.variant} process ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(batch: int, length: int, rounds: int) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Seconds and table numbers of every variant."""
    workers = [Worker(variant, batch, length) for variant in VARIANTS]
    try:
        warm = [[worker.step() for worker in workers] for _ in range(2)]
        answers: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        ceilings = []
        for _ in range(rounds):
            ceilings.append(harness.ceilings())
            for worker in workers:
                answers[worker.variant].append(worker.step())
    finally:
        for worker in workers:
            worker.close()
    first = [answer["loss"] for answer in warm[0]]
    assert max(first) - min(first) < 0.2, f"the variants do not train the same model: {first}"
    with torch.device("meta"):
        flops = GPT(GPTConfig.from_name(MODEL)).flops_per_token(length) * batch * length
    floor = flops / statistics.median(rate for _, rate in ceilings)
    results = {}
    for variant, steps in answers.items():
        seconds = [step["seconds"] for step in steps]
        median = statistics.median(seconds)
        results[variant] = (
            seconds,
            {
                "op": "training step of GPT-2 124M",
                "label": f"B{batch} T{length} fp32",
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


@pytest.fixture(scope="module")
def measured_steps() -> dict[tuple[int, int], dict[str, tuple[list[float], dict[str, Any]]]]:
    return {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"B{shape[0]}-T{shape[1]}")
def test_training_step(
    benchmark: Any,
    measured_steps: dict[tuple[int, int], dict[str, tuple[list[float], dict[str, Any]]]],
    shape: tuple[int, int],
    variant: str,
) -> None:
    if shape not in measured_steps:
        measured_steps[shape] = measure(*shape, SHAPES[shape])
    report_to(benchmark, *measured_steps[shape][variant])
