"""Token and position embedding on the C++ kernels (csrc/embedding/embedding_cpu.cpp)."""

import numpy as np
import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.registry import DTYPE_CODES, pointer, rows


def forward(idx: Tensor, wte: Tensor, wpe: Tensor, position: int) -> Tensor:
    """wte[idx[b, t]] + wpe[position + t] (B, T, C).

    Raises:
        IndexError: idx holds a value that is no row of wte.
    """
    batch, length = idx.shape
    idx, wte, wpe = idx.contiguous(), rows(wte), rows(wpe)
    out = wte.new_empty((batch, length, wte.shape[1]))
    bad = cpu_kernels().embedding_forward(
        idx.data_ptr(),
        wte.data_ptr(),
        wte.stride(0),
        wpe.data_ptr() + position * wpe.stride(0) * wpe.element_size(),
        wpe.stride(0),
        out.data_ptr(),
        batch,
        length,
        wte.shape[1],
        wte.shape[0],
        DTYPE_CODES[wte.dtype],
        torch.get_num_threads(),
    )
    if bad >= 0:
        b, t = divmod(bad, length)
        raise IndexError(
            f"idx[{b}, {t}] is {idx[b, t].item()}, but wte has rows 0 to {wte.shape[0] - 1}"
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
    columns = dy.shape[2]
    dwte = zeros(vocabulary, columns, dy.dtype) if need_wte else None
    dwpe = dy.new_zeros((positions, columns)) if need_wpe else None
    batch, length, _ = dy.shape
    flat, idx = rows(dy), idx.contiguous()
    named = vocabulary if need_wte else 0
    links = idx.new_empty((named + idx.numel(),))
    workspace = flat.new_empty((2, columns), dtype=torch.float32)
    row_bytes = columns * flat.element_size()
    cpu_kernels().embedding_backward(
        idx.data_ptr(),
        flat.data_ptr(),
        flat.stride(0),
        pointer(dwte),
        0 if dwpe is None else dwpe.data_ptr() + position * row_bytes,
        links.data_ptr(),
        workspace.data_ptr(),
        batch,
        length,
        columns,
        named,
        DTYPE_CODES[flat.dtype],
        torch.get_num_threads(),
    )
    return dwte, dwpe


def zeros(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros (count, columns) as pages that the system fills when they are first touched.

    torch.zeros writes all of them: 150 MB for GPT-2's table, of which a batch names a few rows.
    NumPy asks the C library for cleared memory, which costs nothing where it comes fresh.
    """
    size = torch.empty((), dtype=dtype).element_size()
    raw = np.zeros((count, columns), dtype=np.uint16 if size == 2 else np.uint32)
    return torch.from_numpy(raw).view(dtype)
