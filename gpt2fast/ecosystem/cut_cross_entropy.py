"""cut-cross-entropy's name: the head fused with its loss.

The original is described at https://github.com/apple/ml-cross-entropy; the arguments are its own,
in their order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpt2fast import functional
from gpt2fast.ecosystem._refuse import check_head, refuse
from gpt2fast.ops.checks import check_number

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | Any = "cce",
    vocab_parallel_options: Any = None,
) -> Tensor:
    """Cross-entropy of e @ c.T with targets; the logits never exist whole. On
    :func:`gpt2fast.functional.linear_cross_entropy`.

    No gradient is left out for being small, as the original's filters do: the result is that of
    its "torch_compile" implementation.

    Args:
        e: (..., C) embeddings. c: (V, C) classifier. targets: (...) class indices.
        ignore_index: targets with loss 0, which the mean leaves out.
        reduction: "mean", "sum" or "none".
        shift: position t predicts target t + shift (True: 1) along the last dimension of targets.
        bias, softcap, return_lse, vocab_parallel_options: only their defaults.
        filter_eps, filter_e_grad, filter_c_grad, accum_e_fp32, accum_c_fp32, impl: any. They let the
            original trade accuracy for speed; here nothing is filtered, and sums are fp32.

    Returns:
        The loss in fp32; for "none" of the targets' shape, shortened by `shift`.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> import torch
    >>> e, c, targets = torch.zeros(1, 3, 8), torch.zeros(4, 8), torch.tensor([[0, 3, 1]])
    >>> linear_cross_entropy(e, c, targets, shift=True)
    tensor(1.3863)
    """
    refuse(
        "linear_cross_entropy",
        bias=(bias, None),
        softcap=(softcap, None),
        return_lse=(return_lse, False),
        vocab_parallel_options=(vocab_parallel_options, None),
    )
    check_head("e", e, "c", c, "targets", targets)
    check_number("shift", shift, whole=True)
    if not 0 <= shift < max(1, targets.shape[-1] if targets.dim() else 1):
        raise ValueError(
            f"shift must be less than the {targets.shape[-1]} targets of a row and not negative, got"
            f" {shift}"
        )
    shift = int(shift)
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
    return functional.linear_cross_entropy(
        e, c, targets, ignore_index=ignore_index, reduction=reduction
    )
