"""What the CUDA backends share: how a kernel of gpt2fast._cuda is called.

The kernels take addresses, sizes and the stream as integers. Without a GPU the tests put an emulated
gpt2fast._cuda in its place (csrc/testing), whose kernels run on CPU tensors and are checked.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import cuda_kernels


def launch(name: str, *arguments: Any, beside: Sequence[Tensor] = ()) -> None:
    """Calls the function `name` of gpt2fast._cuda on the device of its tensors.

    A tensor becomes its address, None 0; the current stream comes last. `beside` are tensors that
    the kernel reaches by addresses of its own.
    """
    kernels = cuda_kernels()
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    values = [0 if a is None else _address(a) if isinstance(a, Tensor) else a for a in arguments]
    function = getattr(kernels, name)
    device = next(iter(tensors or beside)).device
    if kernels.emulated:
        if _recorded_target is None:
            kernels.know(_memory([*tensors, *beside]))
        function(*values, 0)
        return
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        function(*values, stream)
    else:
        with torch.cuda.device(device):
            function(*values, stream)


_recorded_target: tuple[int, int] | None = None


@contextmanager
def recording(processors: int, shared: int) -> Iterator[None]:
    """Within the block emulated kernels are launched on tensors without data ("meta"), as for a GPU
    of so many multiprocessors with so much shared memory a block, and listed instead of run
    (benchmarks/cuda_report.py)."""
    global _recorded_target
    before, _recorded_target = _recorded_target, (processors, shared)
    cuda_kernels().options(records=True)
    try:
        yield
    finally:
        _recorded_target = before
        cuda_kernels().options()


def _address(tensor: Tensor) -> int:
    return 1 << 40 if tensor.is_meta else tensor.data_ptr()


def _memory(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """Address, bytes and element size of what each tensor spans."""
    found = []
    for t in tensors:
        if t.numel():
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            found.append((t.data_ptr(), (last + 1) * t.element_size(), t.element_size()))
    return found


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors_of(tensor: Tensor) -> int:
    """The number of multiprocessors of the GPU that holds `tensor`; few where it is emulated, so that
    loops over rows do loop."""
    if tensor.is_cuda:
        return _processors(tensor.device.index)
    return 3 if _recorded_target is None else _recorded_target[0]


@functools.cache
def _shared_memory(index: int) -> int:
    found = torch.cuda.get_device_properties(index)
    return found.shared_memory_per_block_optin  # type: ignore[attr-defined]


def shared_memory_of(tensor: Tensor) -> int:
    """Bytes of shared memory that a block may have on the GPU that holds `tensor`."""
    if tensor.is_cuda:
        return _shared_memory(tensor.device.index)
    return 227 << 10 if _recorded_target is None else _recorded_target[1]


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0) and "90a" in cuda_kernels().archs


def is_hopper(tensor: Tensor) -> bool:
    """Whether the kernels have Hopper's own code (wgmma, TMA) for the GPU that holds `tensor`. Where
    it is emulated a test says so."""
    if tensor.is_cuda:
        return _is_hopper(tensor.device.index)
    return _recorded_target is not None and _recorded_target[1] == 227 << 10


def parameter(given: Tensor | None, x: Tensor) -> tuple[Tensor | None, bool]:
    """A contiguous weight or bias of x's dtype or fp32, and whether it is fp32."""
    if given is None:
        return None, False
    if given.dtype not in (x.dtype, torch.float32):
        given = given.float()
    return given.contiguous(), given.dtype == torch.float32
