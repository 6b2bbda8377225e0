"""Timing of one op's variants, interleaved in one process, against ceilings measured in between.

On a machine with a GPU everything runs there, in bf16; elsewhere on the CPU, in fp32. With
GPT2FAST_REHEARSAL=1 the GPU's cases run on the CPU, tiny, the kernels in Triton's interpreter and
the CUDA emulator: that shows that the benchmarks work before they are carried to a GPU, and times
nothing.

A case is one op at one shape and dtype. Its variants run in turn, round after round, each timed for
forward and backward, so that a change of the machine's speed meets all of them. Between the rounds
the machine's ceilings are measured too (copy bandwidth, fp32 matrix product), and the floor of the
case is max(bytes / bandwidth, FLOPs / rate): no version runs much faster than that.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast.ops.linear import cpu as linear_cpu

REHEARSAL = os.environ.get("GPT2FAST_REHEARSAL") == "1"
if REHEARSAL:
    importlib.import_module("tests.triton_interpreter")
    importlib.import_module("tests.cuda_emulator").load()
GPU = torch.cuda.is_available() or REHEARSAL
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
DTYPE_NAME = "bf16" if GPU else "fp32"
#: Our variants: first what is chosen without asking.
OURS = ["gpt2fast triton"] if GPU else ["gpt2fast cpu"]
OURS += [
    f"gpt2fast {name}"
    for name in ("cuda", "cublaslt")
    if GPU and gpt2fast.backends.status(name).available
]

DIRECTIONS = ("forward", "backward", "both")
SECONDS = 2.5  # what one case may take after its warm-up
ROUNDS = range(2, 3) if REHEARSAL else range(5, 31)


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape.

    `variants` maps a name to a function of `inputs`, which returns one tensor or a tuple; every
    floating-point input gets a gradient. `forward` and `backward` are (bytes moved, FLOPs): each
    input read once and each output written once, the least that any implementation does.
    """

    op: str
    label: str
    inputs: dict[str, Any]
    variants: dict[str, Callable[..., Any]]
    forward: tuple[float, float]
    backward: tuple[float, float] | None  # None: the op has no gradient

    @property
    def elements(self) -> int:
        """Of the main input, by which a backend is chosen: the first of floating point."""
        tensors = (t for t in self.inputs.values() if isinstance(t, Tensor))
        return next((t.numel() for t in tensors if t.is_floating_point()), 0)

    def cost(self, direction: str) -> tuple[float, float]:
        """(bytes, FLOPs) of a direction."""
        if direction == "forward":
            return self.forward
        assert self.backward is not None
        if direction == "backward":
            return self.backward
        return self.forward[0] + self.backward[0], self.forward[1] + self.backward[1]


@dataclasses.dataclass
class Measured:
    """Seconds of each round by direction, and what derived numbers need."""

    case: Case
    seconds: dict[str, list[float]]
    peak: int  # most bytes that torch had allocated at once
    ceilings: tuple[float, float]  # bytes/s and FLOP/s, medians of the same rounds

    def numbers(self, direction: str) -> dict[str, Any]:
        """What a table shows of one direction."""
        moved, flops = self.case.cost(direction)
        median = statistics.median(self.seconds[direction])
        floor = max(moved / self.ceilings[0], flops / self.ceilings[1])
        return {
            "op": self.case.op,
            "label": self.case.label,
            "direction": direction,
            "elements": self.case.elements,
            "bytes": moved,
            "flops": flops,
            "compute_bound": flops / self.ceilings[1] > moved / self.ceilings[0],
            "gigabytes_per_second": moved / median / 1e9,
            "gigaflops_per_second": flops / median / 1e9,
            "floor_seconds": floor,
            "fraction_of_roofline": floor / median,
            "peak_bytes": self.peak,
        }


def pick(on_cpu: Any, on_gpu: Any, in_rehearsal: Any) -> Any:
    """The shapes for where this runs."""
    return in_rehearsal if REHEARSAL else on_gpu if GPU else on_cpu


