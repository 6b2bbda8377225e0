"""Hands interleaved timings to pytest-benchmark and prints one table an op at the end."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, report
from gpt2fast import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep-memory",
        action="store_true",
        help="the C library keeps freed memory, so that no variant pays for fresh pages (CPU; not in"
        " whole training steps and decoding, whose processes have a setting of their own)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our tables follow, grouped by op
    if config.getoption("--keep-memory") and not backends.keep_freed_memory():
        raise pytest.UsageError("--keep-memory: this C library has no such setting")


#: Whole models beside other engines: minutes each, run where the command names the file.
ON_DEMAND = ("test_decode.py", "test_swap.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    name = collection_path.name
    return True if name in ON_DEMAND and not any(name in arg for arg in config.args) else None


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    kept = ", freed memory kept" if config.getoption("--keep-memory") else ""
    machine_info["backend"] = backends.status("cpu").detail + kept
    machine_info["platform"] = platform.platform()


class Replay:
    """A timer that repeats durations measured before.

    pytest-benchmark times one function at a time, which cannot be interleaved. The variants are
    timed by the harness; this hands the samples over, so that saving and comparing work as usual.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = iter(seconds)
        self.now = 0.0
        self.started = False

    def __call__(self) -> float:
        if self.started:
            self.now += next(self.seconds)
        self.started = not self.started
        return self.now


@pytest.fixture(scope="session")
def measured_cases() -> dict[object, dict[str, harness.Measured]]:
    return {}


@pytest.fixture
def bench(
    benchmark: Any, measured_cases: dict[object, dict[str, harness.Measured]]
) -> Callable[[Callable[[], harness.Case], str, str], None]:
    """bench(make, variant, direction) measures the case of make() once and reports one entry."""

    def run(make: Callable[[], harness.Case], variant: str, direction: str) -> None:
        if make not in measured_cases:
            torch.manual_seed(0)
            measured_cases[make] = harness.measure(make())
        if variant not in measured_cases[make]:
            pytest.skip(f"{variant} has no kernels for this op")
        measured = measured_cases[make][variant]
        numbers = {**measured.numbers(direction), "variant": variant}
        report_to(benchmark, measured.seconds[direction], numbers)

    return run


def report_to(benchmark: Any, seconds: list[float], numbers: dict[str, Any]) -> None:
    """Gives one variant's samples and its derived numbers to pytest-benchmark."""
    benchmark.group = f"{numbers['op']} {numbers['label']} {numbers['direction']}"
    benchmark.extra_info.update(numbers)
    benchmark._timer = Replay(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [
        {**bench.extra_info, "median": bench.stats.median}
        for bench in (session.benchmarks if session else [])
        if bench.extra_info.get("op") and bench.stats.rounds
    ]
    if rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.tables(rows))
