"""The public functions: arguments are checked here, once; then a backend is chosen and runs."""

from gpt2fast.ops.adamw.functional import adamw_, global_norm
from gpt2fast.ops.embedding.functional import embedding
from gpt2fast.ops.gelu.functional import gelu
from gpt2fast.ops.gelu_mlp.functional import gelu_mlp
from gpt2fast.ops.layer_norm.functional import add_layer_norm, layer_norm

__all__ = [
    "adamw_",
    "add_layer_norm",
    "embedding",
    "gelu",
    "gelu_mlp",
    "global_norm",
    "layer_norm",
]
