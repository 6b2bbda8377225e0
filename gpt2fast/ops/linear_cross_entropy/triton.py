"""Linear + cross-entropy on Triton: matrix products around the cross-entropy kernel, in chunks.

The products are PyTorch's (cuBLAS), but for half-precision products that are fp32: those are
PyTorch's where it can add to an fp32 matrix, else a kernel of our own, which the interpreter runs.
"""

import dataclasses
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.cross_entropy.triton import backward_rows, count_of, forward_rows, reduced
from gpt2fast.ops.linear_cross_entropy import chunked
from gpt2fast.ops.triton_common import INTERPRETED, Target, launch, power_of_two, target_of, tuned

# ---- a product in fp32 of half-precision matrices ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8  # tile rows that run together, so that their operands stay in the L2 cache


def rule(target: Target, rows: int, inner: int, add: bool) -> Config:
    """The largest tiles whose stages fit shared memory and whose sums fit the registers, twice where
    they are added to what is there."""
    if INTERPRETED:
        high, deep = (max(16, min(512, power_of_two(n))) for n in (rows, inner))
        return Config(high, 64, deep, 4, 1)
    if target.arch < 90:
        return Config(128, 128, 32, 8, 4)
    return Config(128, 256 if target.arch == 90 and not add else 128, 64, 8, 4)


def candidates() -> list[Config]:
    """What autotuning tries beside the rule."""
    return [
        Config(rows, columns, inner, warps, stages)
        for rows, columns in ((128, 256), (256, 128), (128, 128))
        for inner in (32, 64)
        for warps in (4, 8)
        for stages in (3, 4)
    ]


@triton.jit
def _product_kernel(
    a,
    b,
    out,
    rows,
    columns,
    inner,
    a_row,
    a_inner,
    b_inner,
    b_column,
    out_row,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * tiles_across)
    height = tl.minimum(tiles_down - group * GROUP, GROUP)
    within = program % (GROUP * tiles_across)
    r = (group * GROUP + within % height) * ROWS + tl.arange(0, ROWS)
    c = (within // height) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    left = a + r.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_inner
    right = b + k.to(tl.int64)[:, None] * b_inner + c.to(tl.int64)[None, :] * b_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, INNER):
        some = k < inner - start
        x = tl.load(left, mask=(r < rows)[:, None] & some[None, :], other=0.0)
        y = tl.load(right, mask=some[:, None] & (c < columns)[None, :], other=0.0)
        total = tl.dot(x, y, total)
        left += INNER * a_inner
        right += INNER * b_inner
    place = out + r.to(tl.int64)[:, None] * out_row + c[None, :]
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    if ADD:
        total += tl.load(place, mask=mask, other=0.0)
    tl.store(place, total, mask=mask)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """fp32 out = a b, or out += a b, of half-precision matrices: the kernel of our own."""
    (rows, inner), columns = a.shape, b.shape[1]

    def run(config: Config) -> None:
        launch(
            _product_kernel,
            (triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns),),
            a,
            b,
            out,
            rows,
            columns,
            inner,
            *a.stride(),
            *b.stride(),
            out.stride(0),
            ADD=add,
            GROUP=config.group,
            ROWS=config.rows,
            COLUMNS=config.columns,
            INNER=config.inner,
            warps=config.warps,
            stages=config.stages,
        )

    config = rule(target_of(a), rows, inner, add)
    if not add:  # what adds to its output cannot be repeated on it
        key = (rows, columns, inner, a.stride(0) == 1, a.dtype)
        config = tuned("linear_cross_entropy", key, a, config, candidates(), run)
    run(config)


# ---- the loss ----------------------------------------------------------------------------------------


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


_KERNELS = chunked.Kernels(count_of, reduced, forward_rows, backward_rows, product, _scale)
forward, backward = partial(chunked.forward, _KERNELS), partial(chunked.backward, _KERNELS)
