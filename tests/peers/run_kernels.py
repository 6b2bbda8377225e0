"""Runs other packages' tests of the functions that gpt2fast.ecosystem names, on our functions.

    python -m tests.peers.run_kernels liger|flash_attn|quack|cut_cross_entropy CHECKOUT [options]

CHECKOUT is a clone of the package's repository; the package is not installed, nothing is copied here.
Its tests are written for a GPU: without one, what they make "on cuda" is made on the CPU. The names
are replaced by ours before a test file is imported. `--each N` takes N variants of every test
function at most, drawn evenly, since some have tens of thousands, `--largest N` none with a
number above N, and `--rows N` gives random matrices N rows at most; other options are pytest's. A
refusal ("is not supported by gpt2fast's ...") counts as skipped with its reason, and so does a
kernel of theirs that a test compares with and that needs a GPU; everything else that is not right
is a failure. Torch's losses and norms, which tests compare with,
are taken in fp64 on a CPU.

Seen on 22 November 2026 on a CPU (torch 2.13.0, AVX2). "Theirs" are kernels of the package itself
that a test compares with, or the package's own error texts.

- cut-cross-entropy at d42911f, 60 variants a function: 23 passed, 100 refused (bias, softcap,
  return_lse), none failed.
- Liger-Kernel at ead96b61, fused head and loss, all 141: 32 passed, 105 refused (bias, class weights,
  softcap, token scaling, accuracy, predicted tokens), 4 compare with theirs.
- Liger-Kernel, losses and layer norm, `--each 6 -k "test_layer_norm or (test_cross_entropy and not
  4096-32000 and not 1024-32000)"`: 47 passed, 22 skipped (class weights, accuracy, predicted tokens, or
  theirs), 1 failed (theirs: out of range targets must be an AssertionError, ours are an IndexError).
  Logits of 2048 x 32000 passed where an earlier run met them; 8192 x 32000 needs 10 GB: not run.
- flash-attn at 0251105a, tests/test_flash_attn.py with `--largest 260 --each 48` and 130 and 64: 170
  passed (head sizes 16 to 256, causal or not, packed, documents, caches, dropout with its mask, exact
  repeats), none failed; windows, ALiBi, softcap, fewer heads of k, paged caches and rotary are refused.
- flash-attn's losses, `--each 96 --rows 64 -k test_cross_entropy_loss`: 48 passed, 48 skipped
  (precomputed_lse, refused, or a pair its test leaves out), none failed. This run found that
  logit_scale rounded bf16 logits (mended).
- flash-attn's layer norm, `--each 2000 --largest 192 -k "test_layer_norm and not linear and
  -False-False-False]"`: all 240 variants of width 192 without x1, weight1 and RMS norm passed (with
  their dropout mask, rowscale, residuals, mixed dtypes), none failed; the others are refused. Of the
  widths 2048 to 4096, `--each 333` and the same: 32 passed, none failed. Of `--each 40` variants of
  all: 2 passed, 28 refused, 10 that its test leaves out.
- quack at c8ec317, `--each 4 --largest 1200`: 25 passed, 23 skipped (class weights, lse, its second way
  of the head), 1 failed (theirs: CPU tensors and 3-D inputs must raise its own texts).
"""

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gpt2fast.ecosystem import cut_cross_entropy, flash_attn, liger
from tests.peers import quack

#: The files of a package's tests, where its modules lie, and which names of which become ours.
PEERS: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "liger": (
        [
            f"test/transformers/test_{name}.py"
            for name in ("layer_norm", "cross_entropy", "fused_linear_cross_entropy")
        ],
        "src/liger_kernel",
        {
            "liger_kernel.transformers.functional": liger,
            "liger_kernel.transformers.layer_norm": liger,
            "liger_kernel.transformers.cross_entropy": liger,
            "liger_kernel.transformers.fused_linear_cross_entropy": liger,
        },
    ),
    "flash_attn": (
        [
            "tests/test_flash_attn.py",
            "tests/losses/test_cross_entropy.py",
            "tests/ops/triton/test_layer_norm.py",
        ],
        "flash_attn",
        {
            "flash_attn": flash_attn,
            "flash_attn.losses.cross_entropy": flash_attn,
            "flash_attn.ops.triton.layer_norm": flash_attn,
        },
    ),
    "cut_cross_entropy": (
        ["tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py"],
        "cut_cross_entropy",
        {"cut_cross_entropy": cut_cross_entropy},
    ),
    "quack": ([f"tests/test_{name}.py" for name in quack.FILES], "quack", {}),
}
#: Autograd functions that tests call directly.
FUNCTIONS = {
    "liger_kernel.ops": {
        "LigerLayerNormFunction": types.SimpleNamespace(apply=liger.liger_layer_norm)
    }
}


def no_rotary(*args: Any, **kwargs: Any) -> None:
    """flash-attn's tests make their yardstick by a kernel for GPUs before they ask for ours."""
    raise ValueError("rotary_cos is not supported by gpt2fast's flash_attn_with_kvcache")


