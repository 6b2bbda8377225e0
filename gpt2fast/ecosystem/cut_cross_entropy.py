"""cut-cross-entropy's name: the head fused with its loss.

The original is described at https://github.com/apple/ml-cross-entropy; the arguments are its own,
in their order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpt2fast import functional
from gpt2fast.ecosystem._refuse import refuse

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    **options: Any,
) -> Tensor:
    """Cross-entropy of e @ c.T with targets; the logits never exist whole.

    No gradient is left out for being small, as the original's filters do: the result is that of
    its "torch_compile" implementation.

    Args:
        e: (..., C) embeddings. c: (V, C) classifier. targets: (...) class indices.
        ignore_index: targets with loss 0, which the mean leaves out.
        reduction: "mean", "sum" or "none".
        shift: position t predicts target t + shift (True: 1) along the last dimension of targets.
        bias, softcap: only None.
        options: none of the original's further arguments is supported.

    Returns:
        The loss in fp32; for "none" of the targets' shape, shortened by `shift`.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> import torch
    >>> e, c, targets = torch.zeros(1, 3, 8), torch.zeros(4, 8), torch.tensor([[0, 3, 1]])
    >>> linear_cross_entropy(e, c, targets, shift=True)
    tensor(1.3863)
    """
    refuse("linear_cross_entropy", bias=(bias, None), softcap=(softcap, None))
    for name, value in options.items():
        raise ValueError(f"{name}={value!r} is not supported by gpt2fast's linear_cross_entropy")
    shift = int(shift)
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}")
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
    return functional.linear_cross_entropy(
        e, c, targets, ignore_index=ignore_index, reduction=reduction
    )
