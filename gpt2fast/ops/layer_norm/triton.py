"""Layer norm on Triton, with the residual add fused in where there is one.

forward   s = x + residual;  mean, var over C;  y = (s - mean) rstd w + b,  rstd = 1 / sqrt(var + eps)
backward  xhat = (s - mean) rstd;  g = dy w;  dx = rstd (g - mean(g) - xhat mean(g xhat)) + dsum
          dw = sum over rows of dy xhat;  db = sum over rows of dy
source    Ba et al. 2016; the derivative by hand.
layout    rows (R, C) with contiguous columns and any row stride; mean and rstd (2, R) fp32.
moves     forward reads x (and the residual) and writes y (and s) once; backward reads dy, s (and
          dsum) and writes dx once, besides P partial sums of 2 C.
work      a program holds ROWS whole rows in registers, so that the variance is that of centred
          values. Forward: one program per ROWS rows. Backward: a fixed number of programs walk
          over the rows and keep dw and db in registers; their partial sums are added by a second
          kernel in a fixed order, so the same inputs give the same bits.
saves     mean and rstd.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.registry import dropout_numbers
from gpt2fast.ops.triton_common import (
    INTERPRETED,
    head_words,
    kept_mask,
    launch,
    power_of_two,
    product,
    row_words,
    sum_partials,
    target_of,
    tuned,
)

WIDEST = 65536


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int  # that a program holds at once
    warps: int
    programs: int  # of the backward, per multiprocessor


def rule(columns: int, backward: bool) -> Config:
    """Some 16 values a thread in forward and 8 in backward, which holds twice as much: no spills,
    and enough loads in flight on a multiprocessor. The interpreter likes big tiles."""
    block = power_of_two(columns)
    rows = max(1, (65536 if INTERPRETED else 1024 if backward else 2048) // block)
    warps = min(32, max(4, rows * block // (256 if backward else 512)))
    return Config(rows, warps, max(1, 32 // warps))


def candidates(columns: int) -> list[Config]:
    """What autotuning tries beside the rule."""
    block = power_of_two(columns)
    return [
        Config(rows, warps, programs)
        for rows in (1, 2, 4, 8)
        for warps in (2, 4, 8)
        for programs in (2, 4, 8)
        if 256 <= rows * block // warps <= 2048 and warps * programs <= 48
    ]


@triton.jit
def _kept(seed, row, column, threshold):
    """Dropout's mask of rows and columns, that of attention's first head."""
    first, second = head_words(seed, 0, 0)
    first, second = row_words(first, second, row)
    return kept_mask(first[:, None], second[:, None], column[None, :], threshold)


@triton.jit
def _dropout_kernel(
    x,
    out,
    seed,
    count,
    columns,
    x_stride,
    factor,
    threshold,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row[:, None] < count) & (column[None, :] < columns)
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    value = tl.where(_kept(seed, row, column, threshold), value.to(tl.float32) * factor, 0.0)
    place = out + row[:, None] * columns + column[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    y,
    statistics,
    seed,
    count,
    columns,
    x_stride,
    residual_stride,
    eps,
    factor,
    threshold,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column[None, :] < columns
    mask = (row[:, None] < count) & real
    s = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    s = s.to(tl.float32)
    if seed is not None:
        s = tl.where(_kept(seed, row, column, threshold), s * factor, 0.0)
    if residual is not None:
        place = residual + row[:, None] * residual_stride + column[None, :]
        s += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        # What follows is the norm of the sum as it is stored.
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + row[:, None] * columns + column[None, :], rounded, mask=mask)
        s = rounded.to(tl.float32)
    center = tl.sum(s, 1) / columns
    # The mean of what is left corrects the rounding of a sum of large values.
    center += tl.sum(tl.where(real, s - center[:, None], 0.0), 1) / columns
    centred = tl.where(real, s - center[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / columns + eps)
    tl.store(statistics + row, center, mask=row < count)
    tl.store(statistics + count + row, scale, mask=row < count)
    out = centred * scale[:, None]
    if weight is not None:
        out *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * columns + column[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy,
    dsum,
    x,
    weight,
    statistics,
    dx,
    partials,
    count,
    columns,
    dy_stride,
    dsum_stride,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    real = column < columns
    if weight is not None:
        w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for tile in range(program, tl.cdiv(count, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row[:, None] < count) & real[None, :]
        g = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        s = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        center = tl.load(statistics + row, mask=row < count, other=0.0)
        scale = tl.load(statistics + count + row, mask=row < count, other=0.0)
        xhat = tl.where(mask, (s.to(tl.float32) - center[:, None]) * scale[:, None], 0.0)
        if PARAMETERS:
            dweight += tl.sum(g * xhat, 0)
            dbias += tl.sum(g, 0)
        if dx is not None:
            if weight is not None:
                g = product(g, w)
            along = tl.sum(g * xhat, 1) / columns
            level = tl.sum(g, 1) / columns
            out = (g - level[:, None] - xhat * along[:, None]) * scale[:, None]
            if dsum is not None:
                place = dsum + row[:, None] * dsum_stride + column[None, :]
                out += tl.load(place, mask=mask, other=0.0).to(tl.float32)
            place = dx + row[:, None] * columns + column[None, :]
            tl.store(place, out.to(dx.dtype.element_ty), mask=mask)
    if PARAMETERS:
        place = partials + program.to(tl.int64) * 2 * columns + column
        tl.store(place, dweight, mask=real)
        tl.store(place + columns, dbias, mask=real)


def _configure(x: Tensor, backward: bool, run: Callable[[Config], None]) -> Config:
    count, columns = x.shape
    if columns > WIDEST:
        raise ValueError(f"the Triton layer norm takes rows of at most {WIDEST}, got {columns}")
    key = ("backward" if backward else "forward", count, columns, x.dtype)
    return tuned("layer_norm", key, x, rule(columns, backward), candidates(columns), run)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """On rows x (R, C): (s = x + residual or None, y (R, C), statistics: mean, rstd (2, R) fp32).

    With a seed, s = dropout(x) + residual.
    """
    count, columns = x.shape
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    statistics = x.new_empty((2, count), dtype=torch.float32)

    def run(config: Config) -> None:
        launch(
            _forward_kernel,
            (triton.cdiv(count, config.rows),),
            x,
            residual,
            weight,
            bias,
            total,
            y,
            statistics,
            seed,
            count,
            columns,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            *dropout_numbers(dropout_p),
            ROWS=config.rows,
            BLOCK=power_of_two(columns),
            warps=config.warps,
        )

    run(_configure(x, False, run))
    return total, y, statistics


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx (R, C), dweight (C,) fp32, dbias (C,) fp32), None where not needed."""
    count, columns = x.shape
    dx = x.new_empty(x.shape) if need_input else None
    partials: Tensor | None = None

    def run(config: Config) -> None:
        nonlocal partials
        programs = target_of(x).processors * config.programs
        programs = max(1, min(programs, triton.cdiv(count, config.rows)))
        if need_parameters:
            partials = x.new_empty((programs, 2 * columns), dtype=torch.float32)
        launch(
            _backward_kernel,
            (programs,),
            dy,
            dsum,
            x,
            weight,
            statistics,
            dx,
            partials,
            count,
            columns,
            dy.stride(0),
            0 if dsum is None else dsum.stride(0),
            x.stride(0),
            ROWS=config.rows,
            BLOCK=power_of_two(columns),
            PARAMETERS=need_parameters,
            warps=config.warps,
        )

    run(_configure(x, True, run))
    if partials is None:
        return dx, None, None
    return dx, *sum_partials(partials, columns)


def dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """The rows x (R, C) with `forward`'s mask: dropped elements 0, kept ones / (1 - dropout_p)."""
    count, columns = x.shape
    out = x.new_empty(x.shape)
    config = rule(columns, False)
    launch(
        _dropout_kernel,
        (triton.cdiv(count, config.rows),),
        x,
        out,
        seed,
        count,
        columns,
        x.stride(0),
        *dropout_numbers(dropout_p),
        ROWS=config.rows,
        BLOCK=power_of_two(columns),
        warps=config.warps,
    )
    return out