#: Helpers of flash-attn's tests: our return_attn_probs are normalised already.
HELPERS = {
    "normalize_flash_attn_S": lambda probabilities, *args, **kwargs: probabilities,
    "apply_rotary_emb": no_rotary,
}
#: Modules of a package that only a GPU build has.
COMPILED = ("flash_attn_2_cuda",)
#: What Triton says where there is no GPU, when a test calls a kernel of its own package.
NO_GPU = ("libcuda.so cannot found", "0 active drivers")


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what a test wants on a GPU that is not there, and its yardsticks in fp64.

    Torch's own losses and norms on a CPU are too rough for these tests' tolerances, which were found
    on GPUs: in Liger's test of bf16 logits (1269, 32000) torch's gradient leaves the tolerance around
    fp64 at 2726 elements, with label smoothing at 3 million; in fp32 with label smoothing at 0.7
    million; ours at none.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        args = tuple(
            "cpu" if isinstance(a, (str, torch.device)) and "cuda" in str(a) else a for a in args
        )
        args = self.fewer_rows(function, args)
        if function in YARDSTICKS and args[0].device.type == "cpu":
            wide = [a.double() if is_floating(a) else a for a in args]
            named = {name: a.double() if is_floating(a) else a for name, a in kwargs.items()}
            return function(*wide, **named).to(args[0].dtype)
        return function(*args, **kwargs)

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def fewer_rows(self, function: Callable[..., Any], args: Any) -> Any:
        """Random logits, targets and permutations of their rows, with `rows` at most."""
        if function is torch.randn and len(args) == 2 and isinstance(args[0], int):
            return min(args[0], self.rows), args[1]
        if function is torch.randint and len(args) == 3 and len(args[2]) == 1:
            return *args[:2], (min(args[2][0], self.rows),)
        if function is torch.randperm:
            return (min(args[0], self.rows),)
        return args


#: What tests compare with, of torch.
YARDSTICKS = (F.cross_entropy, F.layer_norm)


def is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def pretend() -> None:
    """What tests ask of torch.cuda while they are collected."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: 0
    torch.compile = lambda f=None, **_: f or (lambda g: g)  # helpers of theirs that they compile
    autocast = torch.autocast
    torch.autocast = lambda device_type, **kwargs: autocast(
        device_type.replace("cuda", "cpu"), **kwargs
    )
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        total_memory=16 << 30, warp_size=32
    )


def put_ours(checkout: Path, name: str) -> None:
    """Imports the package's modules without its `__init__`, and sets our functions into them."""
    if name == "quack":
        quack.put()
        return
    _, where, modules = PEERS[name]
    package = types.ModuleType(Path(where).name)
    package.__path__ = [str(checkout / where)]
    sys.modules[package.__name__] = package
    for compiled in COMPILED:
        sys.modules[compiled] = types.ModuleType(compiled)
    for path, ours in modules.items():
        module = importlib.import_module(path)
        for public in ours.__all__:
            setattr(module, public, getattr(ours, public))
    for path, functions in FUNCTIONS.items():
        if path.startswith(f"{package.__name__}."):
            vars(importlib.import_module(path)).update(functions)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--each", type=int, default=1 << 30)
    parser.addoption("--largest", type=int, default=1 << 30)
    parser.addoption("--rows", type=int, default=1 << 30)


@pytest.hookimpl(hookwrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    """Draws the variants before there is an item for each: flash-attn has half a million."""
    vars(metafunc.module).update(
        {name: f for name, f in HELPERS.items() if hasattr(metafunc.module, name)}
    )
    yield
    each, largest = (metafunc.config.getoption(name) for name in ("--each", "--largest"))
    calls = [
        call
        for call in metafunc._calls
        if all(value <= largest for value in call.params.values() if isinstance(value, int))
    ] or metafunc._calls[:1]  # without one, pytest takes the function for one without variants
    # a step that shares no factor with the numbers of variants meets all values of each
    step = 7919
    metafunc._calls[:] = [calls[i * step % len(calls)] for i in range(min(each, len(calls)))]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with OnCpu(item.config.getoption("--rows")):
        outcome = yield
    error = outcome.excinfo and outcome.excinfo[1]
    if any(said in str(error) for said in NO_GPU):
        outcome.force_exception(pytest.skip.Exception("compares with a kernel that needs a GPU"))
    if isinstance(error, ValueError) and "is not supported by gpt2fast's" in str(error):
        outcome.force_exception(pytest.skip.Exception(f"refused: {error}"))


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in PEERS:
        raise SystemExit(__doc__)
    name, checkout = sys.argv[1], Path(sys.argv[2]).resolve()
    os.chdir(checkout)  # a repository's tests import their helpers from there
    sys.path.insert(0, str(checkout))
    if not torch.cuda.is_available():
        pretend()
    put_ours(checkout, name)  # before pytest starts: a conftest may import the package, too
    files = PEERS[name][0]
    options = [
        "-p",
        "no:cacheprovider",
        *(["--noconftest"] if name == "quack" else []),
        "--rootdir",
        str(checkout),
        "-q",
    ]
    options += sys.argv[3:]
    raise SystemExit(pytest.main([*files, *options], plugins=[sys.modules[__name__]]))


if __name__ == "__main__":
    main()
