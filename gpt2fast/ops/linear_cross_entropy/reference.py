"""Linear + cross-entropy in plain PyTorch: the specification, differentiated by PyTorch."""

import torch
from torch import Tensor

from gpt2fast.ops.cross_entropy.reference import reduce, row_losses


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """(loss of logits x @ weight[:vocab_size].T, log-probability of each target)."""
    logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight[:vocab_size])
    flat = targets.reshape(-1)
    losses = row_losses(logits, flat, ignore_index, label_smoothing, z_loss)
    logprobs = -row_losses(logits.detach(), flat, ignore_index, 0.0, 0.0).reshape(targets.shape)
    return reduce(losses, targets, ignore_index, reduction), logprobs
