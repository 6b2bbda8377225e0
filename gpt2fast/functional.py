"""The public functions: arguments are checked here, once; then a backend is chosen and runs."""

from gpt2fast.ops.adamw.functional import adamw_, global_norm
from gpt2fast.ops.attention.functional import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from gpt2fast.ops.cross_entropy.functional import cross_entropy
from gpt2fast.ops.embedding.functional import embedding
from gpt2fast.ops.gelu.functional import gelu
from gpt2fast.ops.gelu_mlp.functional import gelu_mlp
from gpt2fast.ops.layer_norm.functional import add_layer_norm, layer_norm
from gpt2fast.ops.linear.functional import linear
from gpt2fast.ops.linear_cross_entropy.functional import linear_cross_entropy

__all__ = [
    "adamw_",
    "add_layer_norm",
    "cross_entropy",
    "embedding",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "gelu",
    "gelu_mlp",
    "global_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]
