"""Linear + cross-entropy on the CUDA kernels, in the chunks of `chunked`.

Loss and gradient of a chunk's logits are csrc/cross_entropy/cross_entropy.cu's, the products
PyTorch's (cuBLAS), and gradients are scaled by csrc/linear_cross_entropy/linear_cross_entropy.cu.
"""

from functools import partial

from torch import Tensor

from gpt2fast.ops.cross_entropy.cuda import backward_rows, count_of, forward_rows, reduced
from gpt2fast.ops.cuda_common import launch
from gpt2fast.ops.linear_cross_entropy import chunked


def _scale(values: Tensor, factor: Tensor | None, count: Tensor | None) -> None:
    factor = None if factor is None else factor.float()
    launch("scale", values, factor, count, values.numel())


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, which moves nothing where the factor is 1, as the GPU finds out itself."""
    _scale(gradient, factor, None)


_KERNELS = chunked.Kernels(count_of, reduced, forward_rows, backward_rows, _scale)
forward, backward = partial(chunked.forward, _KERNELS), partial(chunked.backward, _KERNELS)
