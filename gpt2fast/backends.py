"""What can run here, why not, and which backend an op uses.

A backend is a set of kernels: ``reference`` (plain PyTorch), ``cpu`` (C++), ``triton``, ``cuda``; and
``cublaslt``, NVIDIA's library, for the GELU-MLP only and only where it was measured to win.
The choice is automatic by device, dtype and, on a GPU, op; :func:`use_backend` and the environment
variable ``GPT2FAST_BACKEND`` override it. Kernels load at first use, so that importing gpt2fast never
fails.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

__all__ = ["BackendUnavailable", "Status", "keep_freed_memory", "status", "use_backend"]

NAMES = ("reference", "cpu", "triton", "cuda", "cublaslt")
OPS = (
    "layer_norm",
    "gelu",
    "gelu_mlp",
    "attention",
    "cross_entropy",
    "linear_cross_entropy",
    "embedding",
    "adamw",
)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Elements of an op's fp32 input from which on a kernel of ours on a CPU is worth its call, which costs
#: more than that of PyTorch's own op (benchmarks/NOTES.md). Not in a graph, whose sizes may be symbols.
SMALL = {"layer_norm": 1 << 17, "gelu": 1 << 11}
#: Measurements of GPUs: which backend is the fastest for an op.
SELECTED = Path(__file__).parent / "ops" / "selected"


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_in_graphs(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, without importing the compiler for it: more than a
    second at every start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why.

    >>> try:
    ...     with gpt2fast.use_backend("cuda"):
    ...         pass
    ... except gpt2fast.BackendUnavailable as error:
    ...     reason = str(error)
    """


@dataclass(frozen=True)
class Status:
    """Whether a backend can run here: `detail` says what it is, or why not and what to do.

    >>> gpt2fast.backends.status("reference")
    Status(available=True, detail='PyTorch ...')
    """

    available: bool
    detail: str


