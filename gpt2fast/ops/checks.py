"""Argument checks shared by the public functions: each error names the argument, what came, what is
wanted."""

import torch
from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless `tensor` holds floating-point numbers."""
    check_tensor(name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless `tensor` has `shape`, which `meaning` explains."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} ({meaning}), got {tuple(tensor.shape)}"
        )


def check_same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if a.device != b.device:
        raise ValueError(f"{first} is on {a.device} but {second} is on {b.device}")


def check_same_dtype(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raises TypeError unless both tensors have one dtype."""
    if a.dtype != b.dtype:
        raise TypeError(f"{first} is {a.dtype} but {second} is {b.dtype}")


def check_parameter(
    name: str,
    parameter: Tensor | None,
    x_name: str,
    x: Tensor,
    shape: tuple[int, ...],
    meaning: str,
) -> None:
    """Checks an optional weight or bias: floating point, on x's device, of the shape wanted."""
    if parameter is None or (
        isinstance(parameter, Tensor)  # all in one, for speed
        and parameter.shape == shape
        and parameter.dtype.is_floating_point
        and parameter.device == x.device
    ):
        return
    check_floating(name, parameter)
    check_shape(name, parameter, shape, meaning)
    check_same_device(name, parameter, x_name, x)


def check_number(name: str, value: object, *, whole: bool = False, optional: bool = False) -> None:
    """Raises TypeError unless `value` is a number: one of Python, numpy or a graph, or a tensor of
    one element; `whole`: an integer; `optional`: or None."""
    if isinstance(value, int if whole else (int, float)) or (optional and value is None):
        return
    if not (hasattr(value, "__index__") or (hasattr(value, "__float__") and not whole)):
        wanted = ("an int" if whole else "a number") + (" or None" if optional else "")
        raise TypeError(f"{name} must be {wanted}, got {value!r}, a {type(value).__name__}")


def check_dropout(dropout_p: float) -> None:
    """Raises unless `dropout_p` is a probability."""
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie between 0 and 1, got {dropout_p}")


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """One number of torch's generator, kept as a tensor so that nothing waits for a GPU."""
    if dropout_p == 0.0:
        return None
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """fp32 tensors in autocast's dtype where autocast is on, as torch does for matrix products."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype != torch.float32 else t.to(dtype) for t in tensors)


def distinct(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors, a repeated one as a view: torch.compile takes no tensor twice in a Function."""
    if not torch.compiler.is_compiling():
        return tensors  # type: ignore[return-value]
    seen: list[Tensor] = []
    for tensor in tensors:
        assert tensor is not None
        seen.append(tensor.view_as(tensor) if any(tensor is other for other in seen) else tensor)
    return tuple(seen)
