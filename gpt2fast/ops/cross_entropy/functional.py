"""The public cross-entropy function."""

import torch
from torch import Tensor

from gpt2fast.backends import choose, native
from gpt2fast.ops.checks import (
    check_floating,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
)
from gpt2fast.ops.cross_entropy import autograd, reference
from gpt2fast.ops.registry import apply, enter, rows

REDUCTIONS = ("none", "mean", "sum")


def check_options(
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int | None,
    columns: int,
) -> int:
    """Checks what both losses share; returns the number of classes."""
    check_number("ignore_index", ignore_index, whole=True)
    check_number("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss)
    check_number("vocab_size", vocab_size, whole=True, optional=True)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if vocab_size is None:
        return columns
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size must be between 1 and the number of columns {columns}, got {vocab_size}"
        )
    return vocab_size


def check_targets(targets: Tensor, shape: tuple[int, ...], name: str, beside: Tensor) -> Tensor:
    """Checks the targets beside tensor `beside` called `name`; returns them as int64."""
    check_tensor("targets", targets)
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32 class indices, got {targets.dtype}")
    check_shape("targets", targets, shape, f"that of {name} without its last dimension")
    check_same_device("targets", targets, name, beside)
    return targets.to(torch.int64)


def _check_inplace(logits: Tensor) -> None:
    if not logits.requires_grad:
        return
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace_backward overwrites the logits, which must then be the result of an operation;"
            " got a leaf that requires gradients, or a view of one"
        )
    flat = rows(logits.detach())
    copied = flat.data_ptr() != logits.data_ptr()
    if copied or (flat.shape[0] > 1 and flat.stride(0) < flat.shape[1]):
        raise ValueError(
            "inplace_backward needs logits whose rows lie apart at one stride, with contiguous"
            f" columns; got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Cross-entropy of logits with class indices: lse - logit[target] + z_loss * lse^2 per row,
    where lse = log sum exp(logits).

    Args:
        logits: (..., V), float32, bfloat16 or float16; rows may be strided, as in a view
            ``padded[:, :50257]``. -inf marks a class that cannot occur.
        targets: (...), int64 or int32 class indices, or `ignore_index`.
        ignore_index: rows with this target have loss 0 and gradient 0; the mean leaves them out.
        label_smoothing: weight between 0 and 1 of the uniform distribution in the target's
            mixture, as in ``torch.nn.functional.cross_entropy``.
        z_loss: weight of the penalty on lse^2.
        reduction: "none" gives targets' shape, "mean" and "sum" a scalar.
        vocab_size: how many of the V columns are classes. The others, which pad the vocabulary,
            carry no probability whatever they hold, and get gradient 0.
        inplace_backward: the gradient overwrites the logits in backward, which saves a tensor of
            their size. The logits must not be read after backward; a second backward, or one of
            another op that saved them, raises RuntimeError. torch.compile plans memory itself and
            ignores it, and so does the reference.

    Returns:
        The loss in fp32 (fp64 for fp64 logits), whatever the logits' dtype. The mean over no rows,
        all being ignored, is nan, with gradient 0.

    Raises:
        TypeError, ValueError: a wrong argument, named.
        IndexError: a target is no class and not `ignore_index`. Found on the CPU; on other devices
            such a target breaks the contract.

    Source: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567 (label smoothing); Chowdhery et
    al. 2022, https://arxiv.org/abs/2204.02311 (z-loss).

    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = gpt2fast.functional.cross_entropy(logits, torch.tensor([0, -100]))  # -100: ignored
    >>> f"{loss.item():.4f}"  # log 4
    '1.3863'
    >>> loss.backward()
    >>> logits.grad
    tensor([[-0.7500,  0.2500,  0.2500,  0.2500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    kernels = native()
    if kernels is not None and not inplace_backward:
        options = (ignore_index, label_smoothing, z_loss, reduction)
        if way := kernels.cross_entropy_way(logits, targets, *options, vocab_size):
            classes = logits.shape[-1] if vocab_size is None else vocab_size
            return enter(
                way, autograd.CrossEntropy, logits, targets, *options, classes, False, "cpu"
            )
    check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have a last dimension of at least one, got shape {tuple(logits.shape)}"
        )
    targets = check_targets(targets, logits.shape[:-1], "logits", logits)
    options = (ignore_index, label_smoothing, z_loss, reduction)
    classes = check_options(*options, vocab_size, logits.shape[-1])
    backend = choose(logits, "cross_entropy")
    if backend == "reference":
        return reference.cross_entropy(logits, targets, *options, classes)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace and torch.is_grad_enabled():
        _check_inplace(logits)
    return apply(autograd.CrossEntropy, logits, targets, *options, classes, inplace, backend)
