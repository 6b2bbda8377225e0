"""Attention on Triton: no (T x T) matrix in memory, in one kernel forward and two backward.

forward   S = scale q k^T, key j hidden from query i where j > i + diagonal;  P = softmax(S)
          out = M P v,  lse = log2(sum over j of 2^(S log2 e));  M = dropout's mask / (1 - p), or 1
backward  P = 2^(S log2 e - lse);  dP = M (dout v^T);  delta = rowsum(dout out);  dS = P (dP - delta)
          dv = (M P)^T dout;  dk = scale dS^T q;  dq = scale dS k
source    Dao et al. 2022, 2023 (FlashAttention 1 and 2); Milakov and Gimelshein 2018 (online softmax).
layout    (B, T, H, D) with any strides but a contiguous D: views of a packed qkv are read and those of
          a packed gradient written in place. Or documents in one row of (total, H, D), document b from
          starts[b] to starts[b + 1]. D is padded in registers to a power of two, at least 16.
moves     forward reads q once and writes out once, reads k and v once per row tile; backward reads q,
          dout, out once and k, v once per row tile for dq, k, v once and q, dout once per key tile for
          dk and dv: tiles of one head run close together, so that what is read again lies in L2.
          Of D operations a visible pair: 4 forward, 14 backward (seven products: S and dP are computed
          twice; five would need dq summed by atomics, in a different order each time). fp32 takes
          an eighth, for the mean key (see _gather).
work      forward, dq: a program has ROWS queries of a head and walks over the keys they see, first the
          blocks seen by all of them, without a mask, then those on the diagonal or at the end.
          dk, dv: a program has ROWS keys and walks over the queries that see them, the diagonal first;
          S^T is formed, so that P^T and dS^T are the left operands of their products in registers.
          Longest tiles first within a group of heads. No sum crosses programs: same inputs, same bits.
saves     lse and what its rounding to fp32 left out, (2, B, H, T), in base 2; without a key lse is
          infinity, which makes P zero. The dropout mask is a hash of (seed, b, h, i, j), formed again.
rounds    P and dS are rounded to the inputs' dtype before their products, which sum in fp32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.registry import dropout_numbers
from gpt2fast.ops.triton_common import (
    INTERPRETED,
    dot_precision,
    head_words,
    kept_mask,
    launch,
    power_of_two,
    product,
    row_words,
    target_of,
    tuned,
)

WIDEST = 256
#: Keys and values of the heads that run together shall stay within this part of the L2 cache.
GROUP_BYTES = 16 << 20
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int  # queries of a program of forward and dq, keys of one of dk and dv
    columns: int  # keys, or queries, that it takes at once
    warps: int
    stages: int


FORWARD, DQ, DKV = "forward", "dq", "dkv"


def rule(kind: str, size: int, dtype: torch.dtype, arch: int, more: bool) -> Config:
    """Tiles whose accumulators and scores fit the registers, by benchmarks/triton_report.

    At head size 64 eight warps on 128 rows leave forward at 111 registers on sm_90, so that two
    programs share a multiprocessor and one computes exponentials while the other multiplies. Dropout
    and documents (`more`) take registers, which dk and dv at 64 columns have not.
    """
    if INTERPRETED:  # in fp32 square: NumPy's sums depend on a tile's shape, a GPU's do not, and
        # scores of the backward must be the forward's bits (see _scatter)
        return Config(64 if dtype == torch.float32 else 128, 64, 4, 1)
    if dtype == torch.float32:
        # products on the FMA units hold whole operands in registers: many threads, small tiles
        return Config(32 if size <= 64 else 16, 32, 8, 1)
    if size <= 64:
        return Config(128, 32 if more and kind == DKV else 64, 8, 2 if kind == DKV else 3)
    if size > 128:
        return Config(64, 32, 8, 2)
    if kind == DKV:
        return Config(64, 64, 8, 2) if arch < 90 else Config(128, 32, 8, 2)
    if kind == FORWARD:
        return Config(64 if arch < 90 else 128, 64, 8, 2)
    return Config(128, 32, 8, 2)


def candidates(kind: str, size: int, dtype: torch.dtype) -> list[Config]:
    """What autotuning tries beside the rule."""
    return [
        Config(rows, columns, warps, stages)
        for rows in (64, 128)
        for columns in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
        if columns <= rows and warps * 16 <= rows
    ]


# ---- device functions ------------------------------------------------------------------------------


@triton.jit
def _place(tiles, heads, group, LAST_FIRST: tl.constexpr):
    """This program's tile and head. Heads run in groups that share the L2 cache; within a group
    the longest tile of every head comes first, so that short ones fill the gaps at the end."""
    program = tl.program_id(0)
    first = program // (group * tiles) * group
    width = tl.minimum(heads - first, group)
    within = program % (group * tiles)
    tile = within // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, first + within % width


@triton.jit
def _load(
    base,
    stride,
    count,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Rows (ROWS, WIDTH) from `base` on; 0 past SIZE and, where PARTIAL, in rows from `count` on."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    place = base + row * stride + column
    if PARTIAL:
        return tl.load(place, mask=(row < count) & (column < SIZE), other=0.0)
    elif SIZE < WIDTH:
        return tl.load(place, mask=column < SIZE, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _store(base, stride, count, x, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of _load."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    mask = (row < count) & (column < SIZE)
    tl.store(base + row * stride + column, x.to(base.dtype.element_ty), mask=mask)


# ---- forward ---------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc,
    top,
    total,
    q,
    k,
    v,
    k_t,
    v_t,
    row,
    begin,
    end,
    keys,
    diagonal,
    scale,
    first,
    second,
    threshold,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes keys begin to end into the softmax; k and v point at key `begin`."""
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        keys_here = _load(k, k_t, keys - start, COLUMNS, SIZE, WIDTH, MASKED)
        s = tl.dot(q, tl.trans(keys_here), input_precision=PRECISION)
        if MASKED or q.dtype == tl.float32:  # so that backward finds P = 1, see _slopes
            s = product(s, scale)
            if MASKED:
                seen = (column < keys)[None, :]
                if CAUSAL:
                    seen = seen & (column[None, :] <= row[:, None] + diagonal)
                s = tl.where(seen, s, float("-inf"))
            now = tl.maximum(tl.maximum(top, tl.max(s, 1)), -1e38)
            p = tl.exp2(s - now[:, None])
        else:
            now = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - now[:, None])
        rescale = tl.exp2(top - now)
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(
                kept_mask(first[:, None], second[:, None], column[None, :], threshold), p, 0.0
            )
        acc = acc * rescale[:, None]
        values = _load(v, v_t, keys - start, COLUMNS, SIZE, WIDTH, MASKED)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
        top = now
        k += COLUMNS * k_t
        v += COLUMNS * v_t
    return acc, top, total


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    seed,
    q_starts,
    k_starts,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    out_b,
    out_t,
    out_h,
    lse_b,
    lse_h,
    plane,
    batch_heads,
    heads,
    queries,
    keys,
    diagonal,
    scale,
    factor,
    threshold,
    group,
    tiles,
    CAUSAL: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if v_t is None:  # k's and v's rows lie alike, as nearly always: the same offsets serve both
        v_t = k_t
    tile, head = _place(tiles, batch_heads, group, True)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    q += h * q_h
    k += h * k_h
    v += h * v_h
    out += h * out_h
    lse += h * lse_h
    if q_starts is not None:
        q_first, k_first = tl.load(q_starts + b).to(tl.int64), tl.load(k_starts + b).to(tl.int64)
        queries = (tl.load(q_starts + b + 1) - q_first).to(tl.int32)
        keys = (tl.load(k_starts + b + 1) - k_first).to(tl.int32)
        diagonal = keys - queries
        q += q_first * q_t
        k += k_first * k_t
        v += k_first * v_t
        out += q_first * out_t
        lse += q_first
        if tile * ROWS >= queries:
            return
    else:
        q += b * q_b
        k += b * k_b
        v += b * v_b
        out += b * out_b
        lse += b * lse_b
    begin = tile * ROWS
    row = begin + tl.arange(0, ROWS)
    q += begin.to(tl.int64) * q_t
    queries_here = _load(q, q_t, queries - begin, ROWS, SIZE, WIDTH, True)
    if NEGATIVE:  # so that the largest product is that of the largest score
        queries_here = -queries_here
    if seed is not None:
        first, second = head_words(seed, b, h)
        first, second = row_words(first, second, row)
    else:
        first, second = row, row
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    end, whole = keys, keys // COLUMNS * COLUMNS
    if CAUSAL:
        end = tl.minimum(tl.maximum(begin + ROWS + diagonal, 0), keys)
        seen_by_all = tl.minimum(tl.maximum(begin + diagonal + 1, 0), keys)
        whole = seen_by_all // COLUMNS * COLUMNS
    acc, top, total = _attend(
        acc, top, total, queries_here, k, v, k_t, v_t, row, 0, whole, keys, diagonal, scale,
        first, second, threshold, False, CAUSAL, seed is not None, COLUMNS, SIZE, WIDTH, PRECISION,
    )  # fmt: skip
    k += whole.to(tl.int64) * k_t
    v += whole.to(tl.int64) * v_t
    acc, top, total = _attend(
        acc, top, total, queries_here, k, v, k_t, v_t, row, whole, end, keys, diagonal, scale,
        first, second, threshold, True, CAUSAL, seed is not None, COLUMNS, SIZE, WIDTH, PRECISION,
    )  # fmt: skip
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    top = tl.where(none, 0.0, top)
    acc *= (factor / total)[:, None]
    _store(out + begin.to(tl.int64) * out_t, out_t, queries - begin, acc, ROWS, SIZE, WIDTH)
    log_total = tl.log2(total)
    level = top + log_total
    rest = (top - level) + log_total
    real = row < queries
    tl.store(lse + row, tl.where(none, float("inf"), level), mask=real)
    tl.store(lse + plane + row, tl.where(none, 0.0, rest), mask=real)


