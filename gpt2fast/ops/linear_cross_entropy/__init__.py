"""The head's matrix product fused with cross-entropy: the logits never exist whole."""
