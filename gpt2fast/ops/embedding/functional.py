"""The public embedding function."""

import torch
from torch import Tensor

from gpt2fast.backends import choose, native
from gpt2fast.ops.checks import (
    check_floating,
    check_number,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from gpt2fast.ops.embedding import autograd, reference
from gpt2fast.ops.registry import apply, enter


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, position: int = 0, sparse: bool = False
) -> Tensor:
    """Token and position embedding: out[b, t] = wte[idx[b, t]] + wpe[position + t].

    Args:
        idx: (B, T), int64 or int32, each 0 <= idx < V.
        wte: (V, C), float32, bfloat16 or float16: the tokens' table.
        wpe: (P, C), of wte's dtype: the positions' table.
        position: the position of idx[:, 0], for decoding with a cache; position + T <= P.
        sparse: wte's gradient is a sparse COO tensor, as `torch.nn.functional.embedding` has it;
            on a GPU that waits for the device.

    Returns:
        (B, T, C) of wte's dtype. Gradients are deterministic and summed in fp32; dense, unless
        `sparse` is set.

    Raises:
        TypeError, ValueError: a wrong argument, named.
        IndexError: on the CPU, an index outside of wte, with its place. Kernels on a GPU do not
            check, since that would wait for the device.

    Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training",
    equation 2: U W_e + W_p.

    >>> wte, wpe = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    >>> gpt2fast.functional.embedding(torch.tensor([[1, 1, 0]]), wte, wpe).flatten()
    tensor([12., 22., 31.])
    """
    kernels = native()
    if kernels is not None and (way := kernels.embedding_way(idx, wte, wpe, position)):
        return enter(way, autograd.Embedding, idx, wte, wpe, position, sparse, "cpu")
    _check(idx, wte, wpe)
    idx = idx if idx.dtype == torch.int64 else idx.long()
    length = idx.shape[1]
    check_number("position", position, whole=True)
    if position < 0 or position + length > wpe.shape[0]:
        raise ValueError(
            f"position {position} and {length} tokens need rows {position} to"
            f" {position + length - 1} of wpe, which has {wpe.shape[0]}"
        )
    backend = choose(wte, "embedding")
    if backend == "reference":
        return reference.embedding(idx, wte, wpe, position, sparse)
    return apply(autograd.Embedding, idx, wte, wpe, position, sparse, backend)


def _check(idx: Tensor, wte: Tensor, wpe: Tensor) -> None:
    check_tensor("idx", idx)
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"idx must be int64 or int32, got {idx.dtype}")
    if idx.dim() != 2:
        raise ValueError(f"idx must have shape (B, T), got {tuple(idx.shape)}")
    check_floating("wte", wte)
    check_floating("wpe", wpe)
    for name, table in (("wte", wte), ("wpe", wpe)):
        if table.dim() != 2 or table.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (rows, C) with C of at least one, got {tuple(table.shape)}"
            )
    if wpe.shape[1] != wte.shape[1]:
        raise ValueError(f"wpe has {wpe.shape[1]} columns but wte has {wte.shape[1]}")
    check_same_dtype("wpe", wpe, "wte", wte)
    if not wte.device == wpe.device == idx.device:
        check_same_device("wpe", wpe, "wte", wte)
        check_same_device("idx", idx, "wte", wte)
