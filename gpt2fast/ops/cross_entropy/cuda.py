"""Cross-entropy on the CUDA kernels (csrc/cross_entropy/cross_entropy.cu)."""

import torch
from torch import Tensor

from gpt2fast.ops.cuda_common import launch, shared_memory_of
from gpt2fast.ops.registry import DTYPE_CODES


def count_of(targets: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """How many of the targets (R,) are not ignored, as () fp32 on the device; None if no mean is
    asked for."""
    if reduction != "mean":
        return None
    count = targets.new_empty((), dtype=torch.float32)
    launch("cross_entropy_count", targets, count, targets.shape[0], ignore_index)
    return count


def reduced(losses: Tensor, count: Tensor | None, reduction: str) -> Tensor:
    """The row losses (R,), their sum, or with `count` their mean, added in a fixed order."""
    if reduction == "none":
        return losses
    loss = losses.new_empty(())
    launch("cross_entropy_reduce", losses, count, loss, losses.shape[0])
    return loss


def forward_rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    logprobs: Tensor | None,
    statistics: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
    gradient: bool,
) -> None:
    """Writes losses (R,), log-probabilities (R,) where wanted and statistics (R, 2) of logits (R, V).

    With `gradient` the gradient of the sum of losses, over `count` where that is given, takes the
    place of the logits.
    """
    launch(
        "cross_entropy_forward",
        logits,
        logits.stride(0),
        targets,
        losses,
        logprobs,
        statistics,
        count,
        gradient,
        *logits.shape,
        vocab_size,
        ignore_index,
        label_smoothing,
        z_loss,
        shared_memory_of(logits),
        DTYPE_CODES[logits.dtype],
    )


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
    rows = logits.shape[0]
    losses = logits.new_empty((rows,), dtype=torch.float32)
    statistics = logits.new_empty((rows, 2), dtype=torch.float32)
    options = (ignore_index, label_smoothing, z_loss, vocab_size)
    forward_rows(logits, targets, losses, None, statistics, None, *options, False)
    return reduced(losses, count_of(targets, ignore_index, reduction), reduction), statistics


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
    stride = dloss.stride(0) if reduction == "none" else 0
    count = count_of(targets, ignore_index, reduction)
    options = (ignore_index, label_smoothing, z_loss, vocab_size)
    backward_rows(dloss, stride, logits, targets, statistics, count, dlogits, *options)


def backward_rows(
    dloss: Tensor,
    dloss_stride: int,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    count: Tensor | None,
    dlogits: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> None:
    """Writes the gradient of rows whose losses have the gradients dloss[row * dloss_stride], over
    `count` where that is given."""
    launch(
        "cross_entropy_backward",
        dloss,
        dloss_stride,
        logits,
        logits.stride(0),
        targets,
        statistics,
        count,
        dlogits,
        dlogits.stride(0),
        *logits.shape,
        vocab_size,
        ignore_index,
        label_smoothing,
        z_loss,
        DTYPE_CODES[logits.dtype],
    )
