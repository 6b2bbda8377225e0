"""GPT-2's MLP on Triton: two matrix products with the GELU in their epilogues, the rest on cuBLAS.

forward   h = x W^T;  act = gelu(h + b);  y = act V^T + c
backward  dh = (dy V) gelu'(h + b);  dx = dh W;  dW = dh^T x;  db = sum over rows of dh
          dV = dy^T act with act = gelu(h + b) again;  dc = sum over rows of dy
source    Radford et al. 2019; the derivative by hand.
layout    rows x (R, C), dy (R, D), h, act, dh (R, H), columns contiguous, any row stride; weights
          (out, in) with either dimension contiguous, as in nn.Linear or in GPT-2's Conv1D.
moves     forward's first product reads x and writes h and act, backward's reads dy and h and writes
          dh and act: no pass over (R, H) but these. 2 R C H and 2 R D H FLOPs.
work      programs stay on their multiprocessor and walk over the output's tiles, in groups of
          GROUP rows of tiles, so that the tiles at work at one time share their operands in L2.
          On Hopper and later, tiles come and go through tensor memory descriptors where addresses
          and strides are multiples of 16 bytes; elsewhere by pointers. Accumulators are fp32; bias
          and GELU see them unrounded. The epilogue works on PARTS slices of a tile's columns, which
          saves registers and shared memory. A row of tiles leaves one partial sum of db, added by
          a second kernel in a fixed order: the same inputs give the same bits.
          Where it is not FUSED (the rule for fp32 without tf32, which is bound by arithmetic
          outside the tensor cores), the product is cuBLAS's and the GELU a pass of its own.
saves     h, without its bias.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt2fast.ops.gelu import triton as elementwise
from gpt2fast.ops.triton_common import (
    INTERPRETED,
    Target,
    dot_precision,
    gelu,
    gelu_and_slope,
    launch,
    power_of_two,
    sum_partials,
    target_of,
    tuned,
)

GROUP = 8


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int  # of an output tile
    columns: int
    depth: int  # of a step along the inner dimension
    warps: int
    stages: int
    programs: int  # per multiprocessor
    parts: int  # slices of a tile's columns in the epilogue
    descriptors: bool  # where alignment allows
    flat: bool  # the next tile's operands are fetched while a tile is finished
    fused: bool = True


@triton.jit
def _load(
    matrix,
    top,
    left,
    height,
    width,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The tile of a (height, width) matrix at (top, left), 0 outside."""
    if DESCRIPTORS:
        tile = matrix.load([top, left])
    else:
        row, column = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
        place = matrix + row[:, None].to(tl.int64) * stride + column[None, :]
        mask = (row < height)[:, None] & (column < width)[None, :]
        tile = tl.load(place, mask=mask, other=0.0)
    return tile


