"""How an op is registered with PyTorch: schema, implementation, fake."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from gpt2fast.backends import native

LIBRARY = torch.library.Library("gpt2fast", "DEF")
DEVICES = ("CPU", "CUDA")

#: By the op's id, since its hash is slow: what runs where nobody watches, and the name of the C++
#: function on PyTorch's tensors that serves its common case.
_implementations: dict[int, tuple[Callable[..., Any], str | None]] = {}


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    in_cpp: bool = False,
) -> Callable[..., Any]:
    """Defines ``torch.ops.gpt2fast.<name>`` from its schema and returns it.

    `implementation` serves every device: it looks its backend up by the op's `backend` argument.
    `fake` gives the outputs' shapes, dtypes and strides without reading data. `in_cpp`: there is a
    C++ function of the op's name on PyTorch's tensors, which returns None for what it does not serve.
    The op has no
    autograd formula: an ``autograd.Function`` calls it, which costs less a call than
    ``register_autograd``.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def without_autocast(*args: Any, **kwargs: Any) -> Any:
        # Inputs were cast in `functional`; matrix products inside a backend keep their dtypes.
        inputs = (t for a in args for t in (a if isinstance(a, list) else (a,)))
        device = next(t for t in inputs if isinstance(t, torch.Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return implementation(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return implementation(*args, **kwargs)

    for device in DEVICES:
        LIBRARY.impl(name, without_autocast, device)
    torch.library.register_fake(f"gpt2fast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.gpt2fast, name).default
    _implementations[id(op)] = implementation, name if in_cpp else None
    return op


def call(op: Callable[..., Any], tensor: torch.Tensor, *rest: Any) -> Any:
    """``op(tensor, *rest)``, around PyTorch's dispatcher where nothing needs it: some 15 us."""
    if torch.compiler.is_compiling():  # the compiler of PyTorch 2.11 knows no id of an op
        return op(tensor, *rest)
    implementation, name = _implementations[id(op)]
    if name is not None and (kernels := native()) is not None:
        found = getattr(kernels, name)(tensor, *rest)
        if found is not None:
            return found
    return (implementation if is_plain(tensor, *rest) else op)(tensor, *rest)


#: What the C++ functions that look at a call's arguments say, where they say anything: how it is to
#: go on. See csrc/bindings/tensors.h.
PYTORCH, WITHOUT_GRADIENT, WITH_GRADIENT = 1, 2, 3


def enter(way: int, function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)`` where C++ has checked them."""
    if way == WITH_GRADIENT:
        return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
    return function.forward(_NoBackward(), *arguments)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch.autograd.function.once_differentiable, of which a backward pass that is not itself
    differentiated has no need: it costs 8 us."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def either(*arguments: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(*arguments)

    return either


class _NoBackward:
    """A Function's ctx where no backward pass will come: it keeps nothing alive."""

    def save_for_backward(self, *_: Any) -> None:
        pass

    mark_non_differentiable = set_materialize_grads = save_for_backward


def apply(function: type[torch.autograd.Function], tensor: torch.Tensor, *rest: Any) -> Any:
    """``function.apply(tensor, *rest)``, without what that does in Python for torch.func: 10 us;
    where nothing asks for a gradient, ``function.forward`` by itself: 10 us more."""
    # Of forward mode a Function says that it is not there; an op by itself would lose the tangent.
    if not is_plain(tensor, *rest) or forward_ad._current_level >= 0:
        return function.apply(tensor, *rest)
    if torch.is_grad_enabled():
        for argument in (tensor, *rest):
            if isinstance(argument, torch.Tensor) and argument.requires_grad:
                return super(torch.autograd.Function, function).apply(tensor, *rest)  # type: ignore[misc]
    return function.forward(_NoBackward(), tensor, *rest)


_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_autocast_enabled = torch._C._is_any_autocast_enabled
_profiler_enabled = torch.autograd._profiler_enabled


#: An op's arguments that kernels take as they are: a subclass of Tensor (DTensor, FakeTensor) may
#: have no data behind its address.
PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def is_eager(*arguments: Any) -> bool:
    """Whether nobody traces or transforms what is done with an op's arguments."""
    return (
        not torch.compiler.is_compiling()
        and PLAIN_TYPES.issuperset(map(type, arguments))
        and not _transforms_active()
        and not _dispatch_modes()
    )


def is_plain(*arguments: Any) -> bool:
    """Whether nobody watches, traces or transforms what is done with an op's arguments."""
    return is_eager(*arguments) and not _autocast_enabled() and not _profiler_enabled()


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor of `tensor`'s shape and dtype, in the least time."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor)
    return tensor.new_empty(tensor.shape)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as (rows, columns) with contiguous columns: a view wherever its strides allow."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


def shaped(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Contiguous `tensor` in the shape of `like`; a view costs as much as an allocation."""
    return tensor if tensor.dim() == like.dim() else tensor.view(like.shape)


def dropout_numbers(dropout_p: float) -> tuple[float, int]:
    """What kept values are multiplied by, and the 24 bits of hash from which a value is kept."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0, int(dropout_p * 2**24 + 0.5)


def pointer(tensor: torch.Tensor | None) -> int:
    """The address that a kernel gets; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


#: The dtype codes of csrc/common/simd.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
