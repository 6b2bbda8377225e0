"""Matrix products in fp32 on the C++ kernel (csrc/linear/linear_cpu.cpp), where it beats the BLAS.

Measured on AMD EPYCs with MKL, two threads (benchmarks/NOTES.md): with AVX2 1.2 to 1.4 times MKL's rate
at 64 rows, 1.1 to 1.2 at 256, level from 1024 on; with AVX-512, which MKL leaves to Intel's CPUs, twice
its rate. On those MKL is at home, and other builds of PyTorch have other libraries: there PyTorch's
product is taken. With a few rows BLAS libraries pack weights that they use once: x W^T of up to 32
rows, and dy W and dy^T x of up to six, are the kernel's on any CPU with vectors.
"""

import functools
import os

import torch
from torch import Tensor

from gpt2fast.backends import (
    BackendUnavailable,
    constant_in_graphs,
    cpu_extension,
    cpu_kernels,
)
from gpt2fast.ops.registry import DTYPE_CODES

FEW = 6  # the most rows of activations that are few in dy W and dy^T x
FEW_ACROSS = 32  # and in x W^T (the kernel goes on so to 64, where all products are ours)
ONE_THREAD = 32  # rows from which on one thread does dy W as fast as the BLAS
MOST_THREADS = 8  # each packs for itself; two have been measured
WORK = 1 << 18  # multiplications below which a call's Python costs more than is gained


@functools.cache
def preferred(threads: int, few: bool = False) -> bool:
    """Whether so many threads use the kernel, for many rows of activations or a few.

    GPT2FAST_CPU_MATMUL=kernel or =blas decides otherwise.
    """
    choice = os.environ.get("GPT2FAST_CPU_MATMUL", "auto")
    if choice not in ("auto", "kernel", "blas"):
        raise ValueError(f"GPT2FAST_CPU_MATMUL must be auto, kernel or blas, got {choice!r}")
    if choice != "auto":
        return choice == "kernel"
    try:
        extension = cpu_extension()
    except BackendUnavailable:
        return False
    if extension.runnable[-1] == "portable":
        return False
    measured = bool(extension.amd) and torch.backends.mkl.is_available()
    return few or (measured and threads <= MOST_THREADS)


#: Whose products are ours, as csrc/linear/linear_tensors.inc numbers it.
BLAS, FEW_ROWS, ALL = 0, 1, 2


def preference() -> int:
    """Whose products are ours now: nobody's, those of few rows, or all."""
    return _preference(torch.get_num_threads())


def _preference(threads: int) -> int:
    return ALL if preferred(threads) else FEW_ROWS if preferred(threads, True) else BLAS


@constant_in_graphs
def _preferred(few: bool) -> bool:
    return preferred(torch.get_num_threads(), few)


def serves(few: bool, work: int, *tensors: Tensor) -> bool:
    """Whether a product of `work` multiplications may be ours; `few`: its rows of activations."""
    return (
        work >= WORK
        and (_preferred(True) if few else _preferred(False))  # a constant in a graph of any size
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    )


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,), or `out` + a @ b where `add` is set; by whom it is fastest.

    Args:
        a, b, out: of any strides; the kernel takes rows or columns that are contiguous, but not
            columns in both a and b, nor in out (M, N).
        bias: of their dtype; not beside `add`.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    a_across, b_across = a.stride(1) != 1, b.stride(1) != 1
    few = depth <= FEW if a_across else rows <= (FEW_ACROSS if b_across else FEW)
    slow = not (a_across or b_across) and rows < ONE_THREAD and torch.get_num_threads() == 1
    fits = (
        not torch.compiler.is_compiling()  # a compiler cannot look into the kernel
        and (few or not slow)
        and serves(few, rows * columns * depth, a, b)
        and not (a_across and (b_across or a.stride(0) != 1))
        and not (b_across and b.stride(0) != 1)
        and (out is None or out.stride(1) == 1)
    )
    if not fits:
        if add:
            assert out is not None
            return torch.addmm(out, a, b, out=out)
        if bias is None:
            return torch.mm(a, b, out=out)
        return torch.addmm(bias, a, b, out=out)
    if out is None:
        out = a.new_empty((rows, columns))
    return product(a, b, bias, out, add)


def product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> Tensor:
    """`matmul` by the kernel."""
    (rows, depth), columns = a.shape, b.shape[1]
    a_across, b_across = a.stride(1) != 1, b.stride(1) != 1
    bias = None if bias is None else bias.contiguous()
    kernels, threads = cpu_kernels(), torch.get_num_threads()
    size = kernels.matmul_workspace(rows, columns, depth, a_across, b_across, threads)
    workspace = a.new_empty((size,))
    kernels.matmul(
        a.data_ptr(),
        a.stride(int(a_across)),
        a_across,
        b.data_ptr(),
        b.stride(int(b_across)),
        b_across,
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
        workspace.data_ptr(),
        rows,
        columns,
        depth,
        add,
        threads,
    )
    return out


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, C) @ weight (D, C)^T + bias (D,): (R, D)."""
    return matmul(x, weight.t(), bias)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, need: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias where needed, for dy (R, D)."""
    return (
        matmul(dy, weight) if need[0] else None,
        matmul(dy.t(), x) if need[1] else None,
        column_sum(dy) if need[2] else None,
    )


def column_sum(x: Tensor) -> Tensor:
    """The sum over rows of x (R, C) with contiguous columns, in fp32: a bias's gradient."""
    threads = torch.get_num_threads()
    total = x.new_empty(x.shape[1:], dtype=torch.float32)
    workspace = x.new_empty((threads, 2 * x.shape[1]), dtype=torch.float32)
    cpu_kernels().column_sum(
        x.data_ptr(),
        x.stride(0),
        total.data_ptr(),
        workspace.data_ptr(),
        *x.shape,
        DTYPE_CODES[x.dtype],
        threads,
    )
    return total
