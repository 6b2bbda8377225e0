"""The public functions: arguments are checked here, once; then a backend is chosen and runs."""

from gpt2fast.ops.attention.functional import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    scaled_dot_product_attention,
)
from gpt2fast.ops.layer_norm.functional import add_layer_norm, layer_norm

__all__ = [
    "add_layer_norm",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "layer_norm",
    "scaled_dot_product_attention",
]
