"""GPT-2's MLP: linear, tanh-GELU, linear, with the activation recomputed in backward."""
