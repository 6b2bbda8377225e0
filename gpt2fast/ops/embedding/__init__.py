"""Token and position embedding in one pass."""
