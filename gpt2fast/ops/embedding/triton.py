"""Token and position embedding on Triton.

forward   out[b, t] = wte[idx[b, t]] + wpe[position + t]
backward  dwte[v] = sum of dy[b, t] over all b, t with idx[b, t] = v;  dwpe[position + t] = sum over b
source    definition.
layout    idx (B, T) int64 of any strides; tables with contiguous columns and any row stride; dy rows
          (B T, C) with any row stride. Gradients are dense, of dy's dtype, summed in fp32.
moves     forward reads idx and a row of each table (positions come from the cache) and writes out
          once. Backward reads dy once for each table; dwte is cleared and its named rows written;
          sorting moves some 20 bytes a token.
work      Forward: a program per sequence and run of positions. dwpe: a program per position and
          block of columns walks over the batch. dwte: the tokens are sorted with their places, so
          that a token's rows stand side by side. A program sums TILE sorted rows: whole runs of one
          token go to the table, the unfinished run at either end to partial sums, which a second
          kernel adds up: no program has more than TILE rows however often a token comes. All sizes
          are bounds known on the host: nothing waits for the device. Every sum has one fixed order
          and there are no atomics, so the same inputs give the same bits.
errors    A token outside of the table is a breach of contract that cannot be reported without
          waiting for the device: its row of out is NaN and its gradient goes nowhere.
saves     idx.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.registry import rows
from gpt2fast.ops.triton_common import INTERPRETED, launch, power_of_two, tuned

#: Columns that a program holds at most.
WIDEST = 1024


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int  # forward: positions of a program; backward: sorted rows that a program sums
    block: int  # columns
    warps: int


def rule(columns: int, backward: bool) -> Config:
    """Forward: some 16 values a thread. Backward: one warp, so that a row lies across the threads
    and sums over rows need no exchange, with four rows in flight. The interpreter likes big tiles."""
    wide = power_of_two(columns)
    if INTERPRETED:
        return Config(32 if backward else 64, wide, 1)
    if backward:
        return Config(32, min(256, wide), 1)
    block = min(WIDEST, wide)
    held = max(1, 2048 // block)
    return Config(min(held, 16), block, 4)


def candidates(columns: int, backward: bool) -> list[Config]:
    """What autotuning tries beside the rule."""
    wide = power_of_two(columns)
    if backward:
        return [
            Config(count, min(256 * warps, wide), warps)
            for count in (16, 32, 64)
            for warps in (1, 2)
        ]
    return [
        Config(count, min(block, wide), warps)
        for block in (512, 1024, 2048)
        for count in (1, 2, 4)
        for warps in (2, 4, 8)
        if 256 <= count * min(block, wide) // warps <= 1024
    ]


@triton.jit
def _forward_kernel(
    idx,
    wte,
    wpe,
    out,
    length,
    columns,
    vocabulary,
    idx_sequence,
    idx_step,
    wte_stride,
    wpe_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The sequences come first, so that programs running together share rows of wpe.
    sequence = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(idx + sequence * idx_sequence + t * idx_step, mask=t < length, other=0)
    known = (token >= 0) & (token < vocabulary)
    mask = (t[:, None] < length) & (column[None, :] < columns)
    place = wte + token[:, None] * wte_stride + column[None, :]
    x = tl.load(place, mask=mask & known[:, None], other=float("nan")).to(tl.float32)
    place = wpe + t[:, None] * wpe_stride + column[None, :]
    x += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    place = out + (sequence * length + t[:, None]) * columns + column[None, :]
    tl.store(place, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _keys_kernel(
    idx, keys, length, vocabulary, lowest, idx_sequence, idx_step, BLOCK: tl.constexpr
):
    """The tokens as narrow integers from `lowest` up; unknown ones come last."""
    sequence = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    token = tl.load(idx + sequence * idx_sequence + t * idx_step, mask=t < length, other=0)
    token = tl.where((token >= 0) & (token < vocabulary), token, vocabulary) + lowest
    tl.store(keys + sequence * length + t, token.to(keys.dtype.element_ty), mask=t < length)


@triton.jit
def _row(dy, order, i, count, dy_stride, column, real):
    """Row i of dy in sorted order, fp32; 0 past the end."""
    place = tl.load(order + i, mask=i < count, other=0)
    return tl.load(dy + place * dy_stride + column, mask=real & (i < count), other=0.0).to(
        tl.float32
    )


@triton.jit
def _close(total, begun, key, following, dwte, head, columns, vocabulary, lowest, column, real):
    """Puts the sum of a run away if it ends between `key` and the `following` one: into the table
    if the run has begun in this tile, else into `head`. Returns the sum to go on with, and whether
    its run has begun."""
    ends = key != following
    token = key.to(tl.int64) - lowest
    place = dwte + token * columns + column
    whole = real & (ends & begun & (token < vocabulary))
    tl.store(place, total.to(dwte.dtype.element_ty), mask=whole)
    tl.store(head + column, total, mask=real & (ends & (begun == 0)))
    return tl.where(ends, 0.0, total), begun | ends


@triton.jit
def _tokens_kernel(
    dy,
    order,
    keys,
    dwte,
    partials,
    count,
    columns,
    vocabulary,
    lowest,
    none,
    dy_stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0) * TILE
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    head = partials + tl.program_id(0).to(tl.int64) * 2 * columns
    key = tl.load(keys + start)
    begun = key != tl.load(keys + start - 1, mask=start > 0, other=none)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(start, start + TILE, 4):
        # Four rows in flight: no load may pass the stores of the sums between them.
        a = _row(dy, order, i, count, dy_stride, column, real)
        b = _row(dy, order, i + 1, count, dy_stride, column, real)
        c = _row(dy, order, i + 2, count, dy_stride, column, real)
        d = _row(dy, order, i + 3, count, dy_stride, column, real)
        key1 = tl.load(keys + i + 1, mask=i + 1 < count, other=none)
        key2 = tl.load(keys + i + 2, mask=i + 2 < count, other=none)
        key3 = tl.load(keys + i + 3, mask=i + 3 < count, other=none)
        key4 = tl.load(keys + i + 4, mask=i + 4 < count, other=none)
        total, begun = _close(
            total + a, begun, key, key1, dwte, head, columns, vocabulary, lowest, column, real
        )
        total, begun = _close(
            total + b, begun, key1, key2, dwte, head, columns, vocabulary, lowest, column, real
        )
        total, begun = _close(
            total + c, begun, key2, key3, dwte, head, columns, vocabulary, lowest, column, real
        )
        total, begun = _close(
            total + d, begun, key3, key4, dwte, head, columns, vocabulary, lowest, column, real
        )
        key = key4
    # What the next tile goes on with: a run that began here, or one that fills the tile. Else 0.
    tl.store(head + tl.where(begun, columns, 0) + column, total, mask=real)


@triton.jit
def _join_kernel(
    keys,
    partials,
    dwte,
    count,
    columns,
    vocabulary,
    lowest,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The run that begins in a tile and ends in a later one: its tail here and its heads there."""
    tile = tl.program_id(0)
    start = tile * TILE
    end = start + TILE
    if end < count:
        key = tl.load(keys + end - 1)
        before = tl.load(keys + start - 1, mask=start > 0, other=0)
        token = key.to(tl.int64) - lowest
        begun = (start == 0) | (before != key)
        if begun & (tl.load(keys + end) == key) & (token < vocabulary):
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            real = column < columns
            tail = partials + (tile.to(tl.int64) * 2 + 1) * columns + column
            total = tl.load(tail, mask=real, other=0.0)
            at = end
            more = at < count
            while more:
                first = at + tl.arange(0, ROWS) * TILE
                inside = first < count
                mine = inside & (tl.load(keys + first, mask=inside, other=0) == key)
                line = (first // TILE).to(tl.int64) * 2 * columns
                heads = partials + line[:, None] + column[None, :]
                mask = mine[:, None] & real[None, :]
                total += tl.sum(tl.load(heads, mask=mask, other=0.0), 0)
                at += ROWS * TILE
                more = at < count
                if more:
                    more = tl.load(keys + at) == key
            place = dwte + token * columns + column
            tl.store(place, total.to(dwte.dtype.element_ty), mask=real)


@triton.jit
def _positions_kernel(
    dy,
    dwpe,
    batch,
    length,
    columns,
    position,
    dy_stride,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    t = row - position
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    used = (t >= 0) & (t < length)
    total = tl.zeros((BLOCK,), tl.float32)
    if used:
        # Sums of sums, so that a long batch is as accurate as a short one.
        for start in range(0, batch, GROUP):
            part = tl.zeros((BLOCK,), tl.float32)
            for first in range(start, min(start + GROUP, batch), ROWS):
                sequence = first + tl.arange(0, ROWS).to(tl.int64)
                place = dy + (sequence[:, None] * length + t) * dy_stride + column[None, :]
                mask = (sequence[:, None] < batch) & real[None, :]
                part += tl.sum(tl.load(place, mask=mask, other=0.0).to(tl.float32), 0)
            total += part
    place = dwpe + row.to(tl.int64) * columns + column
    tl.store(place, total.to(dwpe.dtype.element_ty), mask=real)


def _configure(tensor: Tensor, count: int, backward: bool, run: Callable[[Config], None]) -> Config:
    columns = tensor.shape[-1]
    key = ("backward" if backward else "forward", count, columns, tensor.dtype)
    return tuned(
        "embedding", key, tensor, rule(columns, backward), candidates(columns, backward), run
    )


def forward(idx: Tensor, wte: Tensor, wpe: Tensor, position: int) -> Tensor:
    """wte[idx[b, t]] + wpe[position + t] (B, T, C); NaN where idx is no row of wte."""
    batch, length = idx.shape
    wte, wpe = rows(wte), rows(wpe)[position:]
    columns = wte.shape[1]
    out = wte.new_empty((batch, length, columns))

    def run(config: Config) -> None:
        launch(
            _forward_kernel,
            (batch, triton.cdiv(length, config.rows), triton.cdiv(columns, config.block)),
            idx,
            wte,
            wpe,
            out,
            length,
            columns,
            wte.shape[0],
            idx.stride(0),
            idx.stride(1),
            wte.stride(0),
            wpe.stride(0),
            ROWS=config.rows,
            BLOCK=config.block,
            warps=config.warps,
        )

    run(_configure(out, batch * length, False, run))
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
    dwpe = _positions_gradient(flat, idx, positions, position) if need_wpe else None
    return dwte, dwpe


def _tokens_gradient(dy: Tensor, idx: Tensor, vocabulary: int) -> Tensor:
    batch, length = idx.shape
    count, columns = dy.shape
    dwte = dy.new_zeros((vocabulary, columns))
    if count == 0:
        return dwte
    # A radix sort takes time by the width of its keys: GPT-2's tokens fit into 16 bits, beside one
    # value for unknown tokens and `none`.
    dtype = torch.int16 if vocabulary < (1 << 16) - 1 else torch.int32
    lowest, none = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    keys = idx.new_empty((count,), dtype=dtype)
    launch(
        _keys_kernel,
        (batch, triton.cdiv(length, 1024)),
        idx,
        keys,
        length,
        vocabulary,
        lowest,
        idx.stride(0),
        idx.stride(1),
        BLOCK=1024,
        warps=4,
    )
    keys, order = torch.sort(keys, stable=True)

    def run(config: Config) -> None:
        tiles = triton.cdiv(count, config.rows)
        partials = dy.new_empty((tiles, 2, columns), dtype=torch.float32)
        launch(
            _tokens_kernel,
            (tiles, triton.cdiv(columns, config.block)),
            dy,
            order,
            keys,
            dwte,
            partials,
            count,
            columns,
            vocabulary,
            lowest,
            none,
            dy.stride(0),
            TILE=config.rows,
            BLOCK=config.block,
            warps=config.warps,
        )
        block = min(128, power_of_two(columns)) if not INTERPRETED else config.block
        launch(
            _join_kernel,
            (tiles, triton.cdiv(columns, block)),
            keys,
            partials,
            dwte,
            count,
            columns,
            vocabulary,
            lowest,
            TILE=config.rows,
            ROWS=2 if INTERPRETED else 32,  # few, so that the loop over a run's tiles does loop
            BLOCK=block,
            warps=4,
        )

    run(_configure(dy, count, True, run))
    return dwte


def _positions_gradient(dy: Tensor, idx: Tensor, positions: int, position: int) -> Tensor:
    batch, length = idx.shape
    columns = dy.shape[1]
    dwpe = dy.new_empty((positions, columns))
    block = rule(columns, True).block
    launch(
        _positions_kernel,
        (positions, triton.cdiv(columns, block)),
        dy,
        dwpe,
        batch,
        length,
        columns,
        position,
        dy.stride(0),
        ROWS=64 if INTERPRETED else 8,
        GROUP=256,
        BLOCK=block,
        warps=1,
    )
    return dwpe
