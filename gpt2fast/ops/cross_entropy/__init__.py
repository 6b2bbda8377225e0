"""Cross-entropy of logits with class indices."""
