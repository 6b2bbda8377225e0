"""The emulator that proves the CUDA kernels finds the faults that it is for."""

import itertools
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import gpt2fast
from benchmarks import cuda_report
from gpt2fast import backends
from gpt2fast.ops import cuda_common
from gpt2fast.ops.registry import DTYPE_CODES
from tests import cuda_emulator

FAULTS = {
    "no barrier": r"read of shared memory that was not written, byte \d+ at faults\.cu:\d+, block 0,0",
    "beyond the tensor": "access beyond the end of a tensor|outside of every tensor",
    "beyond shared memory": "access beyond the 256 bytes of shared memory",
    "unwritten": "read of shared memory that was not written, byte 12",
    "misaligned": "misaligned access of 16 bytes",
    "divergent": "threads of a block wait at different barriers",
    "early exit": "barrier reached by 63 of 64 threads",
    "warp order": "race: read of what thread",
    "a shuffle is no barrier": "race: read of what thread",
    "other block": r"race: write of what thread 0 wrote.*\(in another block\)",
    "half a shuffle": "warp operation that not all lanes of its mask reach",
    "overwritten": "race: write of what thread|race: read of what thread",
    "too large": "invalid configuration",
}


@contextmanager
def emulated(*tensors: torch.Tensor, backwards: bool) -> Iterator[tuple[Any, list[int]]]:
    """The emulator, which knows no other tensors and runs threads in either order; their addresses."""
    kernels, addresses = cuda_emulator.load(), [tensor.data_ptr() for tensor in tensors]
    kernels.know([(t.data_ptr(), t.nbytes, t.element_size()) for t in tensors])
    with cuda_emulator.threads_in_order(backwards):
        yield kernels, addresses


def run(fault: str, count: int = 100, backwards: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(count), torch.full((count,), torch.nan)
    with emulated(x, y, backwards=backwards) as (kernels, addresses):
        kernels.fault(fault, *addresses, count)
    return x, y


@pytest.mark.parametrize("backwards", [False, True])
def test_without_a_fault(backwards: bool) -> None:
    x, y = run("", 128, backwards)
    assert torch.equal(y, x.view(2, 64).flip(1).view(-1))
    run("", 100, backwards)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, backwards: bool) -> None:
    message = FAULTS[fault]
    if backwards:
        message = message.replace("thread 0", r"thread \d+")
    with pytest.raises(RuntimeError, match=rf"(?s)gpt2fast CUDA kernel fault: .*({message})"):
        run(fault, backwards=backwards)
    x, y = run("", 128)  # the next launch is not harmed
    assert torch.equal(y, x.view(2, 64).flip(1).view(-1))


PRODUCT_FAULTS = {
    "no wait": r"read of what thread \d+ copies asynchronously and has not waited for at faults",
    "short wait": r"read of what thread \d+ copies asynchronously",
    "no commit": r"read of what thread \d+ copies asynchronously",
    "no barrier after wait": "read of shared memory that was not written",
    "overwritten stage": r"race: write of what thread \d+ reads|copies asynchronously",
    "misaligned row": "misaligned access of 16 bytes",
    "misaligned copy": "misaligned asynchronous copy",
    "row not shared": "matrix row outside of shared memory",
    "half a warp": "warp operation that not all lanes of its mask reach",
    "copy beyond": "access beyond the end of a tensor|outside of every tensor",
}


