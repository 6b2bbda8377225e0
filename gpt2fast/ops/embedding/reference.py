"""Token and position embedding in plain PyTorch: the specification, differentiated by PyTorch."""

from torch import Tensor
from torch.nn.functional import embedding as rows_of


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor, position: int, sparse: bool = False) -> Tensor:
    """out[b, t] = wte[idx[b, t]] + wpe[position + t]."""
    return rows_of(idx, wte, sparse=sparse) + wpe[position : position + idx.shape[1]]
