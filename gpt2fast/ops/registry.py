"""How an op is registered with PyTorch: schema, implementation, fake."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("gpt2fast", "DEF")
DEVICES = ("CPU", "CUDA")


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines ``torch.ops.gpt2fast.<name>`` from its schema and returns it.

    `implementation` serves every device: it looks its backend up by the op's `backend` argument.
    `fake` gives the outputs' shapes, dtypes and strides without reading data. The op has no
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
    return getattr(torch.ops.gpt2fast, name).default


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as (rows, columns) with contiguous columns: a view wherever its strides allow."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


def pointer(tensor: torch.Tensor | None) -> int:
    """The address that a kernel gets; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


#: The dtype codes of csrc/common/simd.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` may call its implementation without PyTorch's dispatcher.

    That saves some 15 us a call, which small ops notice. Not where something watches or traces:
    torch.compile, fake tensors, tensor subclasses, dispatch modes.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
    )