def build_info() -> dict[str, Any]:
    """What the installation built and why parts are missing, as setup.py wrote it."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def _why_not_built(part: str) -> str:
    reported = build_info()["parts"].get(part, {})
    return reported.get(
        "reason", "gpt2fast was not installed by `pip install`, so nothing was built"
    )


def cpu_extension() -> Any:
    """The extension module of the C++ kernels, with one submodule for each instruction set.

    Raises:
        BackendUnavailable: it was not built or does not load.
    """
    try:
        return importlib.import_module("gpt2fast._cpu")
    except ImportError as error:
        built = build_info()["parts"].get("cpu", {}).get("built", False)
        why = f"it was built but does not load: {error}" if built else _why_not_built("cpu")
        raise BackendUnavailable(f"the C++ kernels are not there: {why}") from error


@functools.cache
def cpu_kernels() -> Any:
    """The C++ kernels of the best instruction set here, or of ``GPT2FAST_CPU_ISA``.

    Raises:
        BackendUnavailable: the extension was not built or this CPU lacks the instruction set.
    """
    extension = cpu_extension()
    isa = os.environ.get("GPT2FAST_CPU_ISA") or extension.runnable[-1]
    if isa not in extension.runnable:
        raise BackendUnavailable(
            f"GPT2FAST_CPU_ISA={isa}, but this CPU and build run {', '.join(extension.runnable)}"
        )
    return getattr(extension, isa)


@functools.cache
def tensor_kernels() -> Any | None:
    """The C++ kernels on PyTorch's tensors (csrc/bindings/tensors.h): one call of C++ for what takes
    many of Python. None where they cannot be: everything works without them."""
    interface = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if interface is None:
        return None
    try:
        kernels = cpu_kernels().tensors
    except BackendUnavailable:
        return None
    known = cpu_extension().connect(
        interface,
        (torch.Tensor, torch.nn.Parameter),
        (torch.empty_like, torch.get_num_threads, torch.is_grad_enabled, torch.layer_norm),
        (
            torch._C._are_functorch_transforms_active,
            torch._C._len_torch_dispatch_stack,
            torch._C._is_any_autocast_enabled,
            torch.autograd._profiler_enabled,
        ),
        torch.autograd.forward_ad,
    )
    return kernels if known else None


@functools.cache
def cuda_kernels() -> Any:
    """The CUDA kernels; `emulated` says whether they run on a CPU, as the tests do without a GPU.

    Raises:
        BackendUnavailable: the extension was not built or does not load.
    """
    try:
        return importlib.import_module("gpt2fast._cuda")
    except ImportError as error:
        built = build_info()["parts"].get("cuda", {}).get("built", False)
        why = f"they were built but do not load: {error}" if built else _why_not_built("cuda")
        raise BackendUnavailable(f"the CUDA kernels are not there: {why}") from error


@functools.cache
def cublaslt() -> ctypes.CDLL:
    """NVIDIA's cuBLASLt, which PyTorch's CUDA builds bring and load, found at run time.

    Raises:
        BackendUnavailable: it is not here, or is a version whose interface is not known.
    """
    torchs = (torch.version.cuda or "").partition(".")[0]
    for major in sorted(("13", "12"), key=lambda major: major != torchs):
        try:
            library = ctypes.CDLL(f"libcublasLt.so.{major}")
        except OSError:
            continue
        library.cublasLtGetVersion.restype = ctypes.c_size_t
        version = library.cublasLtGetVersion()
        if version // 10000 == int(major):
            return library
        raise BackendUnavailable(f"libcublasLt.so.{major} says that it is version {version}")
    raise BackendUnavailable(
        "neither libcublasLt.so.13 nor libcublasLt.so.12 is found: PyTorch's CUDA builds bring one"
    )


@functools.cache
def status(name: str) -> Status:
    """Whether backend `name` can run here, and why not.

    Args:
        name: one of "reference", "cpu", "triton", "cuda" and "cublaslt".

    Raises:
        ValueError: there is no such backend.

    >>> gpt2fast.backends.status("reference").available
    True
    """
    if name == "reference":
        return Status(True, f"PyTorch {torch.__version__}")
    if name == "cpu":
        try:
            isa = cpu_kernels().__name__.rpartition(".")[2]
        except BackendUnavailable as error:
            return Status(False, str(error))
        openmp = "OpenMP" if importlib.import_module("gpt2fast._cpu").openmp else "one thread only"
        return Status(True, f"C++ kernels, {isa}, {openmp}")
    if name == "triton":
        return _triton_status()
    if name == "cuda":
        return _cuda_status()
    if name == "cublaslt":
        try:
            version = cublaslt().cublasLtGetVersion()
        except BackendUnavailable as error:
            return Status(False, str(error))
        return _on_this_gpu(f"cuBLASLt {version}, for gelu_mlp only")
    raise ValueError(f"unknown backend {name!r}; known are {', '.join(NAMES)}")


def _cuda_status() -> Status:
    try:
        kernels = cuda_kernels()
    except BackendUnavailable as error:
        return Status(False, str(error))
    if kernels.emulated:
        return Status(True, "CUDA kernels, emulated on the CPU: for tests only")
    return _on_this_gpu(f"CUDA kernels for {kernels.archs}")


def _triton_status() -> Status:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Status(
            False, "triton is not installed: `pip install triton` (torch's CUDA wheels bring it)"
        )
    if interpreted():
        return Status(True, f"Triton {version}, interpreted on the CPU: for tests only")
    return _on_this_gpu(f"Triton {version}")


def _on_this_gpu(what: str) -> Status:
    if not torch.cuda.is_available():
        return Status(False, f"{what}: there, but PyTorch sees no NVIDIA GPU")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < (8, 0):
        return Status(
            False,
            f"{what}: compute capability 8.0 or later is needed, {name} has {capability}",
        )
    return Status(True, f"{what} on {name}")


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _checked(name: str) -> str:
    found = status(name)
    if not found.available:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {found.detail}")
    return name


# Process-wide, as torch.set_num_threads is. A plain global, so that torch.compile guards on it.
# The environment variable is checked at first use: import never fails.
_forced: str | None = os.environ.get("GPT2FAST_BACKEND") or None
_automatic: dict[tuple[str, str, int | None], str] = {}
_checked_names: set[str] = set()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every gpt2fast op within the block on backend `name` (None: automatic choice).

    The setting holds for the whole process. A graph compiled before is compiled again.

    Raises:
        ValueError: there is no such backend.
        BackendUnavailable: it cannot run here; the message says why.

    >>> import gpt2fast, torch
    >>> with gpt2fast.use_backend("reference"):
    ...     y = gpt2fast.functional.gelu(torch.zeros(2, 3))
    """
    global _forced
    if name is not None:
        _checked(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def gpu_file(index: int = 0) -> str:
    """The name of a file about the kind of GPU that number `index` is."""
    return torch.cuda.get_device_name(index).replace(" ", "-").lower() + ".json"


def size_class(elements: int) -> int:
    """The class of inputs with so many elements: a power of 16."""
    return elements.bit_length() // 4


@functools.cache
def selected() -> dict[str, dict[str, dict[str, str]]]:
    """By op and size class, the backend measured as the fastest on this kind of GPU, why, and where
    that was measured.

    benchmarks/select.py writes it; empty where this GPU was not measured: then Triton is the default.
    """
    if not torch.cuda.is_available():
        return {}
    path = SELECTED / gpu_file()
    return json.loads(path.read_text()) if path.exists() else {}


@constant_in_graphs
def _choose_for(device_type: str, op: str, size: int | None = None) -> str:
    """The backend for inputs of a size class; None: of the largest that was measured."""
    wanted = {"cpu": ["cpu"], "cuda": ["triton", "cuda"]}.get(device_type)
    if wanted is None:
        return "reference"
    if device_type == "cuda" and (measured := selected().get(op)):
        nearest = max(measured, key=int)
        if size is not None:
            nearest = min(measured, key=lambda other: abs(int(other) - size))
        wanted.insert(0, measured[nearest]["backend"])
    for name in wanted:
        if status(name).available:
            return name
    warnings.warn(
        "gpt2fast runs on the slow PyTorch reference: "
        f"{'; '.join(status(name).detail for name in wanted)}. "
        "`gpt2fast info` says what to install.",
        stacklevel=5,
    )
    return "reference"


@constant_in_graphs
def _check_constant(name: str) -> str:
    return _checked(name)


@constant_in_graphs
def _device_of(name: str) -> str:
    """The type of device that backend `name` runs on: a CPU for emulated GPU kernels."""
    on_gpu = (
        name == "cublaslt"
        or (name == "triton" and not interpreted())
        or (name == "cuda" and not cuda_kernels().emulated)
    )
    return "cuda" if on_gpu else "cpu"


def native() -> Any | None:
    """`tensor_kernels`, where the next call may run on them as far as its arguments allow."""
    if torch.compiler.is_compiling() or _forced not in (None, "cpu"):
        return None
    return tensor_kernels()


def least(op: str) -> int:
    """Elements of an op's fp32 input below which PyTorch's own op is taken on a CPU."""
    return SMALL.get(op, 0) if _forced is None else 0


def _is_small(tensor: torch.Tensor, op: str) -> bool:
    return tensor.dtype == torch.float32 and tensor.numel() < SMALL.get(op, 0)


def choose(tensor: torch.Tensor, op: str = "", native: bool = True) -> str:
    """The backend for `op` on its main input `tensor`; without `op` that of most.

    `native`: PyTorch has the op itself, for which SMALL inputs are left to it.

    Raises:
        BackendUnavailable: the forced backend cannot run here or not on this device.
        TypeError: the forced backend has no kernels for this dtype.
    """
    device, forced = tensor.device.type, _forced
    if forced is None:
        if tensor.dtype not in KERNEL_DTYPES:
            return "reference"
        if torch.compiler.is_compiling():  # a look at the cache would be a guard, which fails later
            return _choose_for(device, op)
        if native and device == "cpu" and _is_small(tensor, op):
            return "reference"
        key = device, op, size_class(tensor.numel()) if device == "cuda" else None
        if key not in _automatic:
            _automatic[key] = _choose_for(*key)
        return _automatic[key]
    if forced == "reference":
        return forced
    if torch.compiler.is_compiling():
        _check_constant(forced)
    elif forced not in _checked_names:
        _checked_names.add(_checked(forced))
    wanted = _device_of(forced)
    if device != wanted:
        raise BackendUnavailable(
            f"backend {forced!r} runs on {wanted} tensors, got one on {device}"
        )
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"backend {forced!r} has kernels for float32, bfloat16 and float16, not {tensor.dtype}"
        )
    return forced


@functools.cache
def load(op: str, backend: str) -> ModuleType:
    """The module gpt2fast.ops.<op>.<backend>.

    Raises:
        BackendUnavailable: the op has no kernels of this backend.
    """
    name = f"gpt2fast.ops.{op}.{backend}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # the op's room has it, and it fails
            raise
        raise BackendUnavailable(
            f"backend {backend!r} has no kernels for {op}; run it within"
            " `gpt2fast.use_backend(None)`, which chooses one that has"
        ) from error


def keep_freed_memory() -> bool:
    """Tells the C library to keep big freed blocks instead of faulting them in again every step.

    Speeds up eager training on a CPU at the cost of memory that is not given back to the system;
    holds for the whole process. Returns False where the C library has no such setting (not glibc)
    or the C++ extension is missing.

    >>> gpt2fast.keep_freed_memory() in (True, False)
    True
    """
    try:
        cpu_kernels()
    except BackendUnavailable:
        return False
    return importlib.import_module("gpt2fast._cpu").keep_freed_memory()