def randn(*shape: int, std: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Random numbers on the benchmarked device."""
    return (std * torch.randn(shape, device=DEVICE)).to(dtype)


def randint(end: int, *shape: int) -> Tensor:
    """Random class indices on the benchmarked device."""
    return torch.randint(end, shape, device=DEVICE)


class Clock:
    """Marks of time: on a GPU events in its stream, so that the host's work does not count.

    For that the host must be ahead of the GPU, which is kept busy for a moment first.
    """

    def __init__(self) -> None:
        self.marks: list[Any] = []
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)  # cycles: about a millisecond

    def mark(self) -> None:
        if DEVICE.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Between one mark and the next."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if DEVICE.type != "cuda":
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


@cache
def _probe_data() -> tuple[Tensor, ...]:
    flat = randn(pick(16 << 20, 512 << 20, 1 << 20))
    rows, inner, columns = pick((1024, 768, 3072), (8192, 8192, 8192), (64, 64, 64))
    a, b = randn(rows, inner), randn(inner, columns)
    return (
        flat,
        torch.empty_like(flat),
        a,
        b,
        torch.empty(rows, columns, device=DEVICE, dtype=DTYPE),
    )


def ceilings() -> tuple[float, float]:
    """(bytes/s of a copy beyond the caches, reads and writes counted; FLOP/s of a matrix product: of
    torch.mm, or on a CPU of our kernel where that is faster)."""
    source, target, a, b, out = _probe_data()
    clock = Clock()
    clock.mark()
    target.copy_(source)
    clock.mark()
    torch.mm(a, b, out=out)
    clock.mark()
    if not GPU and gpt2fast.backends.status("cpu").available:
        linear_cpu.product(a, b, None, out, add=False)
        clock.mark()
    copying, *multiplying = clock.seconds()
    return 2 * source.nbytes / copying, 2 * a.numel() * b.shape[1] / min(multiplying)


def cases(
    *makers: Callable[[], Case],
    variants: Sequence[str] = ("torch eager", "torch.compile", *OURS),
    directions: Sequence[str] = DIRECTIONS,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrises a benchmark by case (made lazily), variant and direction."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for name, values in (("direction", directions), ("variant", variants), ("make", makers)):
            test = pytest.mark.parametrize(name, values, ids=_label)(test)
        return test

    return decorate


def _label(value: Any) -> str:
    """A parameter as -k selects it: a case's maker by its arguments."""
    if isinstance(value, partial):
        return "-".join(map(str, (value.func.__name__, *value.args)))
    return getattr(value, "__name__", value)  # type: ignore[no-any-return]


def ours(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`function` on each of our backends: the first as a user calls it, where that is chosen."""
    variants = {name: _on(name.rpartition(" ")[2], function) for name in OURS}
    if len(OURS) == 1 and not REHEARSAL:  # as a user calls it, without the price of the choice
        chosen = gpt2fast.backends.choose(torch.empty(1, device=DEVICE))
        assert OURS[0].endswith(chosen), f"{OURS[0]} is not chosen here, but {chosen}"
        variants[OURS[0]] = function
    return variants


def _on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **inputs: Any) -> Any:
        with gpt2fast.use_backend(backend):
            return function(*arguments, **inputs)

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile with static shapes, inductor's default settings."""
    if REHEARSAL:
        return function
    return torch.compile(function, dynamic=False)


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]


def _leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def once(case: Case, variant: str, upstream: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds of one forward and one backward; results are dropped outside the timed part."""
    leaves = _leaves(case.inputs)
    clock = Clock()
    clock.mark()
    result = case.variants[variant](**leaves)
    clock.mark()
    if case.backward is None:
        return clock.seconds()[0], 0.0
    pairs = [(o, g) for o, g in zip(_outputs(result), upstream, strict=True) if o.requires_grad]
    wanted = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    clock.mark()
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])
    clock.mark()
    forward, _, backward = clock.seconds()
    del grads, result
    return forward, backward


def peak_memory(run: Callable[[], Any]) -> int:
    """The most bytes that torch had allocated at once in run(), beside what was there before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    total = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def _has_kernels(case: Case, variant: str) -> bool:
    try:
        case.variants[variant](**_leaves(case.inputs))
    except gpt2fast.BackendUnavailable:
        return False
    return True


def measure(case: Case) -> dict[str, Measured]:
    """Every variant of a case, interleaved, but those of backends without kernels for the op."""
    there = {name: run for name, run in case.variants.items() if _has_kernels(case, name)}
    case = dataclasses.replace(case, variants=there)
    probe = case.variants[next(iter(case.variants))](**_leaves(case.inputs))
    upstream = [torch.randn_like(output) for output in _outputs(probe)]
    del probe
    peaks = {}
    for name in case.variants:
        once(case, name, upstream)
        peaks[name] = peak_memory(lambda name=name: once(case, name, upstream))  # type: ignore[misc]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in case.variants}
    bandwidths, rates = [], []
    ceilings()
    start = time.perf_counter()
    for done in range(ROUNDS.stop):
        if done >= ROUNDS.start and time.perf_counter() - start > SECONDS:
            break
        bandwidth, rate = ceilings()
        bandwidths.append(bandwidth)
        rates.append(rate)
        for name in case.variants:
            times[name].append(once(case, name, upstream))
    medians = statistics.median(bandwidths), statistics.median(rates)
    case = dataclasses.replace(case, inputs={}, variants={})  # gigabytes that nobody needs any more
    return {
        name: Measured(
            case,
            {
                "forward": [f for f, _ in pairs],
                "backward": [b for _, b in pairs],
                "both": [f + b for f, b in pairs],
            },
            peaks[name],
            medians,
        )
        for name, pairs in times.items()
    }
