"""AdamW and the global norm on the CUDA kernels (csrc/adamw/adamw.cu)."""

import math
from itertools import chain

import torch
from torch import Tensor

from gpt2fast.backends import cuda_kernels
from gpt2fast.ops.adamw.layout import Aligned, is_dense
from gpt2fast.ops.cuda_common import launch
from gpt2fast.ops.registry import DTYPE_CODES


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
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else [])]
    aligned = Aligned(lists, [True, False, True, True, True][: len(lists)], seed is not None)
    columns = [[t.data_ptr() for t in tensors] for tensors in (*aligned.lists, steps)]
    absent = [0] * len(params)
    if not masters:
        columns.insert(4, absent)
    if not steps:
        columns[5] = absent
    columns.append([p.numel() for p in params])
    columns.append([DTYPE_CODES[p.dtype] for p in params])
    table = torch.tensor(columns, dtype=torch.int64).t().contiguous()
    launch(
        "adamw_step",
        table.data_ptr(),
        len(params),
        lr_tensor,
        grad_scale,
        seed,
        step,
        lr,
        1.0 if steps else 1 - beta1**step,
        1.0 if steps else 1 - beta2**step,
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        beta1,
        beta2,
        eps,
        weight_decay,
        beside=[*chain(*aligned.lists), *steps],
    )
    aligned.finish()


def global_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of all squares), an fp32 scalar."""
    dense = [t if is_dense(t) else t.contiguous() for t in tensors]
    rows = [[t.data_ptr(), t.numel(), DTYPE_CODES[t.dtype]] for t in dense]
    table = torch.tensor(rows, dtype=torch.int64)
    blocks = cuda_kernels().global_norm_partials(table.data_ptr(), len(rows))
    partials = dense[0].new_empty((blocks,), dtype=torch.float64)
    norm = dense[0].new_empty((), dtype=torch.float32)
    launch("global_norm", partials, norm, table.data_ptr(), len(rows), beside=dense)
    return norm
