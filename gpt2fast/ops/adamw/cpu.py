"""AdamW and the global norm on the C++ kernels (csrc/adamw/adamw_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.adamw.layout import Aligned, is_dense
from gpt2fast.ops.registry import DTYPE_CODES, pointer

BLOCK = 16384  # as in adamw_cpu.cpp


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    seed: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place: p and g of one dtype, moments and masters fp32, grad_scale a fp32 scalar.

    `masters` is empty or has one for each parameter; so has `steps`, which then stands in for
    `step`, as `lr_tensor` does for `lr`. With a `seed` bf16 parameters are rounded stochastically.
    """
    if lr_tensor is not None:
        lr = float(lr_tensor)
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else [])]
    numbers = [float(s) for s in steps] or [step] * len(params)
    aligned = Aligned(lists, [True, False, True, True, True][: len(lists)], seed is not None)
    tables: dict[float, list[list[int]]] = {}
    for place, (number, *tensors) in enumerate(zip(numbers, *aligned.lists, strict=True)):
        if size := tensors[0].numel():
            addresses = [t.data_ptr() for t in tensors] + ([] if masters else [0])
            row = [*addresses, size, DTYPE_CODES[tensors[0].dtype], place]
            tables.setdefault(number, []).append(row)
    for number, table in tables.items():
        rows = torch.tensor(table, dtype=torch.int64)
        cpu_kernels().adamw_step(
            rows.data_ptr(),
            len(table),
            pointer(grad_scale),
            pointer(seed),
            number,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            torch.get_num_threads(),
        )
    aligned.finish()


def global_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of all squares), an fp32 scalar."""
    kept = [t if is_dense(t) else t.contiguous() for t in tensors]
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