@triton.jit
def _store(matrix, tile, top, left, height, width, DESCRIPTORS: tl.constexpr):
    """Writes a tile of a contiguous (height, width) matrix at (top, left), in the matrix's dtype."""
    if DESCRIPTORS:
        matrix.store([top, left], tile.to(matrix.dtype))
    else:
        row, column = top + tl.arange(0, tile.shape[0]), left + tl.arange(0, tile.shape[1])
        place = matrix + row[:, None].to(tl.int64) * width + column[None, :]
        mask = (row < height)[:, None] & (column < width)[None, :]
        tl.store(place, tile.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    product,
    bias,
    h,
    activation,
    dh,
    partials,
    top,
    left,
    height,
    width,
    PARTS: tl.constexpr,
    BACKWARD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The epilogue of one tile of h (forward) or of the activation's gradient (backward)."""
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1]
    if PARTS > 1:
        HALF: tl.constexpr = COLUMNS // 2
        halves = tl.permute(tl.reshape(product, (ROWS, 2, HALF)), (0, 2, 1))
        first, second = tl.split(halves)
        _finish(
            first, bias, h, activation, dh, partials,
            top, left, height, width, PARTS // 2, BACKWARD, DESCRIPTORS,
        )  # fmt: skip
        _finish(
            second, bias, h, activation, dh, partials,
            top, left + HALF, height, width, PARTS // 2, BACKWARD, DESCRIPTORS,
        )  # fmt: skip
    else:
        column = left + tl.arange(0, COLUMNS)
        if BACKWARD:
            z = _load(h, top, left, height, width, width, ROWS, COLUMNS, DESCRIPTORS)
            z = z.to(tl.float32)
        else:
            z = product
            if h is not None:
                _store(h, product, top, left, height, width, DESCRIPTORS)
        if bias is not None:
            b = tl.load(bias + column, mask=column < width, other=0.0)
            z += b.to(tl.float32)[None, :]
        if BACKWARD:
            value, slope = gelu_and_slope(z)
            out = product * slope
            if partials is not None:  # rows beyond the last are 0
                place = partials + (top // ROWS).to(tl.int64) * width + column
                tl.store(place, tl.sum(out, 0), mask=column < width)
            if dh is not None:
                _store(dh, out, top, left, height, width, DESCRIPTORS)
            if activation is not None:
                _store(activation, value, top, left, height, width, DESCRIPTORS)
        else:
            _store(activation, gelu(z), top, left, height, width, DESCRIPTORS)


@triton.jit
def _tile(
    tile,
    a,
    b,
    bias,
    h,
    activation,
    dh,
    partials,
    height,
    width,
    depth,
    a_stride,
    b_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BACKWARD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    group, within = tile // (GROUP * across), tile % (GROUP * across)
    tall = min(down - group * GROUP, GROUP)
    top = (group * GROUP + within % tall) * ROWS
    left = (within // tall) * COLUMNS
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        left_tile = _load(a, top, k, height, depth, a_stride, ROWS, DEPTH, DESCRIPTORS)
        if TRANSPOSED:
            right = _load(b, left, k, width, depth, b_stride, COLUMNS, DEPTH, DESCRIPTORS).T
        else:
            right = _load(b, k, left, depth, width, b_stride, DEPTH, COLUMNS, DESCRIPTORS)
        product = tl.dot(left_tile, right, product, input_precision=PRECISION)
    _finish(
        product, bias, h, activation, dh, partials,
        top, left, height, width, PARTS, BACKWARD, DESCRIPTORS,
    )  # fmt: skip


@triton.jit
def _product_kernel(
    a,
    b,
    bias,
    h,
    activation,
    dh,
    partials,
    height,
    width,
    depth,
    a_stride,
    b_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BACKWARD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLAT: tl.constexpr,
):
    """a (height, depth) times b, stored (width, depth) where TRANSPOSED, else (depth, width)."""
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    first, step = tl.program_id(0), tl.num_programs(0)
    if FLAT:
        for tile in tl.range(first, tiles, step, flatten=True):
            _tile(
                tile, a, b, bias, h, activation, dh, partials,
                height, width, depth, a_stride, b_stride,
                ROWS, COLUMNS, DEPTH, GROUP, PARTS, PRECISION, TRANSPOSED, BACKWARD, DESCRIPTORS,
            )  # fmt: skip
    else:
        for tile in range(first, tiles, step):
            _tile(
                tile, a, b, bias, h, activation, dh, partials,
                height, width, depth, a_stride, b_stride,
                ROWS, COLUMNS, DEPTH, GROUP, PARTS, PRECISION, TRANSPOSED, BACKWARD, DESCRIPTORS,
            )  # fmt: skip


def _describable(tensor: Tensor | None) -> bool:
    """Whether tensor memory descriptors take these rows."""
    if tensor is None:
        return True
    stride = tensor.stride(0)
    return (
        tensor.data_ptr() % 16 == 0
        and stride * tensor.element_size() % 16 == 0
        and stride >= tensor.shape[1]
    )


def _product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    activation: Tensor | None,
    dh: Tensor | None,
    backward: bool,
    need_bias: bool,
    config: Config,
) -> Tensor | None:
    """Launches the product of a (R, K) with b (K, H) and its epilogue; partial sums of the bias's
    gradient where they are needed."""
    height, (depth, width) = a.shape[0], b.shape
    transposed = b.stride(1) != 1
    b = b.t() if transposed else b
    b = b if b.stride(1) == 1 else b.contiguous()
    partials = None
    if need_bias:
        down = triton.cdiv(height, config.rows)
        partials = a.new_empty((down, width), dtype=torch.float32)
    through = (
        config.descriptors and height > 0 and all(map(_describable, (a, b, h, activation, dh)))
    )

    def operand(tensor: Tensor | None, *block: int) -> Tensor | TensorDescriptor | None:
        if tensor is None or not through:
            return tensor
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))

    right = (config.columns, config.depth) if transposed else (config.depth, config.columns)
    out = (config.rows, config.columns // config.parts)
    tiles = triton.cdiv(height, config.rows) * triton.cdiv(width, config.columns)
    launch(
        _product_kernel,
        (min(tiles, target_of(a).processors * config.programs),),
        operand(a, config.rows, config.depth),
        operand(b, *right),
        bias,
        operand(h, *out),
        operand(activation, *out),
        operand(dh, *out),
        partials,
        height,
        width,
        depth,
        a.stride(0),
        b.stride(0),
        ROWS=config.rows,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        GROUP=GROUP,
        PARTS=config.parts,
        PRECISION=dot_precision(a.dtype),
        TRANSPOSED=transposed,
        BACKWARD=backward,
        DESCRIPTORS=through,
        FLAT=config.flat and not INTERPRETED,
        warps=config.warps,
        stages=config.stages,
    )
    return partials


@triton.jit
def _column_sum_kernel(
    x, partials, count, columns, x_stride, strips, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    across = tl.cdiv(columns, BLOCK)
    strip = tl.program_id(0) // across
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(strip, tl.cdiv(count, ROWS), strips):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < count)[:, None] & (column < columns)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32)
    place = partials + strip.to(tl.int64) * columns + column
    tl.store(place, tl.sum(total, 0), mask=column < columns)


