"""Functions and modules under the names, argument orders and meanings of other packages.

A script that uses one of them changes its import line only:

- :mod:`gpt2fast.ecosystem.flash_attn`: attention functions, `layer_norm_fn`, `cross_entropy_loss`,
  `CrossEntropyLoss` and `FusedMLP` of flash-attn;
- :mod:`gpt2fast.ecosystem.liger`: `LigerLayerNorm`, `LigerCrossEntropyLoss`,
  `LigerFusedLinearCrossEntropyLoss` and their functions, of Liger-Kernel;
- :mod:`gpt2fast.ecosystem.cut_cross_entropy`: `linear_cross_entropy` of cut-cross-entropy.

What is not supported is refused by a ValueError that names the argument; nothing is ignored
silently. Names that a package has and that are missing here are missing on purpose: an import error
says so at once.
"""

from gpt2fast.ecosystem import cut_cross_entropy, flash_attn, liger

__all__ = ["cut_cross_entropy", "flash_attn", "liger"]