# ---- backward --------------------------------------------------------------------------------------


@triton.jit
def _slopes(
    s, dp, level, rest, delta, scale, seen, kept, factor,
    EXACT: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """P, P dropped out but for its factor, and dS from scores and dP; all broadcast.

    delta is not summed as dP is, so dP - delta leaves rounding where P is 1 and the other keys weigh
    nothing: there dS is 0. EXACT (fp32, where lse's own rounding shows too) and EDGE (blocks in which
    a query may see one key only) look for that, and round the product of score and scale as the
    forward did; elsewhere half precision rounds more.
    """
    if EXACT:
        p = product(s, scale) - level - rest
    elif EDGE:
        p = product(s, scale) - level
    else:
        p = s * scale - level
    if MASKED:
        p = tl.where(seen, p, float("-inf"))
    p = tl.exp2(p)
    if DROPOUT:
        dp = tl.where(kept, dp * factor, 0.0)
    ds = p * (dp - delta)
    if EXACT or EDGE:
        ds = tl.where(p == 1.0, 0.0, ds)
    dropped = p
    if DROPOUT:
        dropped = tl.where(kept, p, 0.0)
    return p, dropped, ds


@triton.jit
def _gather(
    dq,
    mean,
    excess,
    q,
    dout,
    k,
    v,
    k_t,
    v_t,
    row,
    begin,
    end,
    keys,
    diagonal,
    level,
    rest,
    delta,
    scale,
    factor,
    first,
    second,
    threshold,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what keys begin to end give to dq; k and v point at key `begin`.

    sum(dS) is 0 but for delta's rounding, which a part that all keys share would multiply: EXACT sums
    it, and the mean key sum(P k), with which it is taken out of dq.
    """
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        keys_here = _load(k, k_t, keys - start, COLUMNS, SIZE, WIDTH, MASKED)
        values = _load(v, v_t, keys - start, COLUMNS, SIZE, WIDTH, MASKED)
        s = tl.dot(q, tl.trans(keys_here), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(values), input_precision=PRECISION)
        seen = (column < keys)[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= row[:, None] + diagonal)
        kept = seen
        if DROPOUT:
            kept = kept_mask(first[:, None], second[:, None], column[None, :], threshold)
        p, _, ds = _slopes(
            s, dp, level[:, None], rest[:, None], delta[:, None], scale, seen, kept, factor,
            EXACT, MASKED, MASKED, DROPOUT,
        )  # fmt: skip
        dq = tl.dot(ds.to(keys_here.dtype), keys_here, dq, input_precision=PRECISION)
        if EXACT:
            excess += tl.sum(ds, 1)
            p = tl.where(p == 1.0, 0.0, p)  # dS is 0 there, and the sum no rounding
            mean = tl.dot(p, keys_here, mean, input_precision=PRECISION)
        k += COLUMNS * k_t
        v += COLUMNS * v_t
    return dq, mean, excess


@triton.jit
def _dq_kernel(
    dout,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    seed,
    q_starts,
    k_starts,
    dout_b,
    dout_t,
    dout_h,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    out_b,
    out_t,
    out_h,
    dq_b,
    dq_t,
    dq_h,
    lse_b,
    lse_h,
    plane,
    batch_heads,
    heads,
    queries,
    keys,
    diagonal,
    log2_scale,
    scale,
    factor,
    threshold,
    group,
    tiles,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if v_t is None:  # k's and v's rows lie alike, as nearly always: the same offsets serve both
        v_t = k_t
    tile, head = _place(tiles, batch_heads, group, True)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    begin = tile * ROWS
    row = begin + tl.arange(0, ROWS)
    dout += h * dout_h
    q += h * q_h
    k += h * k_h
    v += h * v_h
    out += h * out_h
    dq += h * dq_h
    place = h * lse_h + row
    q_first = begin.to(tl.int64)
    if q_starts is not None:
        k_first = tl.load(k_starts + b).to(tl.int64)
        document = tl.load(q_starts + b).to(tl.int64)
        queries = (tl.load(q_starts + b + 1) - document).to(tl.int32)
        keys = (tl.load(k_starts + b + 1) - k_first).to(tl.int32)
        diagonal = keys - queries
        k += k_first * k_t
        v += k_first * v_t
        q_first += document
        place += document
        if begin >= queries:
            return
    else:
        dout += b * dout_b
        q += b * q_b
        k += b * k_b
        v += b * v_b
        out += b * out_b
        dq += b * dq_b
        place += b * lse_b
    count = queries - begin
    queries_here = _load(q + q_first * q_t, q_t, count, ROWS, SIZE, WIDTH, True)
    dout_here = _load(dout + q_first * dout_t, dout_t, count, ROWS, SIZE, WIDTH, True)
    out_here = _load(out + q_first * out_t, out_t, count, ROWS, SIZE, WIDTH, True)
    delta_here = tl.sum(dout_here.to(tl.float32) * out_here.to(tl.float32), 1)
    real = row < queries
    tl.store(delta + place, delta_here, mask=real)  # for dk and dv
    level = tl.load(lse + place, mask=real, other=float("inf"))
    rest = level
    if EXACT:
        rest = tl.load(lse + plane + place, mask=real, other=0.0)
    if seed is not None:
        first, second = head_words(seed, b, h)
        first, second = row_words(first, second, row)
    else:
        first, second = row, row
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    mean, excess = acc, tl.zeros((ROWS,), tl.float32)
    end, whole = keys, keys // COLUMNS * COLUMNS
    if CAUSAL:
        end = tl.minimum(tl.maximum(begin + ROWS + diagonal, 0), keys)
        seen_by_all = tl.minimum(tl.maximum(begin + diagonal + 1, 0), keys)
        whole = seen_by_all // COLUMNS * COLUMNS
    acc, mean, excess = _gather(
        acc, mean, excess, queries_here, dout_here, k, v, k_t, v_t, row, 0, whole, keys,
        diagonal, level, rest, delta_here, log2_scale, factor, first, second, threshold, False, CAUSAL,
        seed is not None, EXACT, COLUMNS, SIZE, WIDTH, PRECISION,
    )  # fmt: skip
    k += whole.to(tl.int64) * k_t
    v += whole.to(tl.int64) * v_t
    acc, mean, excess = _gather(
        acc, mean, excess, queries_here, dout_here, k, v, k_t, v_t, row, whole, end, keys,
        diagonal, level, rest, delta_here, log2_scale, factor, first, second, threshold, True, CAUSAL,
        seed is not None, EXACT, COLUMNS, SIZE, WIDTH, PRECISION,
    )  # fmt: skip
    if EXACT:
        acc -= excess[:, None] * mean
    _store(dq + q_first * dq_t, dq_t, count, acc * scale, ROWS, SIZE, WIDTH)


@triton.jit
def _scatter(
    dk,
    dv,
    k,
    v,
    q,
    dout,
    lse,
    delta,
    plane,
    q_t,
    dout_t,
    row,
    begin,
    end,
    queries,
    diagonal,
    scale,
    factor,
    first,
    second,
    threshold,
    MASKED: tl.constexpr,
    PARTIAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what queries begin to end give to dk and dv; q and dout point at query `begin`, lse and
    delta at query 0. Queries past the last have P = 0 by an lse of infinity."""
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        queries_here = _load(q, q_t, queries - start, COLUMNS, SIZE, WIDTH, PARTIAL)
        dout_here = _load(dout, dout_t, queries - start, COLUMNS, SIZE, WIDTH, PARTIAL)
        if PARTIAL:
            level = tl.load(lse + column, mask=column < queries, other=float("inf"))
            delta_here = tl.load(delta + column, mask=column < queries, other=0.0)
        else:
            level = tl.load(lse + column)
            delta_here = tl.load(delta + column)
        rest = level
        if EXACT:
            rest = tl.load(lse + plane + column, mask=column < queries, other=0.0)
        if EXACT:  # formed as in forward, since lse fits those bits: another order of sums shows at
            # scores of 1e4
            s = tl.trans(tl.dot(queries_here, tl.trans(k), input_precision=PRECISION))
        else:
            s = tl.dot(k, tl.trans(queries_here), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout_here), input_precision=PRECISION)
        seen = row[:, None] <= column[None, :] + diagonal
        kept = seen
        if DROPOUT:
            one, two = row_words(first, second, column)
            kept = kept_mask(one[None, :], two[None, :], row[:, None], threshold)
        _, p, ds = _slopes(
            s, dp, level[None, :], rest[None, :], delta_here[None, :], scale, seen, kept, factor,
            EXACT, MASKED or PARTIAL, MASKED, DROPOUT,
        )  # fmt: skip
        dv = tl.dot(p.to(dout_here.dtype), dout_here, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(queries_here.dtype), queries_here, dk, input_precision=PRECISION)
        q += COLUMNS * q_t
        dout += COLUMNS * dout_t
    return dk, dv


@triton.jit
def _dkv_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    seed,
    q_starts,
    k_starts,
    dout_b,
    dout_t,
    dout_h,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    dk_b,
    dk_t,
    dk_h,
    dv_b,
    dv_t,
    dv_h,
    lse_b,
    lse_h,
    plane,
    batch_heads,
    heads,
    queries,
    keys,
    diagonal,
    log2_scale,
    scale,
    factor,
    threshold,
    group,
    tiles,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    PARTIAL: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head = _place(tiles, batch_heads, group, False)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    begin = tile * ROWS
    row = begin + tl.arange(0, ROWS)
    dout += h * dout_h
    q += h * q_h
    k += h * k_h
    v += h * v_h
    dk += h * dk_h
    dv += h * dv_h
    lse += h * lse_h
    delta += h * lse_h
    k_first = begin.to(tl.int64)
    if q_starts is not None:
        q_first = tl.load(q_starts + b).to(tl.int64)
        document = tl.load(k_starts + b).to(tl.int64)
        queries = (tl.load(q_starts + b + 1) - q_first).to(tl.int32)
        keys = (tl.load(k_starts + b + 1) - document).to(tl.int32)
        diagonal = keys - queries
        q += q_first * q_t
        dout += q_first * dout_t
        lse += q_first
        delta += q_first
        k_first += document
        if begin >= keys:
            return
    else:
        dout += b * dout_b
        q += b * q_b
        k += b * k_b
        v += b * v_b
        dk += b * dk_b
        dv += b * dv_b
        lse += b * lse_b
        delta += b * lse_b
    count = keys - begin
    keys_here = _load(k + k_first * k_t, k_t, count, ROWS, SIZE, WIDTH, True)
    values = _load(v + k_first * v_t, v_t, count, ROWS, SIZE, WIDTH, True)
    first, second = row, row
    if seed is not None:
        first, second = head_words(seed, b, h)
    dk_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    dv_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    from_whole = begin * 0
    if CAUSAL:
        from_first = tl.minimum(tl.maximum(begin - diagonal, 0), queries) // COLUMNS * COLUMNS
        seen_by_all = tl.maximum(begin + ROWS - 1 - diagonal, 0)  # the first query that sees all
        from_whole = (seen_by_all + COLUMNS - 1) // COLUMNS * COLUMNS
        q += from_first.to(tl.int64) * q_t
        dout += from_first.to(tl.int64) * dout_t
        masked_end = tl.minimum(from_whole, queries)
        dk_acc, dv_acc = _scatter(
            dk_acc, dv_acc, keys_here, values, q, dout, lse, delta, plane, q_t, dout_t, row,
            from_first, masked_end, queries, diagonal, log2_scale, factor, first, second, threshold,
            True, PARTIAL, seed is not None, EXACT, COLUMNS, SIZE, WIDTH, PRECISION,
        )  # fmt: skip
        q += (from_whole - from_first).to(tl.int64) * q_t
        dout += (from_whole - from_first).to(tl.int64) * dout_t
    dk_acc, dv_acc = _scatter(
        dk_acc, dv_acc, keys_here, values, q, dout, lse, delta, plane, q_t, dout_t, row,
        from_whole, queries, queries, diagonal, log2_scale, factor, first, second, threshold,
        False, PARTIAL, seed is not None, EXACT, COLUMNS, SIZE, WIDTH, PRECISION,
    )  # fmt: skip
    _store(dk + k_first * dk_t, dk_t, count, dk_acc * scale, ROWS, SIZE, WIDTH)
    _store(dv + k_first * dv_t, dv_t, count, dv_acc * factor, ROWS, SIZE, WIDTH)


# ---- launches --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes and options, of a batch or of documents (where `q_starts` is there)."""

    batch: int
    heads: int
    queries: int  # of the longest document
    keys: int
    size: int
    causal: bool
    diagonal: int
    scale: float
    dropout_p: float
    seed: Tensor | None
    lse_strides: tuple[int, int, int]  # over batch, heads, planes
    q_starts: Tensor | None = None
    k_starts: Tensor | None = None

    def group(self, length: int, itemsize: int) -> int:
        """How many heads run together, of which two (length, D) tensors shall stay in L2."""
        return max(1, GROUP_BYTES // max(1, 2 * length * self.size * itemsize))

    def configure(self, kind: str, q: Tensor, run: Callable[[Config], None]) -> Config:
        """The tuned configuration, or the rule's."""
        if self.size > WIDEST:
            raise ValueError(
                f"the Triton attention takes head sizes of at most {WIDEST}, got {self.size}"
            )
        lengths = (self.queries, self.keys)
        if self.q_starts is not None:  # the longest document is another in every batch
            lengths = (power_of_two(self.queries), power_of_two(self.keys))
        key = (kind, self.batch, self.heads, *lengths, self.size, q.dtype,
               self.causal, self.seed is not None, self.q_starts is not None)  # fmt: skip
        more = self.seed is not None or self.q_starts is not None
        first = rule(kind, self.size, q.dtype, target_of(q).arch, more)
        return tuned("attention", key, q, first, candidates(kind, self.size, q.dtype), run)

    def constants(self, config: Config, dtype: torch.dtype) -> dict[str, Any]:
        """The kernels' common constexpr parameters and options."""
        return {
            "CAUSAL": self.causal,
            "SIZE": self.size,
            "WIDTH": max(16, power_of_two(self.size)),
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "PRECISION": dot_precision(dtype),
            "warps": config.warps,
            "stages": config.stages,
        }


def _strides(problem: _Problem, *tensors: Tensor) -> tuple[int, ...]:
    """Strides over b, t, h of each (B, T, H, D) tensor; over b they are 0 for documents."""
    if problem.q_starts is None:
        return tuple(stride for t in tensors for stride in t.stride()[:3])
    return tuple(stride for t in tensors for stride in (0, *t.stride()[:2]))


def _shared(strides: tuple[int, ...], first: int, second: int) -> tuple[int | None, ...]:
    """`strides` with None in place `second` where it says the same as `first`."""
    same = strides[first] == strides[second]
    return tuple(None if same and i == second else s for i, s in enumerate(strides))


def _run_forward(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> None:
    def run(config: Config) -> None:
        tiles = triton.cdiv(problem.queries, config.rows)
        launch(
            _forward_kernel,
            (tiles * problem.batch * problem.heads,),
            q,
            k,
            v,
            out,
            lse,
            problem.seed,
            problem.q_starts,
            problem.k_starts,
            *_shared(_strides(problem, q, k, v, out), 4, 7),
            *problem.lse_strides,
            problem.batch * problem.heads,
            problem.heads,
            problem.queries,
            problem.keys,
            problem.diagonal,
            abs(problem.scale) * LOG2_E,
            *dropout_numbers(problem.dropout_p),
            problem.group(problem.keys, q.element_size()),
            tiles,
            NEGATIVE=problem.scale < 0,
            **problem.constants(config, q.dtype),
        )

    run(problem.configure(FORWARD, q, run))


def _run_backward(
    problem: _Problem,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    delta = torch.empty_like(lse[0])
    exact = q.dtype == torch.float32

    def common(tiles: int, length: int) -> tuple[Any, ...]:
        return (
            *problem.lse_strides,
            problem.batch * problem.heads,
            problem.heads,
            problem.queries,
            problem.keys,
            problem.diagonal,
            problem.scale * LOG2_E,
            0.0 if problem.keys == 1 else problem.scale,  # one key: dS is nothing but rounding
            *dropout_numbers(problem.dropout_p),
            problem.group(length, q.element_size()),
            tiles,
        )

    def run_dq(config: Config) -> None:
        tiles = triton.cdiv(problem.queries, config.rows)
        launch(
            _dq_kernel,
            (tiles * problem.batch * problem.heads,),
            dout,
            q,
            k,
            v,
            out,
            lse,
            delta,
            dq,
            problem.seed,
            problem.q_starts,
            problem.k_starts,
            *_shared(_strides(problem, dout, q, k, v, out, dq), 7, 10),
            *common(tiles, problem.keys),
            EXACT=exact,
            **problem.constants(config, q.dtype),
        )

    def run_dkv(config: Config) -> None:
        tiles = triton.cdiv(problem.keys, config.rows)
        launch(
            _dkv_kernel,
            (tiles * problem.batch * problem.heads,),
            dout,
            q,
            k,
            v,
            lse,
            delta,
            dk,
            dv,
            problem.seed,
            problem.q_starts,
            problem.k_starts,
            *_strides(problem, dout, q, k, v, dk, dv),
            *common(tiles, problem.queries),
            EXACT=exact,
            PARTIAL=problem.q_starts is not None or problem.queries % config.columns != 0,
            **problem.constants(config, q.dtype),
        )

    run_dq(problem.configure(DQ, q, run_dq))  # first: it writes delta
    run_dkv(problem.configure(DKV, q, run_dkv))


def _problem(
    q: Tensor, k: Tensor, diagonal: int | None, scale: float, dropout_p: float, seed: Tensor | None
) -> _Problem:
    batch, queries, heads, size = q.shape
    return _Problem(
        batch,
        heads,
        queries,
        k.shape[1],
        size,
        diagonal is not None,
        diagonal or 0,
        scale,
        dropout_p,
        seed,
        (heads * queries, queries, batch * heads * queries),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse and its rounding error in base 2, (2, B, H, Tq) fp32).

    q, k, v: (B, T, H, D) views with contiguous D.
    """
    batch, queries, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, batch, heads, queries), dtype=torch.float32)
    _run_forward(_problem(q, k, diagonal, scale, dropout_p, seed), q, k, v, out, lse)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    diagonal: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes the gradients into dq, dk, dv: (B, T, H, D) views with contiguous D, as the inputs."""
    problem = _problem(q, k, diagonal, scale, dropout_p, seed)
    _run_backward(problem, dout, q, k, v, out, lse, dq, dk, dv)


def _documents(
    q: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> _Problem:
    total, heads, size = q.shape
    return _Problem(
        q_starts.shape[0] - 1,
        heads,
        max_queries,
        max_keys,
        size,
        causal,
        0,
        scale,
        dropout_p,
        seed,
        (0, total, heads * total),
        q_starts,
        k_starts,
    )


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; lse and its rounding error in base 2, (2, H, total queries) fp32).

    q, k, v: (total, H, D) views with contiguous D; starts: (B + 1,) contiguous.
    """
    total, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((2, heads, total), dtype=torch.float32)
    problem = _documents(
        q, q_starts, k_starts, max_queries, max_keys, causal, scale, dropout_p, seed
    )
    _run_forward(problem, q, k, v, out, lse)
    return out, lse


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes the gradients into dq, dk, dv: (total, H, D) views with contiguous D, as the inputs."""
    problem = _documents(
        q, q_starts, k_starts, max_queries, max_keys, causal, scale, dropout_p, seed
    )
    _run_backward(problem, dout, q, k, v, out, lse, dq, dk, dv)
