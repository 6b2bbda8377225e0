"""The public functions: arguments are checked here, once; then a backend is chosen and runs."""

from gpt2fast.ops.cross_entropy.functional import cross_entropy
from gpt2fast.ops.layer_norm.functional import add_layer_norm, layer_norm
from gpt2fast.ops.linear_cross_entropy.functional import linear_cross_entropy

__all__ = ["add_layer_norm", "cross_entropy", "layer_norm", "linear_cross_entropy"]
