"""The CUDA kernels on the CPU: csrc's .cu files, built with the emulator of csrc/testing, and loaded.

Objects are kept in build/emulated, named by what they are made of: a second run compiles nothing.
"""

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gpt2fast import backends

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulated"
COMMON = ["-std=c++17", "-fPIC", "-g", "-DGPT2FAST_EMULATED", f"-I{CSRC}", "-fno-strict-aliasing"]
#: The sanitizer's instrumentation without its library: loads and stores report to emulator.cpp. No
#: multiply-add is fused but by fmaf, as in the build (cmake/cuda.cmake).
KERNEL = ["-x", "c++", "-O1", "-fsanitize=thread", "-ffp-contract=off", "-w"]
FLAGS = {".cu": KERNEL, "emulator.cpp": ["-O2", "-Wall", "-Wextra"], "cuda.cpp": ["-O0", "-w"]}


def _object(compiler: str, source: Path, headers: str) -> Path:
    import pybind11

    flags = [*COMMON, *(FLAGS.get(source.name) or FLAGS[source.suffix])]
    if source.name == "cuda.cpp":
        flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    text = " ".join((compiler, *flags, headers)).encode() + source.read_bytes()
    made = BUILD / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.o"
    if not made.exists():
        part = made.with_suffix(".part")
        command = [compiler, *flags, "-c", source, "-o", part]
        subprocess.run(command, check=True, capture_output=True, text=True)
        for old in BUILD.glob(f"{source.stem}-*.o"):
            old.unlink()
        part.rename(made)
    return made


def build() -> Path:
    """The emulated extension module, built if anything has changed."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise backends.BackendUnavailable("the CUDA emulator is built with g++, which is not here")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # several test processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        texts = [p.read_bytes() for end in ("h", "inc") for p in sorted(CSRC.rglob(f"*.{end}"))]
        headers = hashlib.sha256(b"".join(texts)).hexdigest()
        sources = [*sorted(CSRC.rglob("*.cu")), CSRC / "testing/emulator.cpp"]
        sources.append(CSRC / "bindings/cuda.cpp")
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _object(compiler, source, headers), sources))
        key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
        library = BUILD / f"_cuda-{key}.so"
        if not library.exists():
            for old in BUILD.glob("_cuda-*.so"):
                old.unlink()
            link = [compiler, "-shared", "-Wl,-Bsymbolic", *objects, "-o", library, "-ldl"]
            subprocess.run(link, check=True)
    return library


@functools.cache
def _built() -> Path | str:
    try:
        return build()
    except subprocess.CalledProcessError as error:
        return f"the emulated CUDA kernels do not compile:\n{error.stderr}"


@functools.cache
def load() -> ModuleType:
    """Puts the emulated kernels in the place of gpt2fast._cuda for the rest of this process."""
    library = _built()
    if isinstance(library, str):
        raise RuntimeError(library)
    name = "gpt2fast._cuda"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    for cached in (backends.cuda_kernels, backends.status):
        cached.cache_clear()
    return module


@contextmanager
def threads_in_order(backwards: bool) -> Iterator[None]:
    """Within the block the emulator runs threads from the last to the first, or not; a GPU does as it
    likes."""
    kernels = backends.cuda_kernels()
    if not kernels.emulated:
        yield
        return
    kernels.options(reversed=backwards)
    try:
        yield
    finally:
        kernels.options()


def launches_on_hopper(op: str, monkeypatch: "pytest.MonkeyPatch") -> list[str]:
    """Sends an op to the CUDA kernels for Hopper, emulated or on one; lists what it launches.

    It has few blocks, so that each walks over several tiles. Skips where no kernel can run.
    """
    import pytest
    import torch

    if not torch.cuda.is_available():
        load()
    if not (found := backends.status("cuda")).available:
        pytest.skip(found.detail)
    module, launched = backends.load(op, "cuda"), list[str]()
    if torch.cuda.is_available():
        if not module.is_hopper(torch.empty(1, device="cuda")):
            pytest.skip("this GPU has no wgmma, or the kernels were not built for it")
    else:
        monkeypatch.setattr(module, "is_hopper", lambda _: True)
    monkeypatch.setattr(module, "processors_of", lambda _: 1)

    def launch(name: str, *arguments: object) -> None:
        launched.append(name)
        original(name, *arguments)

    original = module.launch
    monkeypatch.setattr(module, "launch", launch)
    return launched
