"""The public linear + cross-entropy function."""

from typing import Literal, overload

import torch
from torch import Tensor

from gpt2fast.backends import choose, native
from gpt2fast.ops.checks import (
    autocast,
    check_floating,
    check_number,
    check_same_device,
    check_same_dtype,
)
from gpt2fast.ops.cross_entropy.functional import check_options, check_targets
from gpt2fast.ops.linear.cpu import preference
from gpt2fast.ops.linear_cross_entropy import autograd, reference
from gpt2fast.ops.registry import WITH_GRADIENT, apply, enter

#: By device. Every chunk reads and writes the weight gradient once more, 308 MB for GPT-2; on a GPU
#: a chunk of bf16 logits is 10,000 rows, enough for its matrix products to run at full rate.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    reduction: str = ...,
    vocab_size: int | None = ...,
    chunk_bytes: int | None = ...,
    return_logprobs: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    reduction: str = ...,
    vocab_size: int | None = ...,
    chunk_bytes: int | None = ...,
    return_logprobs: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    return_logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(x @ weight.T, targets)`` in chunks of rows: the logits never exist whole.

    With reduction "mean" or "sum", and where gradients are wanted, forward computes them too, while
    a chunk's logits are there; backward scales them, and a second backward over a retained graph
    computes them again. With "none", backward computes the logits a second time.

    Args:
        x: (..., C), float32, bfloat16 or float16.
        weight: (V, C), x's dtype: the head, which may be tied to the token embedding. Under
            autocast both are cast where they are float32.
        targets: (...), int64 or int32 class indices, or `ignore_index`.
        ignore_index, label_smoothing, z_loss, reduction: as for
            :func:`gpt2fast.functional.cross_entropy`.
        vocab_size: how many rows of weight are classes. The others are not read and get gradient 0.
        chunk_bytes: bytes of logits that may exist at a time (at least one row does); by default
            128 MiB on a CPU and 1 GiB on a GPU.
        return_logprobs: also return the log-probability of every target.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs); with `return_logprobs` also the log-probabilities:
        targets' shape, same dtype, no gradient, 0 at ignored targets, without smoothing and z-loss.

    Raises:
        TypeError, ValueError: a wrong argument, named.
        IndexError: a target is no class and not `ignore_index` (found on the CPU; elsewhere such a
            target breaks the contract).

    >>> x, weight = torch.zeros(2, 3, 8), torch.randn(5, 8, requires_grad=True)
    >>> loss = gpt2fast.functional.linear_cross_entropy(x, weight, torch.zeros(2, 3, dtype=torch.int64))
    >>> f"{loss.item():.4f}"  # log 5
    '1.6094'
    >>> loss.backward()
    >>> weight.grad.shape
    torch.Size([5, 8])
    """
    options = (ignore_index, label_smoothing, z_loss, reduction)
    kernels = native()
    if kernels is not None and chunk_bytes is None:
        given = (x, weight, targets)
        if way := kernels.linear_cross_entropy_way(*given, *options, vocab_size, preference()):
            classes = weight.shape[0] if vocab_size is None else vocab_size
            needs = (
                way == WITH_GRADIENT and x.requires_grad,
                way == WITH_GRADIENT and weight.requires_grad,
            )
            found = enter(
                way,
                autograd.LinearCrossEntropy,
                *given,
                *options,
                classes,
                CHUNK_BYTES["cpu"],
                *needs,
                False,
                "cpu",
            )
            return found if return_logprobs else found[0]
    check_floating("x", x)
    check_floating("weight", weight)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have a last dimension of at least one, got shape {tuple(x.shape)}"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (vocabulary, {x.shape[-1]}) (the last dimension of x), got"
            f" {tuple(weight.shape)}"
        )
    check_same_device("weight", weight, "x", x)
    x, weight = autocast(x, weight)  # type: ignore[assignment]
    check_same_dtype("weight", weight, "x", x)
    targets = check_targets(targets, x.shape[:-1], "x", x)
    classes = check_options(*options, vocab_size, weight.shape[0])
    check_number("chunk_bytes", chunk_bytes, whole=True, optional=True)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(x.device.type, 128 << 20)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    backend = choose(x, "linear_cross_entropy")
    if backend == "reference":
        loss, logprobs = reference.linear_cross_entropy(x, weight, targets, *options, classes)
    else:
        wanted = torch.is_grad_enabled()
        loss, logprobs = apply(
            autograd.LinearCrossEntropy,
            x,
            weight,
            targets,
            *options,
            classes,
            chunk_bytes,
            wanted and x.requires_grad,
            wanted and weight.requires_grad,
            torch.compiler.is_compiling(),
            backend,
        )
    return (loss, logprobs) if return_logprobs else loss
