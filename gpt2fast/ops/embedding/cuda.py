"""Token and position embedding on the CUDA kernels (csrc/embedding/embedding.cu)."""

import torch
from torch import Tensor

from gpt2fast.ops.cuda_common import launch
from gpt2fast.ops.registry import DTYPE_CODES, rows

TILE = 32  # as in embedding.cu


def forward(idx: Tensor, wte: Tensor, wpe: Tensor, position: int) -> Tensor:
    """wte[idx[b, t]] + wpe[position + t] (B, T, C); NaN where idx is no row of wte."""
    wte, wpe = rows(wte), rows(wpe)[position:]
    out = wte.new_empty((*idx.shape, wte.shape[1]))
    launch(
        "embedding_forward",
        idx,
        *idx.stride(),
        wte,
        wte.stride(0),
        wpe,
        wpe.stride(0),
        out,
        *out.shape,
        wte.shape[0],
        DTYPE_CODES[wte.dtype],
    )
    return out


def backward(
    dy: Tensor,
    idx: Tensor,
    vocabulary: int,
    positions: int,
    position: int,
    need_wte: bool,
    need_wpe: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (dwte (V, C), dwpe (P, C)) of dy (B, T, C), None where not needed."""
    flat = rows(dy)
    dwte = _tokens_gradient(flat, idx, vocabulary) if need_wte else None
    if not need_wpe:
        return dwte, None
    dwpe = flat.new_empty((positions, flat.shape[1]))
    launch(
        "embedding_positions",
        flat,
        flat.stride(0),
        dwpe,
        *dy.shape,
        positions,
        position,
        DTYPE_CODES[flat.dtype],
    )
    return dwte, dwpe


def _tokens_gradient(dy: Tensor, idx: Tensor, vocabulary: int) -> Tensor:
    count, columns = dy.shape
    dwte = dy.new_zeros((vocabulary, columns))
    if count == 0:
        return dwte
    keys = idx.new_empty((count,), dtype=torch.int32)
    launch("embedding_keys", idx, *idx.stride(), keys, *idx.shape, vocabulary)
    keys, order = torch.sort(keys, stable=True)
    partials = dy.new_empty((-(-count // TILE), 2, columns), dtype=torch.float32)
    launch(
        "embedding_tokens",
        dy,
        dy.stride(0),
        keys,
        order,
        dwte,
        partials,
        count,
        columns,
        vocabulary,
        DTYPE_CODES[dy.dtype],
    )
    return dwte
