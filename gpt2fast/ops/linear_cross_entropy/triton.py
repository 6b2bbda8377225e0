"""Linear + cross-entropy on Triton, in the chunks of `chunked`.

Loss and gradient of a chunk's logits are cross_entropy's kernels, the products PyTorch's (cuBLAS).
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.cross_entropy.triton import backward_rows, count_of, forward_rows, reduced
from gpt2fast.ops.linear_cross_entropy import chunked
from gpt2fast.ops.triton_common import INTERPRETED, launch


@triton.jit
def _scale_kernel(values, factor, count, size, BLOCK: tl.constexpr):
    by = 1.0
    if factor is not None:
        by = tl.load(factor).to(tl.float32)
    if count is not None:
        rows = tl.load(count)
        by = tl.where(rows > 0, by / rows, 0.0)  # where no row counts, the gradient is 0
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < tl.where(by != 1.0, size, 0)
    tl.store(values + place, tl.load(values + place, mask=mask, other=0.0) * by, mask=mask)


def _scale(values: Tensor, factor: Tensor | None, count: Tensor | None) -> None:
    size, block = values.numel(), 1 << 16 if INTERPRETED else 4096
    grid = (triton.cdiv(size, block),)
    launch(_scale_kernel, grid, values, factor, count, size, BLOCK=block, warps=8)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, which moves nothing where the factor is 1, as the GPU finds out itself."""
    _scale(gradient, factor, None)


_KERNELS = chunked.Kernels(count_of, reduced, forward_rows, backward_rows, _scale)
forward, backward = partial(chunked.forward, _KERNELS), partial(chunked.backward, _KERNELS)
