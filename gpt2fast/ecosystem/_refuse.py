"""How an argument of another package that has no meaning here is refused."""

from typing import Any

from torch import Tensor


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
