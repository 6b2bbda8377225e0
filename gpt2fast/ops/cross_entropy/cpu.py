"""Cross-entropy on the C++ kernels (csrc/cross_entropy/cross_entropy_cpu.cpp)."""

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import DTYPE_CODES


def count(targets: Tensor, classes: int, ignore_index: int) -> int:
    """The number of targets (R,) that are not ignored.

    Raises:
        IndexError: a target is neither a class nor `ignore_index`.
    """
    found = cpu_kernels().cross_entropy_count(
        targets.data_ptr(), targets.numel(), classes, ignore_index
    )
    if found < 0:
        row = -1 - found
        raise IndexError(
            f"targets has {targets[row].item()} at row {row}, which is neither one of the {classes}"
            f" classes 0 to {classes - 1} nor ignore_index {ignore_index}"
        )
    return found


def mean_factor(valid: int, reduction: str) -> float:
    """What a row's loss weighs in the reduced loss, given the number of rows not ignored."""
    if reduction != "mean":
        return 1.0
    return 1.0 / valid if valid else float("nan")


def forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """On logits (R, V) and targets (R,): (loss () or (R,) fp32, statistics (R, 2) fp32)."""
    rows, columns = logits.shape
    factor = mean_factor(count(targets, vocab_size, ignore_index), reduction)
    losses = logits.new_empty((rows,), dtype=torch.float32)
    statistics = logits.new_empty((rows, 2), dtype=torch.float32)
    cpu_kernels().cross_entropy_forward(
        logits.data_ptr(),
        logits.stride(0),
        targets.data_ptr(),
        losses.data_ptr(),
        0,
        statistics.data_ptr(),
        False,
        1.0,
        rows,
        columns,
        vocab_size,
        ignore_index,
        label_smoothing,
        z_loss,
        DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )
    return losses if reduction == "none" else losses.sum() * factor, statistics


def backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
) -> None:
    """Writes the gradient to dlogits (R, V), which may be the logits; dloss is () or (R,) fp32."""
    factor = 1.0
    if reduction == "mean":
        factor = mean_factor(count(targets, vocab_size, ignore_index), reduction)
    cpu_kernels().cross_entropy_backward(
        dloss.data_ptr(),
        dloss.stride(0) if reduction == "none" else 0,
        factor,
        logits.data_ptr(),
        logits.stride(0),
        targets.data_ptr(),
        statistics.data_ptr(),
        dlogits.data_ptr(),
        dlogits.stride(0),
        *logits.shape,
        vocab_size,
        ignore_index,
        label_smoothing,
        z_loss,
        DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )
