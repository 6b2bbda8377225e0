"""The GELU-MLP on the CUDA kernels (csrc/gelu_mlp) and cuBLAS.

The two products that have the GELU beside them are tensor-core kernels of our own in bf16 and fp16,
where rows are multiples of 16 bytes and there are enough tiles to give every multiprocessor one:
gelu_mlp_hopper.cu (wgmma and TMA) on Hopper where rows do not overlap, else gelu_mlp.cu (mma.sync).
Otherwise (fp32, a width that is no multiple of 8, small batches, which cuBLAS splits along the inner
dimension) the product is PyTorch's and the GELU a pass of its own. The other products are PyTorch's.
"""

import torch
from torch import Tensor

from gpt2fast.ops.cuda_common import is_hopper, launch, parameter, processors_of
from gpt2fast.ops.gelu import cuda as elementwise
from gpt2fast.ops.registry import DTYPE_CODES

TILE, HOPPER_TILE = (128, 128), (128, 256)  # rows and columns of a kernel's output tile
PARTIAL_ROWS, HOPPER_PARTIAL_ROWS = 128, 64  # that one line of a bias gradient's partial sums has


def _aligned(tensor: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes."""
    if tensor.is_meta:
        return True
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
    )


def _operands(
    a: Tensor, b: Tensor, bias: Tensor | None
) -> tuple[tuple[object, ...] | None, tuple[int, ...]]:
    """The kernels' arguments for a (R, K) times b (K, H), or None where they do not serve; and what
    Hopper's kernels take at the end: the number of their blocks, or nothing where they do not serve."""
    rows, columns = a.shape[0], b.shape[1]
    if a.dtype == torch.float32 or columns % 8:
        return None, ()
    turned = b.stride(1) == 1
    b = b if turned else b.t()
    b = b if b.stride(1) == 1 else b.contiguous()
    added, wide = parameter(bias, a)
    if not (_aligned(a) and _aligned(b)) or (added is not None and added.data_ptr() % 8):
        return None, ()
    apart = a.stride(0) >= a.shape[1] and b.stride(0) >= b.shape[1]
    processors = processors_of(a)
    hopper = (processors,) if apart and is_hopper(a) else ()
    tile = HOPPER_TILE if hopper else TILE
    if -(-rows // tile[0]) * -(-columns // tile[1]) < processors:
        return None, ()
    return (a, a.stride(0), b, b.stride(0), turned, added, wide), hopper


def forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """On rows x (R, C): y (R, D), and where `save` h = x fc_weight^T (R, H)."""
    count, (hidden, depth) = x.shape[0], fc_weight.shape
    activation = x.new_empty((count, hidden))
    h = x.new_empty((count, hidden)) if save else None
    operands, hopper = _operands(x, fc_weight.t(), fc_bias)
    if operands is not None:
        name = "gelu_product_hopper_forward" if hopper else "gelu_product_forward"
        sizes = (count, hidden, depth, DTYPE_CODES[x.dtype], *hopper)
        launch(name, *operands, h, activation, *sizes)
    else:
        plain = activation if h is None else h
        torch.mm(x, fc_weight.t(), out=plain)
        elementwise.forward(plain, fc_bias, activation)
    if proj_bias is None:
        return torch.mm(activation, proj_weight.t()), h
    return torch.addmm(proj_bias.to(x.dtype), activation, proj_weight.t()), h


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, fc_weight, fc_bias (fp32), proj_weight, proj_bias (fp32) where needed."""
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = need
    dx = dfc_weight = dfc_bias = dproj_weight = activation = None
    if need_x or need_fc_weight or need_fc_bias:
        activation = torch.empty_like(h) if need_proj_weight else None
        dh, dfc_bias = _hidden_gradient(
            dy, h, fc_bias, proj_weight, activation, need_x or need_fc_weight, need_fc_bias
        )
        if need_x:
            assert dh is not None
            dx = torch.mm(dh, fc_weight)
        if need_fc_weight:
            assert dh is not None
            dfc_weight = torch.mm(dh.t(), x)
    elif need_proj_weight:
        activation = elementwise.forward(h, fc_bias)
    if activation is not None:
        dproj_weight = torch.mm(dy.t(), activation)
    dproj_bias = column_sum(dy) if need_proj_bias else None
    return dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias


def _hidden_gradient(
    dy: Tensor,
    h: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    activation: Tensor | None,
    need_dh: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dh (R, H) and its sum over rows (H,) fp32 where needed; writes gelu(h + fc_bias) (R, H)."""
    (count, hidden), depth = h.shape, dy.shape[1]
    dh = torch.empty_like(h) if need_dh else None
    operands, hopper = _operands(dy, proj_weight, fc_bias)
    if operands is None:
        dact = torch.empty_like(h) if dh is None else dh
        torch.mm(dy, proj_weight, out=dact)
        return dh, elementwise.backward_into(dact, h, fc_bias, dh, activation, need_bias)
    dbias = partials = None
    if need_bias:
        dbias = h.new_empty((hidden,), dtype=torch.float32)
        of_line = HOPPER_PARTIAL_ROWS if hopper else PARTIAL_ROWS
        partials = h.new_empty((-(-count // of_line), hidden), dtype=torch.float32)
    name = "gelu_product_hopper_backward" if hopper else "gelu_product_backward"
    sizes = (count, hidden, depth, DTYPE_CODES[h.dtype], *hopper)
    launch(name, *operands, h, activation, dh, dbias, partials, *sizes)
    return dh, dbias


def column_sum(x: Tensor) -> Tensor:
    """The sum over rows of x (R, C) with contiguous columns, in fp32: a bias's gradient."""
    count, columns = x.shape
    across = -(-columns * x.element_size() // (16 * elementwise.THREADS))
    resident = processors_of(x) * (elementwise.RESIDENT // elementwise.THREADS)
    strips = max(1, min(resident // across, -(-count // 4)))
    total = x.new_empty((columns,), dtype=torch.float32)
    partials = x.new_empty((strips, columns), dtype=torch.float32)
    launch(
        "column_sum",
        x,
        x.stride(0),
        total,
        partials,
        strips,
        count,
        columns,
        DTYPE_CODES[x.dtype],
    )
    return total
