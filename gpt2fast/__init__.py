"""gpt2fast: GPT-2 made fast by kernels that are tested against plain PyTorch.

>>> import gpt2fast, torch
>>> y = gpt2fast.functional.layer_norm(torch.randn(4, 768))
"""

from gpt2fast import functional, nn, optim
from gpt2fast.backends import BackendUnavailable, keep_freed_memory, use_backend
from gpt2fast.generation import generate
from gpt2fast.model import GPT, GPTConfig, KVCache

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "BackendUnavailable",
    "GPTConfig",
    "KVCache",
    "functional",
    "generate",
    "keep_freed_memory",
    "nn",
    "optim",
    "use_backend",
]