def product(
    fault: str = "",
    depth: int = 48,
    *,
    turned: tuple[bool, bool] = (False, False),
    plain: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    backwards: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and what PyTorch make of a (32, depth) times b (depth, 16)."""
    a, b = torch.randn(32, depth).to(dtype), torch.randn(depth, 16).to(dtype)
    c = torch.full((32, 16), torch.nan)
    stored = (a.t().contiguous() if turned[0] else a, b if turned[1] else b.t().contiguous())
    with emulated(*stored, c, backwards=backwards) as (kernels, addresses):
        kernels.product_fault(fault, *addresses, depth, *turned, plain, DTYPE_CODES[dtype])
    return c, a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("turned", [*itertools.product((False, True), repeat=2)])
def test_matrix_fragments(turned: tuple[bool, bool], plain: bool, dtype: torch.dtype) -> None:
    """Fragments by the ISA's formulas and by ldmatrix, of tiles in either order, whole and ragged."""
    for depth, backwards in ((48, False), (24, True)):
        found, expected = product(
            depth=depth, turned=turned, plain=plain, dtype=dtype, backwards=backwards
        )
        # Products of 16-bit numbers are exact in fp32; every addition rounds once.
        bound = depth * torch.finfo(torch.float32).eps * expected.abs().max() * depth**0.5
        assert (found - expected).abs().max() < bound


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_faults_of_products_are_found(fault: str, backwards: bool) -> None:
    message = rf"(?s)gpt2fast CUDA kernel product_fault: .*({PRODUCT_FAULTS[fault]})"
    with pytest.raises(RuntimeError, match=message):
        product(fault, 40, backwards=backwards)
    product()  # the next launch is not harmed


HOPPER_FAULTS = {
    "no wait for a copy": "read of what has not arrived by a product",
    "wrong phase": "read of what has not arrived by a product|deadlock: a thread waits",
    "no expectation": "read of what has not arrived|bytes that the barrier's phase does not expect",
    "too many bytes": "deadlock: a thread waits for a barrier's phase",
    "no release": "deadlock: a thread waits for a barrier's phase",
    "early release": "write of what a product or a copy under way reads|race: write of what",
    "arrived twice": "arrival of a thread that need not know the phase of its last one to be over",
    "early result": "accumulators touched before their product was waited for",
    "uncommitted": "accumulators touched before|thread that ends before its products|under way",
    "no product fence": "product without a fence after its accumulators were touched",
    "no proxy fence": "read of what was written without a fence between proxies by a copy",
    "no barrier before store": "read of shared memory that was not written by a copy|race: read",
    "store overwritten": "write of what a product or a copy under way reads",
    "store left": "thread that ends before its copies have read shared memory",
    "no init fence": "barrier whose initialisation this thread need not know",
    "no barrier after init": "barrier whose initialisation|barrier that was not initialised",
    "misplaced tile": "operand that is not swizzled by 128 bytes from a multiple of 1024",
    "plain operand": "operand that is not swizzled by 128 bytes",
    "half a warpgroup": "product that not all threads of its warpgroup reach",
    "other operands": "threads of a warpgroup describe different products",
    "lonely barrier": "named barrier that too few threads reach",
    "copy left": "block that ends before a copy has arrived",
}


def hopper(
    fault: str = "",
    depth: int = 200,
    *,
    turned: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    backwards: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and what PyTorch make of a (60, depth) times b (depth, 200)."""
    a, b = torch.randn(60, depth).to(dtype), torch.randn(depth, 200).to(dtype)
    c = torch.full((60, 200), torch.nan, dtype=dtype)
    stored = b if turned else b.t().contiguous()
    with emulated(a, stored, c, backwards=backwards) as (kernels, addresses):
        kernels.hopper_fault(fault, *addresses, 60, 200, depth, turned, DTYPE_CODES[dtype])
    return c, a.double() @ b.double()


def is_product(found: torch.Tensor, expected: torch.Tensor, depth: int) -> bool:
    """Products are exact in fp32; every addition rounds once, and so does the result, in its dtype."""
    sums = depth**1.5 * torch.finfo(torch.float32).eps
    bound = (sums + torch.finfo(found.dtype).eps) * expected.abs().max()
    return bool((found - expected).abs().max() < bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
def test_products_of_warpgroups(turned: bool, dtype: torch.dtype) -> None:
    for depth, backwards in ((200, False), (200, True), (64, False), (40, True)):
        result = hopper(depth=depth, turned=turned, dtype=dtype, backwards=backwards)
        assert is_product(*result, depth)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("fault", HOPPER_FAULTS)
def test_faults_on_hopper_are_found(fault: str, backwards: bool) -> None:
    message = rf"(?s)gpt2fast CUDA kernel hopper_fault: .*({HOPPER_FAULTS[fault]})"
    with pytest.raises(RuntimeError, match=message):
        hopper(fault, backwards=backwards)
    assert is_product(*hopper(), 200)  # the next launch is not harmed


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("fault", ["order of rows", "short step"])
def test_wrong_layouts_give_wrong_numbers(fault: str, turned: bool) -> None:
    """What lies elsewhere than TMA and the products look for it is really read from there."""
    assert not is_product(*hopper(fault, turned=turned), 200)


def left(
    fault: str = "", dtype: torch.dtype = torch.bfloat16, rows: int = 64, backwards: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and what PyTorch make of a (64, rows) times part of b (2, rows, 3, 64)."""
    a, b = torch.randn(64, 64).to(dtype), torch.randn(2, rows, 3, 64).to(dtype)
    c = torch.full((64, 64), torch.nan)
    with emulated(a, b, c, backwards=backwards) as (kernels, addresses):
        kernels.left_fault(fault, *addresses, rows, DTYPE_CODES[dtype])
    return c, a[:, :rows].double() @ b[1, :, 1].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_left_operand_in_registers(dtype: torch.dtype) -> None:
    """And a right one that is part of a tensor of four dimensions, with rows that it has not."""
    for rows, backwards in ((64, False), (50, True)):
        assert is_product(*left("", dtype, rows, backwards), 64)


LEFT_FAULTS = {
    "left overwritten": "left operand written before its product was waited for",
    "left without fence": "product without a fence after its accumulators were touched",
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("fault", LEFT_FAULTS)
def test_faults_of_left_operands_are_found(fault: str, backwards: bool) -> None:
    message = rf"(?s)gpt2fast CUDA kernel left_fault: .*({LEFT_FAULTS[fault]})"
    with pytest.raises(RuntimeError, match=message):
        left(fault, backwards=backwards)
    assert is_product(*left(), 64)  # the next launch is not harmed


@pytest.mark.parametrize("fault", ["left turned", "other matrix"])
def test_wrong_places_of_left_operands_give_wrong_numbers(fault: str) -> None:
    assert not is_product(*left(fault), 64)


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((9, 0), "80-real, 90a-real", True),
        ((9, 0), "80-real, 90-virtual", False),
        ((8, 0), "80-real, 90a-real", False),
        ((10, 0), "90a-real, 90-virtual", False),
    ],
)
def test_hopper_code_runs_on_hopper_only(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], archs: str, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    kernels = types.SimpleNamespace(archs=archs)
    monkeypatch.setattr(cuda_common, "cuda_kernels", lambda: kernels)
    assert cuda_common._is_hopper.__wrapped__(0) is expected


def test_nothing_fuses_products_with_sums_but_the_kernels() -> None:
    """What is proven here holds on a GPU only if both compilers leave a * b + c in two roundings."""
    build = (cuda_emulator.ROOT / "cmake/cuda.cmake").read_text()
    (options,) = re.findall(r"^target_compile_options\(cuda_kernels PRIVATE (.*)\)$", build, re.M)
    assert "-fmad=false" in options.split()
    assert "-fmad=false" in cuda_report.OPTIONS
    assert "-ffp-contract=off" in cuda_emulator.KERNEL


def test_the_report_reads_what_ptxas_says() -> None:
    told = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async is serialized
ptxas info    : (C7517) warpgroup.wait is injected in around line 62583
ptxas info    : Used 168 registers, used 16 barriers"""
    assert cuda_report.losses(told) == told.splitlines()[:2]


def test_an_op_without_cuda_kernels_says_so() -> None:
    cuda_emulator.load()
    with pytest.raises(gpt2fast.BackendUnavailable, match="'cuda' has no kernels for fft"):
        backends.load("fft", "cuda")


def test_status_says_what_is_emulated() -> None:
    cuda_emulator.load()
    found = backends.status("cuda")
    assert found.available
    assert "emulated on the CPU" in found.detail


def test_status_says_why_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpt2fast._cuda", None)
    monkeypatch.setattr(backends, "cuda_kernels", backends.cuda_kernels.__wrapped__)
    told = {"parts": {"cuda": {"built": False, "reason": "nvcc was not found"}}}
    monkeypatch.setattr(backends, "build_info", lambda: told)
    found = backends.status.__wrapped__("cuda")
    assert not found.available
    assert "nvcc was not found" in found.detail


def test_status_says_that_no_gpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = types.SimpleNamespace(emulated=False, archs="80-real, 90a-real")
    monkeypatch.setattr(backends, "cuda_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = backends.status.__wrapped__("cuda")
    assert not found.available
    assert (
        "CUDA kernels for 80-real, 90a-real: there, but PyTorch sees no NVIDIA GPU" in found.detail
    )
