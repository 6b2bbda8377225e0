"""Logits that come into being only when somebody looks at them.

A language-modelling head in training gives (..., V) logits of which nearly every script wants one
thing: their cross-entropy. :class:`LazyLogits` is what the swapped head returns instead: a tensor
that knows the head's input and weight. `torch.nn.functional.cross_entropy` of it, after the usual
reshaping, runs :func:`gpt2fast.functional.linear_cross_entropy`, and the logits never exist whole.
Everything else that touches it computes the logits first and goes on with them, gradients included:
they are what the plain head would have given, only later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from gpt2fast import functional
from gpt2fast.backends import constant_in_graphs
from gpt2fast.nn import has_hooks
from gpt2fast.swap.report import fast_forward, original

_transforms_active = torch._C._are_functorch_transforms_active


class LazyLogits(Tensor):
    """``hidden @ weight.T`` over the first `shape[-1]` rows of weight, not computed yet.

    Not made directly: a head that :func:`gpt2fast.optimize` or
    :func:`gpt2fast.apply_gpt2fast_to_gpt2` replaced returns it in training.

    Looking at the values after the weights were changed in place (``optimizer.step()``) raises
    RuntimeError: the logits that the loss was computed from are gone.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False))
    >>> report = gpt2fast.optimize(model)
    >>> logits = model(torch.arange(4))
    >>> loss = nn.functional.cross_entropy(logits, torch.arange(4))
    >>> logits.shape, logits.is_computed()
    (torch.Size([4, 30]), False)
    """

    hidden: Tensor
    weight: Tensor
    _versions: tuple[int, int]
    _real: Tensor | None

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        handler = _HANDLERS.get(function)
        if handler is not None and args and isinstance(args[0], cls) and not args[0].is_computed():
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(*tree_map(_computed, args), **tree_map(_computed, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return function(*tree_map(_computed, args), **tree_map(_computed, kwargs or {}))

    def is_computed(self) -> bool:
        """Whether the logits exist, with their gradients: from then on they are used as they are."""
        return self.__dict__["_real"] is not None

    def compute(self) -> Tensor:
        """The logits as a plain tensor."""
        parts = self.__dict__
        real = parts["_real"]
        if real is None:
            hidden, weight = _unchanged(self)
            with torch.autocast(hidden.device.type, enabled=False):  # cast when this was made
                real = F.linear(hidden, weight[: parts["_classes"]]).to(parts["_dtype"])
            if torch.is_grad_enabled():
                parts["_real"] = real
        return real


class _Head(torch.autograd.Function):
    """The node that makes a LazyLogits part of the graph, for those who walk it (DDP)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, classes: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return Tensor._make_wrapper_subclass(
            LazyLogits, (*hidden.shape[:-1], classes), dtype=dtype, device=hidden.device
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(hidden.dtype)
        rows = gradient.flatten(0, -2)
        dweight = torch.zeros_like(weight)
        dweight[: rows.shape[1]] = rows.t() @ hidden.flatten(0, -2)
        return gradient @ weight[: rows.shape[1]], dweight, None, None


def _make(hidden: Tensor, weight: Tensor, classes: int, dtype: torch.dtype) -> LazyLogits:
    logits = _Head.apply(hidden, weight, classes, dtype)
    logits.__dict__.update(
        _hidden=hidden,
        _weight=weight,
        _classes=classes,
        _dtype=dtype,
        _versions=(hidden._version, weight._version),
        _real=None,
    )
    return logits


def _unchanged(logits: LazyLogits) -> tuple[Tensor, Tensor]:
    parts = logits.__dict__
    hidden, weight = parts["_hidden"], parts["_weight"]
    if parts["_versions"] != (hidden._version, weight._version):
        raise RuntimeError(
            "these logits were never computed (gpt2fast fused the head with its loss), and the"
            " weights have changed since; look at them before optimizer.step(), or swap with"
            " loss=False"
        )
    return hidden, weight


def _like(logits: LazyLogits, hidden: Tensor, classes: int | None = None) -> LazyLogits:
    parts = logits.__dict__
    _unchanged(logits)
    made = _make(
        hidden, parts["_weight"], parts["_classes"] if classes is None else classes, parts["_dtype"]
    )
    made.__dict__["_versions"] = (hidden._version, parts["_versions"][1])
    return made


def _computed(value: Any) -> Any:
    return value.compute() if isinstance(value, LazyLogits) else value


def _reshape(logits: LazyLogits, *shape: Any, **kwargs: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if kwargs or not shape or not all(isinstance(n, int) for n in shape):
        return NotImplemented
    classes = logits.__dict__["_classes"]
    hidden = logits.__dict__["_hidden"]
    if shape[-1] == -1 and -1 not in shape[:-1]:
        rest = torch.Size(shape[:-1]).numel()
        if rest != hidden.shape[:-1].numel():
            return NotImplemented
    elif shape[-1] != classes:
        return NotImplemented
    return _like(logits, hidden.reshape(*shape[:-1], hidden.shape[-1]))


def _flatten(logits: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    hidden = logits.__dict__["_hidden"]
    last = hidden.dim() - 1
    if end_dim % hidden.dim() >= last:
        return NotImplemented
    return _like(logits, hidden.flatten(start_dim, end_dim))


def _contiguous(logits: LazyLogits, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _like(logits, logits.__dict__["_hidden"].contiguous())


def _cast(logits: LazyLogits, dtype: torch.dtype) -> LazyLogits:
    if dtype == logits.__dict__["_dtype"]:
        return logits
    parts = logits.__dict__
    made = _like(logits, parts["_hidden"])
    cast = _make(parts["_hidden"], parts["_weight"], parts["_classes"], dtype)
    cast.__dict__["_versions"] = made.__dict__["_versions"]
    return cast


def _to(logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and args[0] is torch.float32 and not kwargs:
        return _cast(logits, torch.float32)
    return NotImplemented


def _select(logits: LazyLogits, index: Any) -> Any:
    """``logits[...]`` where it takes whole rows, or the first classes of all rows."""
    parts = logits.__dict__
    hidden, classes = parts["_hidden"], parts["_classes"]
    if type(index) is Tensor:
        rows = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
        return _like(logits, hidden[index]) if rows < hidden.dim() else NotImplemented
    entries = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(e, (slice, int)) or e is Ellipsis for e in entries):
        return NotImplemented
    if sum(e is Ellipsis for e in entries) > 1:
        return NotImplemented
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        missing = hidden.dim() - (len(entries) - 1)
        entries = (*entries[:at], *[slice(None)] * missing, *entries[at + 1 :])
    if len(entries) > hidden.dim():
        return NotImplemented
    if len(entries) == hidden.dim():
        entries, last = entries[:-1], entries[-1]
        if not isinstance(last, slice):
            return NotImplemented
        begin, end, step = last.indices(classes)
        if begin != 0 or step != 1 or end < 1:
            return NotImplemented
        classes = end
    return _like(logits, hidden[entries], classes)


def _cross_entropy(
    input: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    parts = input.__dict__
    plain = (
        weight is None
        and size_average is None
        and reduce is None
        and len(input.shape) == 2
        and type(target) is Tensor
        and target.dim() == 1
        and target.dtype == torch.int64
    )
    if not plain:
        return NotImplemented
    hidden, head = _unchanged(input)
    loss = functional.linear_cross_entropy(
        hidden,
        head,
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        vocab_size=parts["_classes"],
    )
    # torch's loss has the logits' dtype, but under autocast fp32
    return loss if torch.is_autocast_enabled(hidden.device.type) else loss.to(parts["_dtype"])


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.contiguous: _contiguous,
    Tensor.float: lambda logits: _cast(logits, torch.float32),
    Tensor.to: _to,
    Tensor.__getitem__: _select,
}

_ATTRIBUTES: tuple[str, ...] = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested"),
)

#: What describes a tensor without reading it.
_DESCRIBING: set[Any] = {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.__len__,
    Tensor.is_floating_point,
    torch.is_floating_point,
    torch.numel,
    Tensor.get_device,
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
}


@constant_in_graphs
def _may_leave_the_graph() -> bool:
    """Whether the graph that is being captured may end here: not with fullgraph=True or in export."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        return not (tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError, RuntimeError):  # another torch: keep the graph whole
        return False


@fast_forward
def lazy_head(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward of a head: plain logits, but lazy ones in training.

    In torch.compile the graph ends before the head, where it may; head and loss run outside. With
    fullgraph=True the logits are plain.
    """
    if torch.compiler.is_compiling():
        return _outside(self, input) if _may_leave_the_graph() else original(self, input)
    weight = self.weight
    if (
        not self.training
        or torch.jit.is_tracing()
        or not torch.is_grad_enabled()
        or _transforms_active()
        or self.bias is not None
        or has_hooks(self)  # FSDP frees the weight behind the head; others want to see logits
        or type(input) is not Tensor
        or type(weight) is not nn.Parameter  # a shard, or a view that FSDP frees after forward
        or not (weight.requires_grad or input.requires_grad)
        or input.dim() < 2
        or input.shape[-1] != weight.shape[1]
        or input.device != weight.device
    ):
        return original(self, input)
    device = input.device.type
    head: Tensor = weight
    if torch.is_autocast_enabled(device):
        cast = torch.get_autocast_dtype(device)
        input, head = (t.to(cast) if t.dtype == torch.float32 else t for t in (input, weight))
    if input.dtype != head.dtype:
        return original(self, input)
    return _make(input, head, head.shape[0], input.dtype)


def _outside(head: nn.Linear, input: Tensor) -> Tensor:
    return lazy_head(head, input)


# Handlers, too: a part of a script that is compiled may get lazy logits as an argument.
_outside = torch._disable_dynamo(_outside)
_make = torch._disable_dynamo(_make)
