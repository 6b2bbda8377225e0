"""Swap the kernels into models that others wrote: Hugging Face GPT-2, nanoGPT style, plain modules.

>>> import gpt2fast, torch
>>> mlp = torch.nn.Sequential(
...     torch.nn.Linear(8, 32), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(32, 8)
... )
>>> report = gpt2fast.optimize(mlp)
>>> print(report.counts())
{'mlp': 1}
"""

from gpt2fast.swap.hf_gpt2 import apply_gpt2fast_to_gpt2
from gpt2fast.swap.lazy_logits import LazyLogits
from gpt2fast.swap.report import Entry, SwapReport, revert
from gpt2fast.swap.structure import optimize

__all__ = [
    "Entry",
    "LazyLogits",
    "SwapReport",
    "apply_gpt2fast_to_gpt2",
    "optimize",
    "revert",
]
