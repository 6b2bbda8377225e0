"""Layer norm, and residual add + layer norm in one pass."""
