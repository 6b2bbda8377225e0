"""AdamW on a whole model in one call, and the global gradient norm."""
