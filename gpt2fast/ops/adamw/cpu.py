"""AdamW and the global norm on the C++ kernels (csrc/adamw/adamw_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import DTYPE_CODES

BLOCK = 16384  # as in adamw_cpu.cpp


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_scale: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place: p and g of one dtype, moments fp32, grad_scale a fp32 scalar."""
    table, copies = [], []
    for four in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if four[0].numel() == 0:
            continue
        used = four
        if not _same_order(four):
            p, g, m, v = four
            used = (p.contiguous(), g.contiguous(), m.contiguous(), v.contiguous())
            copies.append((four, used))
        table.append([*(t.data_ptr() for t in used), used[0].numel(), DTYPE_CODES[used[0].dtype]])
    rows = torch.tensor(table, dtype=torch.int64)
    cpu_kernels().adamw_step(
        rows.data_ptr(),
        len(table),
        0 if grad_scale is None else grad_scale.data_ptr(),
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        torch.get_num_threads(),
    )
    for (p, _, m, v), (new_p, _, new_m, new_v) in copies:
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of all squares), an fp32 scalar."""
    kept = [t if _is_dense(t) else t.contiguous() for t in tensors]
    table = [[t.data_ptr(), t.numel(), DTYPE_CODES[t.dtype]] for t in kept]
    rows = torch.tensor(table, dtype=torch.int64)
    blocks = sum(-(-t.numel() // BLOCK) for t in kept)
    partials = torch.empty(blocks, dtype=torch.float64)
    norm = torch.empty((), dtype=torch.float32)
    cpu_kernels().global_norm(
        rows.data_ptr(),
        len(table),
        norm.data_ptr(),
        partials.data_ptr(),
        blocks,
        torch.get_num_threads(),
    )
    return norm


def _same_order(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors' elements lie in memory without gaps and in one order."""
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    return _is_dense(first) and all(t.stride() == first.stride() for t in tensors)


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    expected = 1
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(d for d in dimensions if d[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True
