"""How an argument of another package that is wrong, or has no meaning here, is refused."""

from typing import Any

from torch import Tensor

from gpt2fast.ops.checks import check_floating, check_shape, check_tensor


def refuse(function: str, **given: tuple[Any, Any]) -> None:
    """Raises ValueError for the first argument whose value is not the one supported.

    Each keyword is ``argument=(value, supported value)``.
    """
    for name, (value, supported) in given.items():
        same = value is supported or (
            not isinstance(value, Tensor) and type(value) is type(supported) and value == supported
        )
        if isinstance(value, (int, float, list, tuple)) and not same:
            same = (tuple(value) if isinstance(value, list) else value) == supported
        if not same:
            shown = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            )
            raise ValueError(
                f"{name}={shown} is not supported by gpt2fast's {function}, only {supported!r} is"
            )


def check_head(
    x_name: str, x: Tensor, weight_name: str, weight: Tensor, targets_name: str, targets: Tensor
) -> None:
    """The shapes of a head's inputs (..., C), weight (V, C) and targets (...), under their names
    in the package."""
    check_floating(x_name, x)
    check_floating(weight_name, weight)
    check_tensor(targets_name, targets)
    if x.dim() < 1:
        raise ValueError(f"{x_name} must have a last dimension, got shape ()")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{weight_name} must have shape (V, {x.shape[-1]}) (the last dimension of {x_name}), got"
            f" {tuple(weight.shape)}"
        )
    meaning = f"{x_name}'s without its last dimension"
    check_shape(targets_name, targets, tuple(x.shape[:-1]), meaning)
