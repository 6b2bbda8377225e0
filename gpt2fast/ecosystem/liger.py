"""Liger-Kernel's names: layer norm, cross-entropy, and the head fused with its loss.

The originals are described at https://github.com/linkedin/Liger-Kernel; the arguments are theirs,
in their order. As there, the loss of logits has their dtype (it is computed in fp32, and rounded at
the end), and that of the fused head is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt2fast import functional
from gpt2fast.ecosystem._refuse import check_head, refuse
from gpt2fast.ecosystem.flash_attn import reduce, z_losses
from gpt2fast.ops.checks import check_floating, check_number, check_shape

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerLayerNorm",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_layer_norm",
]


def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor | None, eps: float) -> Tensor:
    """Layer norm of X (..., C) with weight W (C,) and bias B (C,): X's shape and dtype; on
    :func:`gpt2fast.functional.layer_norm`.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    >>> liger_layer_norm(torch.randn(3, 8), torch.ones(8), torch.zeros(8), 1e-6).shape
    torch.Size([3, 8])
    """
    return functional.layer_norm(X, W, B, eps)


class LigerLayerNorm(nn.Module):
    """Layer norm over the last dimension: :func:`liger_layer_norm` as a module.

    Args:
        hidden_size: C.
        eps: added to the variance.
        bias: as in the original, whether the bias, which is there in any case, starts with random
            numbers instead of zeros.
        init_fn: "ones" or "zeros", what the weight starts with.

    The input is (..., C) of float32, bfloat16 or float16, the output of its shape and dtype.

    Raises:
        ValueError: another init_fn.

    >>> LigerLayerNorm(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, bias: bool = False, init_fn: str = "ones"
    ) -> None:
        super().__init__()
        check_number("hidden_size", hidden_size, whole=True)
        if init_fn not in ("ones", "zeros"):
            raise ValueError(f'init_fn must be "ones" or "zeros", got {init_fn!r}')
        start = torch.ones if init_fn == "ones" else torch.zeros
        self.hidden_size = hidden_size
        self.eps = self.variance_epsilon = eps
        self.weight = nn.Parameter(start(hidden_size))
        self.bias = nn.Parameter(torch.randn(hidden_size) if bias else torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return functional.layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


@dataclass
class CrossEntropyOutput:
    """What the losses give for return_z_loss, see :func:`liger_cross_entropy`.

    Attributes:
        loss, z_loss: scalar, or (N,) for reduction "none"; of the dtype that the function names.
        token_accuracy, predicted_tokens: None, since asking for them is refused.

    >>> logits, target = torch.zeros(2, 4), torch.tensor([0, 3])
    >>> liger_cross_entropy(logits, target, lse_square_scale=1.0, return_z_loss=True).z_loss
    tensor(1.9218)
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of logits (N, V) with class indices (N,); on
    :func:`gpt2fast.functional.cross_entropy`.

    Args:
        ignore_index, reduction, label_smoothing: as in torch.
        lse_square_scale: weight of lse^2 in the loss.
        softcap: the logits become softcap * tanh(logits / softcap), in fp32, which costs copies of
            them.
        return_z_loss: also return the lse^2 part of the loss, without gradient.
        weight, size_average, reduce, return_token_accuracy, return_predicted_tokens: only their
            defaults.

    Returns:
        The loss in input's dtype, or a :class:`CrossEntropyOutput`.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> liger_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    refuse(
        "liger_cross_entropy",
        weight=(weight, None),
        size_average=(size_average, None),
        reduce=(reduce, None),
        return_token_accuracy=(return_token_accuracy, False),
        return_predicted_tokens=(return_predicted_tokens, False),
    )
    check_number("lse_square_scale", lse_square_scale)
    check_floating("input", input)
    if input.dim() != 2:
        raise ValueError(f"input must have shape (N, V), got {tuple(input.shape)}")
    check_shape("target", target, tuple(input.shape[:1]), "input's rows")
    dtype = input.dtype
    _check_softcap(softcap)
    if softcap is not None:
        input = softcap * torch.tanh(input.float() / softcap)
    loss = functional.cross_entropy(
        input,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        reduction=reduction,
    ).to(dtype)
    if not return_z_loss:
        return loss
    squares = z_losses(input, target, ignore_index, lse_square_scale)
    return CrossEntropyOutput(loss, _reduced(squares, target, ignore_index, reduction).to(dtype))


_reduced = reduce  # a name that liger_cross_entropy's argument does not hide


class LigerCrossEntropyLoss(nn.Module):
    """:func:`liger_cross_entropy` as a module; the arguments are explained there.

    Takes logits (N, V) of float32, bfloat16 or float16 and targets (N,), int64.

    Raises:
        ValueError: a wrong or unsupported argument, named.

    >>> LigerCrossEntropyLoss(reduction="sum")(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(2.7726)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        refuse(
            "LigerCrossEntropyLoss",
            weight=(weight, None),
            return_token_accuracy=(return_token_accuracy, False),
            return_predicted_tokens=(return_predicted_tokens, False),
        )
        _check(label_smoothing, reduction)
        _check_softcap(softcap)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """_input (N, V), target (N,) -> the loss, or :class:`CrossEntropyOutput`."""
        return liger_cross_entropy(
            _input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            return_z_loss=self.return_z_loss,
        )


def _check_softcap(softcap: float | None) -> None:
    check_number("softcap", softcap, optional=True)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def _check(label_smoothing: float, reduction: str) -> None:
    check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of input @ weight.T with target; the logits never exist whole.

    Args:
        input: (N, C). weight: (V, C). target: (N,) class indices.
        ignore_index, lse_square_scale, label_smoothing, reduction, return_z_loss: as for
            :func:`liger_cross_entropy`.
        accum_dtype: any of None and fp32; gradients are always accumulated in fp32.
        bias, ce_weight, softcap, use_token_scaling, return_token_accuracy,
        return_predicted_tokens: only their defaults.

    Returns:
        The loss in fp32, or a :class:`CrossEntropyOutput`.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> liger_fused_linear_cross_entropy(
    ...     torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([0, 3])
    ... )
    tensor(1.3863)
    """
    refuse(
        "liger_fused_linear_cross_entropy",
        bias=(bias, None),
        ce_weight=(ce_weight, None),
        softcap=(softcap, None),
        use_token_scaling=(use_token_scaling, False),
        return_token_accuracy=(return_token_accuracy, False),
        return_predicted_tokens=(return_predicted_tokens, False),
    )
    check_number("lse_square_scale", lse_square_scale)
    check_head("input", input, "weight", weight, "target", target)
    if accum_dtype not in (None, torch.float32):
        raise ValueError(f"accum_dtype must be None or torch.float32, got {accum_dtype}")
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": lse_square_scale,
        "reduction": reduction,
    }
    if not return_z_loss:
        return functional.linear_cross_entropy(input, weight, target, **options)
    loss, logprobs = functional.linear_cross_entropy(
        input, weight, target, return_logprobs=True, **options
    )
    with torch.no_grad():
        kept = target != ignore_index
        rows = weight[torch.where(kept, target, 0)]
        lse = (input.to(logprobs.dtype) * rows.to(logprobs.dtype)).sum(-1) - logprobs
        z_loss = torch.where(kept, lse_square_scale * lse.square(), 0.0)
    return CrossEntropyOutput(loss, _reduced(z_loss, target, ignore_index, reduction))


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """:func:`liger_fused_linear_cross_entropy` as a module; the arguments are explained there.

    Takes the weight (V, C) and inputs (N, C), float32, bfloat16 or float16, and targets (N,), int64.

    Raises:
        ValueError: a wrong or unsupported argument, named.

    >>> loss = LigerFusedLinearCrossEntropyLoss()
    >>> loss(torch.zeros(4, 8), torch.zeros(2, 8), torch.tensor([0, 3]))
    tensor(1.3863)
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        refuse(
            "LigerFusedLinearCrossEntropyLoss",
            ce_weight=(ce_weight, None),
            softcap=(softcap, None),
            use_token_scaling=(use_token_scaling, False),
            return_token_accuracy=(return_token_accuracy, False),
            return_predicted_tokens=(return_predicted_tokens, False),
        )
        _check(label_smoothing, reduction)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """lin_weight (V, C), _input (N, C), target (N,) -> the loss, or :class:`CrossEntropyOutput`."""
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            return_z_loss=self.return_z_loss,
            accum_dtype=self.accum_dtype,
        )