def column_sum(x: Tensor) -> Tensor:
    """The sum over rows of x (R, C) with contiguous columns, in fp32: a bias's gradient."""
    count, columns = x.shape
    rows, block = 32, 64  # two 16-byte loads a thread, whole cache lines
    across = triton.cdiv(columns, block)
    strips = max(1, min(target_of(x).processors * 8 // across, triton.cdiv(count, rows)))
    partials = x.new_empty((strips, columns), dtype=torch.float32)
    launch(
        _column_sum_kernel,
        (strips * across,),
        x,
        partials,
        count,
        columns,
        x.stride(0),
        strips,
        ROWS=rows,
        BLOCK=block,
        warps=4,
    )
    return sum_partials(partials)[0]


def ladder(arch: int, dtype: torch.dtype, backward: bool) -> list[Config]:
    """Tiles from large to small. None spills, but for the large ones where rows are not multiples
    of 16 bytes, which no descriptor takes; all fit in shared memory.

    Two programs share a multiprocessor where the epilogue is long: while one computes GELUs, the
    other keeps the tensor cores busy. One program with a tile twice as wide reads a quarter less
    from L2.
    """
    if arch < 90:
        large = (
            Config(128, 128, 32, 8, 4, 1, 2, False, False)
            if backward
            else Config(128, 128, 32, 4, 4, 2, 1, False, False)
        )
        configs = [large, Config(64, 128, 32, 4, 4, 2, 1, False, False)]
    else:
        configs = [
            # Two slices: each store waits until the one before has left shared memory.
            Config(128, 256, 64, 8, 4, 1, 2, True, True),
            Config(128, 128, 64, 4, 3, 2, 2 + 2 * backward, True, False),
            Config(64, 128, 64, 4, 4, 2, 1, True, False),
        ]
        if backward or arch >= 100:
            configs = configs[1:]
    configs += [
        Config(64, 64, 64, 4, 4, 2, 1, False, False),
        Config(16, 32, 128, 4, 4, 4, 1, False, False),
    ]
    if dtype == torch.float32:
        configs = [
            dataclasses.replace(
                c, depth=c.depth // 2, parts=2 * c.parts, columns=min(c.columns, 128)
            )
            for c in configs
        ]
    return configs


def rule(
    target: Target, height: int, width: int, depth: int, dtype: torch.dtype, backward: bool
) -> Config:
    """The largest tile with which every multiprocessor has work; for fp32 outside the tensor cores,
    cuBLAS and a pass for the GELU."""
    configs = ladder(target.arch, dtype, backward)
    config = configs[-1]
    if height > config.rows:
        for config in configs[:-1]:
            tiles = triton.cdiv(height, config.rows) * triton.cdiv(width, config.columns)
            if tiles >= target.processors * config.programs:
                break
    config = _fitted(config, depth)
    if dtype == torch.float32 and dot_precision(dtype) == "ieee":
        config = dataclasses.replace(config, fused=False)
    return config


def _fitted(config: Config, depth: int) -> Config:
    return dataclasses.replace(config, depth=max(16, min(config.depth, power_of_two(depth))))


def candidates(target: Target, depth: int, dtype: torch.dtype, backward: bool) -> list[Config]:
    """What autotuning tries beside the rule."""
    configs = ladder(target.arch, dtype, backward)
    if target.arch >= 90:
        configs += [
            Config(128, 256, 64, 8, 3, 1, 4, True, False),
            Config(256, 128, 64, 8, 3, 1, 4, True, False),
            Config(256, 128, 64, 8, 3, 1, 4, True, True),
            Config(128, 256, 64, 8, 3, 1, 4, True, True),
            Config(128, 128, 64, 8, 3, 1, 2, True, True),
            Config(128, 128, 128, 8, 2, 1, 2, True, False),
        ]
    configs += [
        Config(128, 128, 64, 8, 3, 1, 2, False, False),
        Config(128, 64, 64, 4, 3, 2, 1, False, False),
        Config(32, 64, 128, 4, 3, 2, 1, False, False),
        Config(16, 64, 128, 4, 4, 3, 1, False, False),
    ]
    fitted = [_fitted(config, depth) for config in configs]
    return [*fitted, dataclasses.replace(fitted[0], fused=False)]


def _configure(
    x: Tensor, width: int, depth: int, backward: bool, run: Callable[[Config], None]
) -> Config:
    target, height = target_of(x), x.shape[0]
    precision = dot_precision(x.dtype)
    key = ("backward" if backward else "forward", height, width, depth, x.dtype, precision)
    return tuned(
        "gelu_mlp",
        key,
        x,
        rule(target, height, width, depth, x.dtype, backward),
        candidates(target, depth, x.dtype, backward),
        run,
    )


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

    def run(config: Config) -> None:
        if config.fused:
            _product(x, fc_weight.t(), fc_bias, h, activation, None, False, False, config)
            return
        plain = activation if h is None else h
        torch.mm(x, fc_weight.t(), out=plain)
        elementwise.forward(plain, fc_bias, activation)

    run(_configure(x, hidden, depth, False, run))
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
        dh = torch.empty_like(h) if need_x or need_fc_weight else None
        activation = torch.empty_like(h) if need_proj_weight else None

        def run(config: Config) -> None:
            nonlocal dfc_bias
            if config.fused:
                partials = _product(
                    dy, proj_weight, fc_bias, h, activation, dh, True, need_fc_bias, config
                )
                dfc_bias = None if partials is None else sum_partials(partials)[0]
                return
            dact = torch.empty_like(h) if dh is None else dh
            torch.mm(dy, proj_weight, out=dact)
            dfc_bias = elementwise.backward_into(dact, h, fc_bias, dh, activation, need_fc_bias)

        run(_configure(dy, h.shape[1], dy.shape[1], True, run))
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
