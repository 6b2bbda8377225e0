"""Softmax attention: causal or not, packed qkv or separate views, with dropout."""
