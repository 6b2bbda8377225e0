"""Tanh-GELU of x + bias in one pass."""
