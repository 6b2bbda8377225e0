"""Shared fixtures: every backend and every instruction set that this machine runs, one by one.

Without a GPU the Triton kernels run in Triton's interpreter, and the CUDA kernels in an emulator, on
CPU tensors.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # several test processes share the CPUs
# Our products are proven within every op, also on CPUs where PyTorch's are taken.
os.environ.setdefault("GPT2FAST_CPU_MATMUL", "kernel")

import torch

if not torch.cuda.is_available():
    with suppress(ImportError):  # no Triton: its tests say so
        importlib.import_module("tests.triton_interpreter")

from gpt2fast import backends
from tests import cuda_emulator

#: Real text beside the checkout, where a machine has it; tests must pass without it.
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def runnable_isas() -> list[str]:
    try:
        return list(importlib.import_module("gpt2fast._cpu").runnable)
    except ImportError:
        return ["missing"]


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Within the block the CPU backend uses the kernels of one instruction set."""
    if name == "missing":
        pytest.fail(f"the C++ kernels are not built: {backends.status('cpu').detail}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2FAST_CPU_ISA", name)
        for cached in (backends.cpu_kernels, backends.tensor_kernels, backends.status):
            cached.cache_clear()
        yield
    for cached in (backends.cpu_kernels, backends.tensor_kernels, backends.status):
        cached.cache_clear()


@pytest.fixture(params=runnable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of the CPU backend once per instruction set."""
    with cpu_isa(request.param):
        yield request.param


OPS = Path(backends.__file__).with_name("ops")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the CUDA variants of tests of an op that has no CUDA kernels."""

    def wanted(item: pytest.Item) -> bool:
        variant = getattr(item, "callspec", None)
        if variant is None or variant.params.get("backend") != "cuda":
            return True
        return (OPS / item.path.stem.removeprefix("test_") / "cuda.py").exists()

    left_out = [item for item in items if not wanted(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in runnable_isas()), "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per backend; the CPU's once per instruction set."""
    name, _, isa = request.param.partition("-")
    if name == "cpu":
        with cpu_isa(isa):
            yield name
        return
    if name == "cuda" and not torch.cuda.is_available():
        cuda_emulator.load()
    if not (found := backends.status(name)).available:
        pytest.skip(found.detail)
    yield name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="module", autouse=True)
def _kernels_take_small_inputs() -> Iterator[None]:
    """Tests have small models and mean our kernels. Those of training run as users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "SMALL", {})
        yield
