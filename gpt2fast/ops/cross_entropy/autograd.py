"""Cross-entropy as torch.library ops and the autograd Function on them."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import load
from gpt2fast.ops.registry import call, once_differentiable, register, rows


def _forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    loss, statistics = load("cross_entropy", backend).forward(
        rows(logits),
        targets.reshape(-1).contiguous(),
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        vocab_size,
    )
    return loss.view(targets.shape) if reduction == "none" else loss, statistics


def _write_gradient(
    dloss: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, dlogits: Tensor, *rest: Any
) -> None:
    *arguments, backend = rest
    load("cross_entropy", backend).backward(
        dloss.reshape(-1),
        rows(logits),
        targets.reshape(-1).contiguous(),
        statistics,
        dlogits,
        *arguments,
    )


def _backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    backend: str,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    rest = (ignore_index, label_smoothing, z_loss, reduction, vocab_size, backend)
    _write_gradient(dloss, logits, targets, statistics, rows(dlogits), *rest)
    return dlogits


def _backward_inplace(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    backend: str,
) -> None:
    rest = (ignore_index, label_smoothing, z_loss, reduction, vocab_size, backend)
    # A view, because `functional` lets only such layouts through.
    _write_gradient(dloss, logits, targets, statistics, rows(logits), *rest)


def _fake_forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = targets.shape if reduction == "none" else ()
    loss = logits.new_empty(shape, dtype=torch.float32)
    return loss, logits.new_empty((targets.numel(), 2), dtype=torch.float32)


def _fake_backward(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_backward_inplace(*arguments: Any) -> None:
    return None


_OPTIONS = (
    "int ignore_index, float label_smoothing, float z_loss, str reduction, SymInt vocab_size,"
    " str backend"
)

cross_entropy_forward = register(
    f"cross_entropy_forward(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    in_cpp=True,
)
cross_entropy_backward = register(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor statistics,"
    f" {_OPTIONS}) -> Tensor",
    _backward,
    _fake_backward,
    in_cpp=True,
)
cross_entropy_backward_inplace = register(
    "cross_entropy_backward_inplace(Tensor dloss, Tensor(a!) logits, Tensor targets,"
    f" Tensor statistics, {_OPTIONS}) -> ()",
    _backward_inplace,
    _fake_backward_inplace,
)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        reduction: str,
        vocab_size: int,
        inplace: bool,
        backend: str,
    ) -> Tensor:
        options = (ignore_index, label_smoothing, z_loss, reduction, vocab_size, backend)
        loss, statistics = call(cross_entropy_forward, logits, targets, *options)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.options, ctx.inplace = options, inplace
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # Raises where the logits were written to since, as by an in-place backward before this one.
        logits, targets, statistics = ctx.saved_tensors
        if ctx.inplace:
            dlogits = logits.detach()
            call(cross_entropy_backward_inplace, dloss, dlogits, targets, statistics, *ctx.options)
            # Ops defined through a Library do not count their writes themselves.
            torch.autograd.graph.increment_version(dlogits)
        else:
            dlogits = call(cross_entropy_backward, dloss, logits, targets, statistics, *ctx.options)
        return dlogits, *[None] * 8
