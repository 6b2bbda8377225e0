"""The public functions: arguments are checked here, once; then a backend is chosen and runs."""

from gpt2fast.ops.gelu.functional import gelu
from gpt2fast.ops.gelu_mlp.functional import gelu_mlp
from gpt2fast.ops.layer_norm.functional import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "gelu", "gelu_mlp", "layer_norm"]
