"""Tanh-GELU of x + bias on Triton.

forward   y = z s,  z = x + bias,  s = sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3))
backward  dx = dy (s + z s (1 - s) d(2 u)/dz);  dbias = sum over rows of dx in fp32
source    Hendrycks & Gimpel 2016 in GPT-2's tanh form; the derivative by hand.
layout    rows (R, C) with contiguous columns and any row stride.
moves     forward reads x and writes y once; backward reads dy and x and writes dx once, besides
          one partial sum of C a strip of rows. Some 10 instructions an element forward and 16
          backward, two of them on the slow unit: memory stays the limit.
work      a program holds a tile of ROWS x BLOCK. Forward: one program a tile. Backward: a fixed
          number of programs walk down a strip of columns and keep its dbias in registers; their
          partial sums are added by a second kernel in a fixed order, so the same inputs give the
          same bits.
saves     nothing: x is kept, and the activation is computed again.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.triton_common import (
    INTERPRETED,
    gelu_and_slope,
    launch,
    power_of_two,
    sum_partials,
    target_of,
    tuned,
)
from gpt2fast.ops.triton_common import gelu as gelu_of


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int  # of a tile
    block: int  # its columns
    warps: int
    programs: int  # of the backward, per multiprocessor


def rule(columns: int, backward: bool) -> Config:
    """Two 16-byte loads a thread in flight whether forward or backward, which reads two tensors;
    the interpreter likes big tiles."""
    block = min(power_of_two(columns), 4096 if INTERPRETED else 512)
    elements = 65536 if INTERPRETED else 1024 if backward else 2048
    return Config(max(1, elements // block), block, 4, 8)


def candidates(columns: int, backward: bool) -> list[Config]:
    """What autotuning tries beside the rule."""
    widest = power_of_two(columns)
    return [
        Config(elements // block, block, warps, programs)
        for block in sorted({min(widest, 256), min(widest, 512), min(widest, 1024)})
        for elements in (1024, 2048, 4096)
        for warps in (4, 8)
        for programs in ((8, 12, 16) if backward else (1,))
        if 4 <= elements // (32 * warps) <= 32 and warps * programs <= 64
    ]


@triton.jit
def _forward_kernel(x, bias, y, count, columns, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    across = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    row = (program // across) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = (program % across) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    mask = (row < count)[:, None] & real[None, :]
    z = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    z = z.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    place = y + row[:, None] * columns + column[None, :]
    tl.store(place, gelu_of(z).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy,
    x,
    bias,
    dx,
    activation,
    partials,
    count,
    columns,
    dy_stride,
    x_stride,
    strips,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)
    strip = tl.program_id(0) // across
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    if bias is not None:
        b = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(strip, tl.cdiv(count, ROWS), strips):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < count)[:, None] & real[None, :]
        g = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0)
        z = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        if bias is not None:
            z += b
        value, slope = gelu_and_slope(z)
        out = g.to(tl.float32) * slope
        place = row[:, None] * columns + column[None, :]
        if dx is not None:
            tl.store(dx + place, out.to(dx.dtype.element_ty), mask=mask)
        if activation is not None:
            tl.store(activation + place, value.to(activation.dtype.element_ty), mask=mask)
        if partials is not None:
            total += out  # 0 where dy is masked
    if partials is not None:
        tl.store(partials + strip.to(tl.int64) * columns + column, tl.sum(total, 0), mask=real)


def forward(x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """On rows x (R, C): gelu(x + bias) (R, C), into the contiguous `out` (or x) where given."""
    count, columns = x.shape
    y = x.new_empty(x.shape) if out is None else out

    def run(config: Config, y: Tensor) -> None:
        launch(
            _forward_kernel,
            (triton.cdiv(count, config.rows) * triton.cdiv(columns, config.block),),
            x,
            bias,
            y,
            count,
            columns,
            x.stride(0),
            ROWS=config.rows,
            BLOCK=config.block,
            warps=config.warps,
        )

    def trial(config: Config) -> None:  # may be called again and again, so not over x
        run(config, torch.empty_like(y))

    run(_configure(x, False, trial), y)
    return y


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, need_input: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (dx (R, C), dbias (C,) fp32), None where not needed."""
    dx = x.new_empty(x.shape) if need_input else None
    return dx, backward_into(dy, x, bias, dx, None, need_bias)


def backward_into(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    activation: Tensor | None,
    need_bias: bool,
) -> Tensor | None:
    """Writes dx (which may be dy) and gelu(x + bias) to contiguous tensors (R, C) where given.

    Returns dbias (C,) fp32 where needed.
    """
    count, columns = x.shape
    partials: Tensor | None = None

    def run(config: Config, dx: Tensor | None) -> None:
        nonlocal partials
        across = triton.cdiv(columns, config.block)
        strips = target_of(x).processors * config.programs // across
        strips = max(1, min(strips, triton.cdiv(count, config.rows)))
        if need_bias:
            partials = x.new_empty((strips, columns), dtype=torch.float32)
        launch(
            _backward_kernel,
            (strips * across,),
            dy,
            x,
            bias,
            dx,
            activation,
            partials,
            count,
            columns,
            dy.stride(0),
            x.stride(0),
            strips,
            ROWS=config.rows,
            BLOCK=config.block,
            warps=config.warps,
        )

    def trial(config: Config) -> None:  # may be called again and again, so not over dy
        run(config, None if dx is None else torch.empty_like(dx))

    run(_configure(x, True, trial), dx)
    return None if partials is None else sum_partials(partials)[0]


def _configure(x: Tensor, backward: bool, run: Callable[[Config], None]) -> Config:
    count, columns = x.shape
    key = ("backward" if backward else "forward", count, columns, x.dtype)
    return tuned("gelu", key, x, rule(columns, backward), candidates(columns, backward), run)
