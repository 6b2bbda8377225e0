"""One room an operation: reference.py, autograd.py and a file per backend."""
