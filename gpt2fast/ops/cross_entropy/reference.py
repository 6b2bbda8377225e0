"""Cross-entropy in plain PyTorch: the specification, differentiated by PyTorch."""

import torch
from torch import Tensor


def row_losses(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """lse - logit[target], smoothed, + z_loss * lse^2 per row; 0 where the target is ignored.

    Computed in fp32 for half-precision logits (R, K); targets (R,).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(
        wide,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    if z_loss == 0:
        return losses
    penalty = z_loss * torch.logsumexp(wide, -1).square()
    return losses + torch.where(targets != ignore_index, penalty, 0.0)


def reduce(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Row losses as they are, their sum, or their mean over the targets that are not ignored."""
    if reduction == "none":
        return losses.reshape(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (targets != ignore_index).sum()  # nan where all are ignored, as in torch


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
) -> Tensor:
    """Cross-entropy over the first `vocab_size` columns of logits (..., V) with targets (...)."""
    classes = logits[..., :vocab_size]
    losses = row_losses(
        classes.reshape(-1, vocab_size),
        targets.reshape(-1),
        ignore_index,
        label_smoothing,
        z_loss,
    )
    return reduce(losses, targets, ignore_index, reduction)
