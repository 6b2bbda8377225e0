"""Shared fixtures; the instruction sets that this machine runs are tested one by one."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # several test processes share the CPUs

import torch

from gpt2fast import backends

#: Real text beside the checkout, where a machine has it; tests must pass without it.
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def runnable_isas() -> list[str]:
    try:
        return list(importlib.import_module("gpt2fast._cpu").runnable)
    except ImportError:
        return ["missing"]


@pytest.fixture(params=runnable_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once per instruction set of the CPU backend."""
    if request.param == "missing":
        pytest.fail(f"the C++ kernels are not built: {backends.status('cpu').detail}")
    monkeypatch.setenv("GPT2FAST_CPU_ISA", request.param)
    for cached in (backends.cpu_kernels, backends.status):
        cached.cache_clear()
    yield request.param
    monkeypatch.undo()
    for cached in (backends.cpu_kernels, backends.status):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
