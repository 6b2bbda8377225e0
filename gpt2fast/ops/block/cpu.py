"""The transformer block on the C++ kernels (csrc/block/block_cpu.cpp)."""

import threading
from array import array

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import pointer

#: Bytes of a workspace that a thread keeps from call to call; a larger one is freed again.
KEPT_BYTES = 256 << 20

Parameters = tuple[Tensor | None, ...]


class _Workspace(threading.local):
    """Memory that kernels of this thread work in: one call at a time, nothing in it outlasts one."""

    def __init__(self) -> None:
        self.kept = torch.empty((0,), dtype=torch.float32, device="cpu")

    def of(self, floats: int) -> Tensor:
        if self.kept.numel() >= floats:
            return self.kept
        made = torch.empty((floats,), dtype=torch.float32, device="cpu")
        if made.nbytes <= KEPT_BYTES:
            self.kept = made
        return made


_workspace = _Workspace()


def forward(
    x: Tensor,
    branch: Tensor | None,
    parameters: Parameters,
    seeds: Tensor | None,
    n_head: int,
    eps_1: float,
    eps_2: float,
    dropouts: tuple[float, ...],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """On contiguous fp32 x, branch (B, T, C) and the 12 parameters in the model's order:
    (s2, the MLP's branch, both (B, T, C); what `backward` needs, or where not `save` nothing)."""
    sizes, threads, kernels = _sizes(x, parameters, n_head), torch.get_num_threads(), cpu_kernels()
    total, out = torch.empty_like(x), torch.empty_like(x)
    saved = x.new_empty((kernels.block_saved(*sizes, branch is not None) if save else 0,))
    workspace = _workspace.of(kernels.block_workspace(*sizes, False, save, threads))
    tensors = (seeds, x, branch, *parameters, total, out, saved if save else None, workspace)
    table = array("Q", [pointer(t) for t in tensors])
    kernels.block_forward(table.buffer_info()[0], *sizes, eps_1, eps_2, *dropouts, threads)
    return total, out, saved


def backward(
    dtotal: Tensor,
    dout: Tensor,
    x: Tensor | None,
    total: Tensor,
    saved: Tensor,
    parameters: Parameters,
    seeds: Tensor | None,
    n_head: int,
    dropouts: tuple[float, ...],
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x + branch and of the 12 parameters, where needed; x only where no branch was."""
    sizes = _sizes(total, parameters, n_head)
    threads, kernels = torch.get_num_threads(), cpu_kernels()
    wanted = zip(need, (total, *parameters), strict=True)
    dx, *gradients = (torch.empty_like(t) if n and t is not None else None for n, t in wanted)
    workspace = _workspace.of(kernels.block_workspace(*sizes, True, True, threads))
    tensors = (seeds, x, *parameters, total, saved, dtotal, dout, *gradients, dx, workspace)
    table = array("Q", [pointer(t) for t in tensors])
    kernels.block_backward(table.buffer_info()[0], *sizes, *dropouts, threads)
    return dx, *gradients


def _sizes(x: Tensor, parameters: Parameters, n_head: int) -> tuple[int, ...]:
    """B, T, H, C and the hidden width."""
    batch, length, width = x.shape
    fc_weight = parameters[8]
    assert fc_weight is not None
    return batch, length, n_head, width, fc_weight.shape[0]
