"""What the Triton backends share: how a kernel is launched, configured, tuned; device functions.

Kernels run in one of three ways. On a GPU they are compiled at first use. With ``TRITON_INTERPRET=1``
they run on CPU tensors, as the tests do on a machine without a GPU. Within :func:`recording` they do
not run: what would be launched is listed, for ahead-of-time compilation (benchmarks/triton_report.py).
"""

import dataclasses
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.backends import gpu_file, interpreted

INTERPRETED = interpreted()


@dataclasses.dataclass(frozen=True)
class Target:
    """The GPU that a configuration is for."""

    arch: int  # compute capability: 80, 90, 100
    processors: int  # streaming multiprocessors
    shared: int  # bytes of shared memory that a program may use


#: A100, H100 and H200, B200.
A100 = Target(80, 108, 163 << 10)
H100 = Target(90, 132, 227 << 10)
B200 = Target(100, 148, 227 << 10)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_recorded: list[Launch] | None = None
_forced_target: Target | None = None


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Within the block kernels are configured for `target` and listed instead of launched."""
    global _recorded, _forced_target
    before = _recorded, _forced_target
    launches: list[Launch] = []
    _recorded, _forced_target = launches, target
    try:
        yield launches
    finally:
        _recorded, _forced_target = before


@functools.cache
def _device_target(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    shared = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Target(10 * found.major + found.minor, found.multi_processor_count, shared)


def target_of(tensor: Tensor) -> Target:
    """The GPU that holds `tensor`; a small one of Hopper's kind in the interpreter."""
    if _forced_target is not None:
        return _forced_target
    if INTERPRETED:
        return dataclasses.replace(H100, processors=3)  # few, so that persistent loops do loop
    return _device_target(tensor.device.index)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Runs `kernel` over `grid` on the device of its first tensor; an empty grid does nothing.

    `constants` are the kernel's constexpr parameters, which come after the others.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants, warps, stages))
        return
    options = {} if INTERPRETED else compile_options(warps, stages)
    tensors = (getattr(a, "base", a) for a in arguments)  # a descriptor's base is its tensor
    index = next(t for t in tensors if isinstance(t, Tensor)).device.index
    if INTERPRETED or index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants, **options)
    else:
        with torch.cuda.device(index):
            kernel[grid](*arguments, **constants, **options)


def compile_options(warps: int, stages: int) -> dict[str, Any]:
    """What Triton's compiler is told; a * b + c is rounded once, as later versions no longer do
    unasked."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: tf32 for fp32 only where PyTorch was told to allow it."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


# ---- tuning ----------------------------------------------------------------------------------------

Config = TypeVar("Config")


SHIPPED = Path(__file__).with_name("tuned")


def cache_path(index: int) -> Path:
    """Where tuned configurations of GPU `index` are kept; SHIPPED has a file of the same name where
    this version brings some."""
    folder = os.environ.get("GPT2FAST_CACHE_DIR") or Path.home() / ".cache" / "gpt2fast"
    return Path(folder) / gpu_file(index)


@functools.cache
def _table(index: int) -> dict[str, Any]:
    path = cache_path(index)
    table: dict[str, Any] = {}
    for file in (SHIPPED / path.name, path):
        if file.exists():
            try:
                table |= json.loads(file.read_text())
            except ValueError as error:
                warnings.warn(f"{file} is left out, it is damaged: {error}", stacklevel=2)
    return table


def tuned(
    op: str,
    key: tuple[Any, ...],
    tensor: Tensor,
    rule: Config,
    candidates: list[Config],
    run: Callable[[Config], None],
) -> Config:
    """The configuration of `op` at shape and dtype `key`: the analytic `rule`'s, or a measured one.

    With ``GPT2FAST_AUTOTUNE=1``, `run` is timed once per key over `rule` and the `candidates` that
    compile; the best is kept on disk (``GPT2FAST_CACHE_DIR``, default ~/.cache/gpt2fast) and used
    from then on. Without it nothing is timed: what is on disk serves, else the rule.
    Configurations are dataclasses; an entry with other fields, of another version, counts as none.
    `run` may be called many times and must not change its inputs.
    """
    if INTERPRETED or _recorded is not None:
        return rule
    index = tensor.device.index
    table, name = _table(index), f"{op} {' '.join(str(k) for k in key)}"
    kept = table.get(name, {}).get("config", {})
    if kept and kept.keys() <= dataclasses.asdict(rule).keys():  # type: ignore[call-overload]
        return dataclasses.replace(rule, **kept)  # type: ignore[type-var]
    if os.environ.get("GPT2FAST_AUTOTUNE") != "1" or torch.cuda.is_current_stream_capturing():
        return rule
    times = {config: _milliseconds(run, config) for config in (rule, *candidates)}
    best = min(times, key=times.__getitem__)
    table[name] = {
        "config": dataclasses.asdict(best),  # type: ignore[call-overload]
        "milliseconds": times[best],
        "by the rule": times[rule],
    }
    try:
        _save(cache_path(index), table)
    except OSError as error:
        warnings.warn(f"what was tuned is not kept for the next run: {error}", stacklevel=2)
    return best


def _milliseconds(run: Callable[[Config], None], config: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=10, rep=50, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")


def _save(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(table, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


# ---- device functions ------------------------------------------------------------------------------


_COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def reciprocal(x):
    """1 / x of fp32 x to an ulp, in one instruction: a division takes eight. 1 / inf is 0."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1 / x


