"""Decoding with a key/value cache, GPT-2 124M: tokens a second beside torch and other engines.

Each variant lives in a process of its own; they run in turn. A round's time is that of 1 + NEW tokens
less that of 1, so without the prompt. The floor is the time to read the weights' bytes at the bandwidth
of torch.sum measured between the rounds. Engines come with `pip install "gpt2fast[peers]"`;
llama.cpp, which pip compiles, with `pip install gguf llama-cpp-python`. Its 16 bits are F16, and its
8 bits Q8_0, with a scale for each 32 weights.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from benchmarks.conftest import report_to
from benchmarks.decode_worker import POSITIONS, PROMPT
from benchmarks.harness import GPU

#: Bytes of a weight, and who decodes with such weights: the packages that they need.
VARIANTS = {
    "float32": (4, {"torch eager": "torch", "torch.compile": "torch", "transformers": "transformers",
                    "ctranslate2": "ctranslate2", "llama.cpp": "llama_cpp", "gpt2fast": "torch"}),
    "bfloat16": (2, {"llama.cpp": "llama_cpp", "gpt2fast": "torch"}),
    "int8": (1, {"ctranslate2": "ctranslate2", "llama.cpp": "llama_cpp", "gpt2fast": "torch"}),
}  # fmt: skip
CASES = [(name, weights) for weights, (_, names) in VARIANTS.items() for name in names]
NEW, ROUNDS = POSITIONS - PROMPT, 5
WEIGHTS = 124_439_808

pytestmark = pytest.mark.skipif(GPU, reason="the decoder is for CPUs")


class Worker:
    """A variant's process."""

    def __init__(self, name: str, weights: str, batch: int) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.decode_worker",
            f"{name} {weights}",
            str(batch),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, count: int) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(count, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with {self.process.wait()}: {self.process.args}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def bandwidth(data: torch.Tensor) -> float:
    """Bytes a second that torch.sum reads, the best of five: it is a ceiling."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    return data.nbytes / min(seconds)


def installed(name: str, weights: str) -> bool:
    return importlib.util.find_spec(VARIANTS[weights][1][name]) is not None


Results = dict[tuple[str, str], tuple[list[float], dict[str, Any]]]


def measure(batch: int) -> Results:
    """Seconds of NEW steps and table numbers of every variant that is installed."""
    here = [case for case in CASES if installed(*case)]
    data = torch.ones(128 << 20)
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in here}
    peaks = {}
    rates = []
    workers = {}
    try:
        for case in here:
            workers[case] = Worker(*case, batch)
            workers[case].run(2)
        for _ in range(ROUNDS if batch < 64 else 2):  # minutes each
            rates.append(bandwidth(data))
            for case, worker in workers.items():
                first = worker.run(1)["seconds"]
                answer = worker.run(1 + NEW)
                seconds[case].append(answer["seconds"] - first)
                peaks[case] = answer["peak"]
    finally:
        for worker in workers.values():
            worker.close()
    read = statistics.median(rates)
    results = {}
    for (name, weights), times in seconds.items():
        moved = VARIANTS[weights][0] * WEIGHTS
        median, floor = statistics.median(times), NEW * moved / read
        results[name, weights] = (
            times,
            {
                "op": f"decoding GPT-2 124M, {weights} weights",
                "label": f"B{batch}, {read / 1e9:.1f} GB/s",
                "variant": name,
                "direction": f"{NEW} tokens",
                "bytes": NEW * moved,
                "flops": 2.0 * NEW * batch * WEIGHTS,
                "tokens": NEW * batch,
                "compute_bound": False,
                "gigabytes_per_second": NEW * moved / median / 1e9,
                "gigaflops_per_second": 2.0 * NEW * batch * WEIGHTS / median / 1e9,
                "floor_seconds": floor,
                "fraction_of_roofline": floor / median,
                "peak_bytes": peaks[name, weights],
            },
        )
    return results


@pytest.fixture(scope="module")
def measured_batches() -> dict[int, Results]:
    return {}


@pytest.mark.parametrize(("name", "weights"), CASES)
@pytest.mark.parametrize("batch", [1, 4, 8, 16, 64])
def test_decode(
    benchmark: Any, measured_batches: dict[int, Results], batch: int, name: str, weights: str
) -> None:
    if not installed(name, weights):
        pytest.skip(f'{name} is not installed: pip install "gpt2fast[peers]"')
    if batch not in measured_batches:
        measured_batches[batch] = measure(batch)
    report_to(benchmark, *measured_batches[batch][name, weights])
