"""``gpt2fast info``: what runs here, and what is missing."""

from __future__ import annotations

import argparse
import sys

HELP = "show what runs here, what does not, and why"


def configure(parser: argparse.ArgumentParser) -> None:
    """``gpt2fast info`` takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the state of the installation."""
    import torch

    from gpt2fast import backends

    _table("versions", _versions())
    _table(
        "machine",
        [
            ("system", _system()),
            ("CPU", _cpu_name()),
            ("vector code", torch.backends.cpu.get_cpu_capability() + " in PyTorch"),
            ("threads", f"{torch.get_num_threads()} of {_cpus()} CPUs"),
            ("fp32 products", _products()),
            ("GPU", _gpus()),
        ],
    )
    rows = []
    for name in backends.NAMES:
        found = backends.status(name)
        rows.append((name, ("yes  " if found.available else "no   ") + found.detail))
    _table("backends", rows)
    if torch.cuda.is_available():
        _table("chosen on this GPU", _chosen())
    if not backends.status("cpu").available:
        print(_remedy())
    parts = backends.build_info()["parts"]
    _table(
        "build",
        [
            (part, told["compiler"] if told.get("built") and "compiler" in told
             else "built" if told.get("built") else f"not built: {told.get('reason')}")
            for part, told in parts.items()
        ] or [("", "no record of a build")],
    )  # fmt: skip
    _table("tokenizers", [("char, byte", "yes"), ("gpt2", _gpt2_tokenizer())])
    return 0


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    print(title)
    width = max(14, *(len(name) for name, _ in rows))
    for name, value in rows:
        first, *more = value.splitlines() or [""]
        print(f"  {name:<{width}} {first}")
        for line in more:
            print(" " * (width + 3) + line)
    print()


def _versions() -> list[tuple[str, str]]:
    from importlib import metadata
    from platform import python_version

    from gpt2fast import __version__

    rows = [("gpt2fast", __version__), ("python", f"{python_version()}, {sys.executable}")]
    for package in (
        "torch",
        "numpy",
        "tiktoken",
        "pydantic",
        "safetensors",
        "huggingface_hub",
        "transformers",
    ):
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            needed = "" if package == "transformers" else ", but gpt2fast needs it"
            rows.append((package, f"not installed{needed}"))
    return rows


def _system() -> str:
    import platform

    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def _cpu_name() -> str:
    import platform
    from pathlib import Path

    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpus() -> int:
    import os

    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else "finds none"
        return f"none that PyTorch can use (it is {built})" if "built" in built else (
            "PyTorch finds none"
        )  # fmt: skip
    return "\n".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )


def _products() -> str:
    """Who multiplies matrices in fp32 on the CPU."""
    import torch

    from gpt2fast.ops.linear import cpu

    if cpu.preferred(torch.get_num_threads()):
        return "gpt2fast's kernel; PyTorch's BLAS where that is faster"
    return "PyTorch's BLAS"


def _chosen() -> list[tuple[str, str]]:
    """The backend of each op, and what that choice rests on."""
    import torch

    from gpt2fast import backends

    tensor, rows = torch.empty(0, device="cuda"), []
    for op in backends.OPS:
        found = backends.selected().get(op, {})
        for size in sorted(found, key=int):
            backend, why, measured = (found[size][key] for key in ("backend", "why", "measured"))
            rows.append((op, f"{backend:<9} at 16^{size} elements: {why} ({measured})"))
        if not found:
            rows.append((op, f"{backends.choose(tensor, op):<9} no measurement"))
    return rows


def _remedy() -> str:
    """How to get the C++ kernels."""
    from shutil import which

    compiler = any(which(name) for name in ("c++", "g++", "clang++"))
    lines = ["  To get the C++ kernels:"]
    if not compiler and sys.platform == "darwin":
        lines.append("    xcode-select --install")
    elif not compiler:
        lines.append("    apt install g++          (or your system's C++ compiler)")
    lines.append("    pip install -e .         (again, in the folder of gpt2fast)")
    return "\n".join(lines) + "\n"


def _gpt2_tokenizer() -> str:
    from gpt2fast.data import Gpt2Tokenizer, TokenizerUnavailable

    try:
        Gpt2Tokenizer().load()
    except TokenizerUnavailable as error:
        return f"no   {error}"
    return "yes"