@triton.jit
def product(x, y):
    """x * y of fp32, rounded by itself. The compiler fuses a product with a sum that follows, and
    differences that are 0 by their rounding (one key, one column) are not then."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x * y


@triton.jit
def gelu_and_slope(z):
    """Tanh-GELU of fp32 z and its derivative; what the caller does not use is not computed.

    With u = sqrt(2/pi) (z + 0.044715 z^3), e = exp(-2 u) and s = 1 / (1 + e) = sigmoid(2 u):
    gelu = z s, since 0.5 (1 + tanh(u)) = s, which keeps its relative accuracy where tanh(u) is near
    -1; slope = s + z s (1 - s) d(2 u)/dz, where 1 - s = e s is not rounded.
    """
    # Below -10 the GELU is 0 but for 1e-37, above 16 it is z: infinities must not meet factors of
    # 0, NaN stays, and e and s stay within fp32's range.
    z = tl.maximum(z, -10.0, propagate_nan=tl.PropagateNan.ALL)
    low = tl.minimum(z, 16.0, propagate_nan=tl.PropagateNan.ALL)
    square = low * low
    e = tl.exp2(low * (-2.302208198144325 - 0.1029432395800235 * square))  # -2 u / ln 2
    s = reciprocal(1 + e)
    slope = s + s * (low * (e * s)) * (1.5957691216057308 + 0.21406444881780073 * square)
    return z * s, slope


@triton.jit
def gelu(z):
    """Tanh-GELU of fp32 z."""
    return gelu_and_slope(z)[0]


@triton.jit
def gelu_slope(z):
    """d gelu / dz of fp32 z."""
    return gelu_and_slope(z)[1]


@triton.jit
def _scramble(x):
    """A bijection of 32-bit words, as random.py has it."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def head_words(seed, b, h):
    """The two random words of head (b, h), from the seed at pointer `seed`."""
    word = tl.load(seed)
    b, h = tl.cast(b, tl.uint32), tl.cast(h, tl.uint32)
    start = _scramble(word.to(tl.uint32) + 0x9E3779B9) ^ (word >> 32).to(tl.uint32)
    first = _scramble(_scramble(start) + b) + h
    second = _scramble(_scramble(start ^ 0x85EBCA6B) + b) + h
    return _scramble(first), _scramble(second)


@triton.jit
def row_words(first, second, i):
    """The two random words of rows i of a head."""
    i = i.to(tl.uint32)
    return _scramble(first ^ i), _scramble(second + i * 0x9E3779B9)


@triton.jit
def random_word(first, second, j):
    """The random word of column j in the row of these words; all broadcast."""
    x = j.to(tl.uint32) * 0x9E3779B9 + first
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ second
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept_mask(first, second, j, threshold):
    """Whether dropout keeps column j in the row of these words; all broadcast."""
    return (random_word(first, second, j) >> 8).to(tl.int32) >= threshold


@triton.jit
def _sum_partials_kernel(
    partials, first, second, count, columns, split, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row[:, None] < count) & (column[None, :] < columns)
        offset = row[:, None].to(tl.int64) * columns + column[None, :]
        total += tl.sum(tl.load(partials + offset, mask=mask, other=0.0), 0)
    tl.store(first + column, total, mask=column < split)
    if second is not None:
        tl.store(second + column - split, total, mask=(column >= split) & (column < columns))


def sum_partials(partials: Tensor, split: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Sums over the first axis of contiguous fp32 (P, C), in one fixed order.

    Returns (C,) and None, or with `split` the sums of the columns before and from it on.
    """
    count, columns = partials.shape
    split = columns if split is None else split
    first = partials.new_empty((split,))
    second = partials.new_empty((columns - split,)) if split < columns else None
    launch(
        _sum_partials_kernel,
        (triton.cdiv(columns, 16),),
        partials,
        first,
        second,
        count,
        columns,
        split,
        ROWS=128,  # all loads of a program are in flight at once where there are few partials
        BLOCK=16,
        warps=4,
    )
    return first, second
