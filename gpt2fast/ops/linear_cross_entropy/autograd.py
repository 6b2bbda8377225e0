"""Linear + cross-entropy as torch.library ops and the autograd Function on them."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import load, native
from gpt2fast.ops.linear.cpu import preference
from gpt2fast.ops.registry import call, once_differentiable, register, rows


def _forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    chunk_bytes: int,
    need_dx: bool,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    loss, logprobs, statistics, dx, dweight = load("linear_cross_entropy", backend).forward(
        rows(x),
        weight,
        targets.reshape(-1).contiguous(),
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        vocab_size,
        chunk_bytes,
        need_dx,
        need_dweight,
    )
    if reduction == "none":
        loss = loss.view(targets.shape)
    dx = None if dx is None else dx.view(x.shape)
    return loss, logprobs.view(targets.shape), statistics, dx, dweight


def _backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    chunk_bytes: int,
    need_dx: bool,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    dx, dweight = load("linear_cross_entropy", backend).backward(
        dloss,
        rows(x),
        weight,
        targets.reshape(-1).contiguous(),
        statistics,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        vocab_size,
        chunk_bytes,
        need_dx,
        need_dweight,
    )
    return None if dx is None else dx.view(x.shape), dweight


def _scale(gradient: Tensor, factor: Tensor, backend: str) -> None:
    load("linear_cross_entropy", backend).scale(gradient, factor)


def _fake_gradients(
    x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    return (
        x.new_empty(x.shape, dtype=torch.float32) if need_dx else None,
        weight.new_empty(weight.shape, dtype=torch.float32) if need_dweight else None,
    )


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    chunk_bytes: int,
    need_dx: bool,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    shape = targets.shape if reduction == "none" else ()
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(targets.shape, dtype=torch.float32),
        x.new_empty((targets.numel(), 2), dtype=torch.float32),
        *_fake_gradients(x, weight, need_dx, need_dweight),
    )


def _fake_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    chunk_bytes: int,
    need_dx: bool,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    return _fake_gradients(x, weight, need_dx, need_dweight)


def _fake_scale(gradient: Tensor, factor: Tensor, backend: str) -> None:
    return None


_OPTIONS = (
    "int ignore_index, float label_smoothing, float z_loss, str reduction, SymInt vocab_size,"
    " SymInt chunk_bytes, bool need_dx, bool need_dweight, str backend"
)

linear_cross_entropy_forward = register(
    f"linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor targets, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor?, Tensor?)",
    _forward,
    _fake_forward,
)
linear_cross_entropy_backward = register(
    "linear_cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor targets,"
    f" Tensor statistics, {_OPTIONS}) -> (Tensor?, Tensor?)",
    _backward,
    _fake_backward,
)
linear_cross_entropy_scale = register(
    "linear_cross_entropy_scale(Tensor(a!) gradient, Tensor factor, str backend) -> ()",
    _scale,
    _fake_scale,
)


def _in_one_piece(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    chunk_bytes: int,
    need_dx: bool,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """The op by one call of C++, where it serves that; or None."""
    kernels = native() if backend == "cpu" else None
    if kernels is None:
        return None
    options = (ignore_index, label_smoothing, z_loss, reduction, vocab_size)
    needs = (need_dx, need_dweight)
    return kernels.linear_cross_entropy_forward(x, weight, targets, *options, *needs, preference())


class LinearCrossEntropy(torch.autograd.Function):
    """Returns (loss, logprobs). A reduced loss has its gradients computed in forward.

    In eager mode these are handed out, not copied, by the first backward; a second one over a
    retained graph computes them again. A compiled graph can do neither, and keeps them as saved
    tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        reduction: str,
        vocab_size: int,
        chunk_bytes: int,
        need_dx: bool,
        need_dweight: bool,
        compiling: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        options = (ignore_index, label_smoothing, z_loss, reduction, vocab_size, chunk_bytes)
        early = reduction != "none"
        needs = (need_dx and early, need_dweight and early)
        given = (x, weight, targets, *options)
        found = _in_one_piece(*given, *needs, backend)
        if found is None:
            found = call(linear_cross_entropy_forward, *given, *needs, backend)
        loss, logprobs, statistics, dx, dweight = found
        kept = (dx, dweight) if compiling else (None, None)
        ctx.save_for_backward(x, weight, targets, statistics, *kept)
        ctx.gradients = None if compiling or not early else (dx, dweight)
        ctx.options, ctx.needs = options, (need_dx, need_dweight)
        ctx.compiled = compiling and early
        ctx.dtypes, ctx.backend = (x.dtype, weight.dtype), backend
        ctx.mark_non_differentiable(logprobs)
        return loss, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.compiled:
            gradients = [None if g is None else g * dloss for g in ctx.saved_tensors[4:]]
        elif ctx.gradients is not None:
            # The weights may have changed since forward: the saved tensors are not looked at.
            gradients, ctx.gradients = ctx.gradients, None
            for gradient in gradients:
                if gradient is not None and (ctx.backend != "cpu" or dloss.item() != 1.0):
                    call(linear_cross_entropy_scale, gradient, dloss, ctx.backend)
        else:
            x, weight, targets, statistics, *_kept = ctx.saved_tensors
            given = (x, weight, targets, *ctx.options, *ctx.needs, ctx.backend)
            again = _in_one_piece(*given)
            if again is not None:  # the bits of the first backward
                gradients = list(again[3:])
                for gradient in gradients:
                    if gradient is not None:
                        call(linear_cross_entropy_scale, gradient, dloss, ctx.backend)
            else:
                gradients = call(
                    linear_cross_entropy_backward,
                    dloss,
                    x,
                    weight,
                    targets,
                    statistics,
                    *ctx.options,
                    *ctx.needs,
                    ctx.backend,
                )
        cast = [
            g if g is None or g.dtype == dtype else g.to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *cast, *[None] * 11
