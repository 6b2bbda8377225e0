"""gpt2fast: GPT-2 made fast by kernels that are tested against plain PyTorch.

>>> import gpt2fast, torch
>>> y = gpt2fast.functional.layer_norm(torch.randn(4, 768))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2fast import backends, decoding, ecosystem, functional, nn, optim, swap
    from gpt2fast.backends import BackendUnavailable, keep_freed_memory, use_backend
    from gpt2fast.generation import generate
    from gpt2fast.model import GPT, GPTConfig, KVCache
    from gpt2fast.swap import apply_gpt2fast_to_gpt2, optimize

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "BackendUnavailable",
    "GPTConfig",
    "KVCache",
    "apply_gpt2fast_to_gpt2",
    "backends",
    "decoding",
    "ecosystem",
    "functional",
    "generate",
    "keep_freed_memory",
    "nn",
    "optim",
    "optimize",
    "swap",
    "use_backend",
]

# Loaded at first use: `gpt2fast --help` does not wait for PyTorch.
_HOMES = {
    "BackendUnavailable": "gpt2fast.backends",
    "keep_freed_memory": "gpt2fast.backends",
    "use_backend": "gpt2fast.backends",
    "generate": "gpt2fast.generation",
    "GPT": "gpt2fast.model",
    "GPTConfig": "gpt2fast.model",
    "KVCache": "gpt2fast.model",
    "apply_gpt2fast_to_gpt2": "gpt2fast.swap",
    "optimize": "gpt2fast.swap",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"gpt2fast.{name}")
    else:
        raise AttributeError(f"module 'gpt2fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
