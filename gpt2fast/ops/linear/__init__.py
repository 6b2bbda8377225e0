"""A linear layer on a CPU; on GPUs it is PyTorch's."""
