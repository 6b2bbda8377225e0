"""Cross-entropy on Triton: the loss, its gradient, or both in one launch over the logits.

forward   m = max z,  s = sum exp(z - m),  lse = m + log s       over the K = `vocab_size` classes
          loss = (1 - e) (lse - z_t) + e (lse - mean z) + zl lse^2    e label smoothing, zl z-loss
          logprob = z_t - lse
backward  dz_j = u (p_j (1 + 2 zl lse) - e / K - (1 - e) [j = t]),  p_j = exp(z_j - m) / s
          u the upstream gradient, over the number of rows not ignored for the mean
source    Szegedy et al. 2016, arXiv:1512.00567; Chowdhery et al. 2022, arXiv:2204.02311; online
          softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
layout    rows (R, V) of contiguous columns at any row stride; the gradient may overwrite the logits.
          Columns from K on pad the vocabulary: they are not looked at and get gradient 0.
moves     forward 1 read of the logits, backward 1 read and 1 write. Both at once: 1 read and 1 write
          of memory, and a second read while the row is in a cache; therefore few programs with many
          threads, so that the rows under way together fit the L2 cache. (A whole GPT-2 row in
          registers spills.)
work      a program has a row, or some short ones. It reads tiles of UNROLL x LANES x VEC columns, VEC
          making 16 bytes: a thread gets UNROLL such pieces, asked for all at once. Maximum and sum
          are kept per lane, which is per thread, and meet at the row's end: one exponential per
          logit, no barrier in the loop. Where rows do not start on 16 bytes (an odd vocabulary), the
          up to VEC - 1 first columns are a masked piece of their own and the tiles begin on the
          boundary after them. Only what is left beyond the full tiles has a mask of columns.
saves     m and s per row. Not lse: at logits of 1e4 its rounding would be the relative error of p.

Nothing waits for the GPU: the number of rows that count is a scalar on the device. A target that is
neither a class nor ignored makes its row's loss and gradient NaN; nothing is read or written there.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.triton_common import INTERPRETED, launch, power_of_two, tuned

LOWEST = (
    -3.4028234663852886e38
)  # fp32's; the maximum of nothing, which unlike -inf can be subtracted


@dataclasses.dataclass(frozen=True)
class Config:
    warps: int
    unroll: int  # 16-byte pieces of a row that a thread asks for at once
    rows: int = 1


def rule(rows: int, columns: int, itemsize: int, reread: bool, smoothing: bool) -> Config:
    """Four pieces a thread, and as many warps as still have some full tiles in a row: up to 8, or
    more where rows are read twice, so that the rows under way (98 KB in bf16 at GPT-2's vocabulary)
    are few: some two on a multiprocessor. There smoothing would spill with four pieces."""
    if INTERPRETED:
        return Config(4, 2, min(16, power_of_two(rows)))  # it likes few programs
    pieces = columns * itemsize // 512  # of 16 bytes for each lane of a warp
    most = 8 * itemsize if reread else 8
    warps = min(most, 1 << max(0, (pieces // 4).bit_length() - 1))
    unroll = 1 if pieces < 4 else 2 if reread and smoothing else 4
    return Config(warps, unroll, max(1, 8 // (warps * unroll)))


def candidates() -> list[Config]:
    """What autotuning tries beside the rule."""
    return [Config(warps, unroll) for warps in (4, 8, 16, 32) for unroll in (1, 2, 4, 8)]


@triton.jit
def _tile(UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile: consecutive lanes have consecutive pieces of VEC."""
    piece = tl.arange(0, UNROLL)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    return (piece * VEC + tl.arange(0, VEC)[None, None, :])[None, :, :, :]


@triton.jit
def _absorb(x, most, total):
    """Takes a tile into the running maximum and sum of exponentials of each lane.

    tl.max passes a NaN by; it comes back through the exponential.
    """
    grown = tl.maximum(most, tl.max(tl.max(x, 3), 1))
    return grown, total * tl.exp(most - grown) + tl.sum(
        tl.sum(tl.exp(x - grown[:, None, :, None]), 3), 1
    )


@triton.jit
def _bounds(offset, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """The first offset of a row that is a multiple of VEC, and how many columns lie before it."""
    if ALIGNED:
        return offset, (offset * 0).to(tl.int32)
    start = (offset + (VEC - 1)) // VEC * VEC
    return start, (start - offset).to(tl.int32)


@triton.jit
def _full_tiles(classes, BLOCK: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """How many tiles need no mask in any row, whatever the columns before its boundary."""
    return classes // BLOCK if ALIGNED else tl.maximum(classes - (VEC - 1), 0) // BLOCK


@triton.jit
def _write_rows(
    logits,  # at each row's first aligned column
    out,  # at the same column
    there,
    valid,
    head,
    columns,
    classes,
    readable,
    most,
    scale,
    rest,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """exp(z - most) * scale - rest in the classes, 0 after them. Only `valid` rows are read; the
    others have numbers that make this 0."""
    kind = out.dtype.element_ty
    there, valid = there[:, None, None, None], valid[:, None, None, None]
    head, most = head[:, None, None, None], most[:, None, None, None]
    scale, rest = scale[:, None, None, None], rest[:, None, None, None]
    tile = _tile(UNROLL, LANES, VEC)
    small = _tile(1, LANES, VEC)
    if not ALIGNED:
        before = small - head
        real = before + head < tl.minimum(head, classes)
        first = tl.load(logits + before, mask=real & valid, other=0.0).to(tl.float32)
        first = tl.where(real, tl.exp(first - most) * scale - rest, 0.0)
        mask = (before + head < tl.minimum(head, columns)) & there
        tl.store(out + before, first.to(kind), mask=mask)
    full = _full_tiles(classes, UNROLL * LANES * VEC, VEC, ALIGNED)
    for i in range(full):
        c = i * (UNROLL * LANES * VEC) + tile
        x = tl.load(logits + c, mask=valid, other=0.0, eviction_policy="evict_first")
        g = tl.exp(x.to(tl.float32) - most) * scale - rest
        tl.store(out + c, g.to(kind), mask=there)
    for start in range(full * (UNROLL * LANES * VEC), columns, LANES * VEC):
        c = start + small
        mask = (c < readable - head) & valid
        x = tl.load(logits + c, mask=mask, other=0.0, eviction_policy="evict_first")
        g = tl.exp(x.to(tl.float32) - most) * scale - rest
        g = tl.where(c < classes - head, g, 0.0)
        tl.store(out + c, g.to(kind), mask=(c < columns - head) & there)


@triton.jit
def _factors(u, at_target, highest, total, classes, smoothing, z_loss, Z_LOSS: tl.constexpr):
    """For the upstream gradient u: what `_write_rows` needs, and the target's gradient."""
    share = smoothing / classes
    top = tl.exp(at_target - highest)
    # p - 1 is formed before it is rounded.
    hit = (top - total) / total + (smoothing - share)
    scale = u / total
    if Z_LOSS:
        penalty = 2 * z_loss * (highest + tl.log(total))
        scale *= 1 + penalty
        hit += top / total * penalty
    return scale, u * share, u * hit


@triton.jit
def _forward_kernel(
    logits,
    targets,
    losses,
    logprobs,
    statistics,
    count,
    rows,
    stride,
    columns,
    classes,
    readable,
    ignore_index,
    smoothing,
    z_loss,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    target = tl.load(targets + row, mask=there, other=ignore_index)
    valid = there & (target != ignore_index)
    inside = (target >= 0) & (target < classes) & valid
    offset = row * stride
    start, head = _bounds(offset, VEC, ALIGNED)
    at_target = tl.load(logits + offset + target, mask=inside, other=float("nan")).to(tl.float32)
    # The mean is taken of z - z_t, so that large logits cancel before they are summed.
    shift = tl.where(tl.abs(at_target) < float("inf"), at_target, 0.0)

    tile = _tile(UNROLL, LANES, VEC)
    small = _tile(1, LANES, VEC)
    # What belongs to a row, beside a tile.
    z = logits + start[:, None, None, None]
    read, first_column = valid[:, None, None, None], head[:, None, None, None]
    level = shift[:, None, None, None]
    # The maximum of nothing is fp32's lowest number, which unlike -inf can be subtracted.
    most = tl.full((ROWS, LANES), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    plain = tl.zeros((ROWS, LANES), tl.float32)
    if not ALIGNED:
        real = (small < tl.minimum(first_column, classes)) & read
        first = tl.load(z + (small - first_column), mask=real, other=-float("inf")).to(tl.float32)
        most, total = _absorb(first, most, total)
        if SMOOTHING:
            plain += tl.sum(tl.sum(tl.where(real, first - level, 0.0), 3), 1)
    full = _full_tiles(classes, UNROLL * LANES * VEC, VEC, ALIGNED)
    for i in range(full):
        # Those that are read again should stay in the cache.
        policy: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
        place = z + (i * (UNROLL * LANES * VEC) + tile)
        x = tl.load(place, mask=read, other=0.0, eviction_policy=policy).to(tl.float32)
        most, total = _absorb(x, most, total)
        if SMOOTHING:
            plain += tl.sum(tl.sum(x - level, 3), 1)
    for begin in range(full * (UNROLL * LANES * VEC), classes, LANES * VEC):
        c = begin + small
        mask = (c < readable - first_column) & read
        x = tl.load(z + c, mask=mask, other=-float("inf")).to(tl.float32)
        real = c < classes - first_column
        most, total = _absorb(tl.where(real, x, -float("inf")), most, total)
        if SMOOTHING:
            plain += tl.sum(tl.sum(tl.where(real, x - level, 0.0), 3), 1)

    highest = tl.max(most, 1)
    total = tl.sum(total * tl.exp(most - highest[:, None]), 1)
    highest = tl.where(valid, highest, 0.0)
    total = tl.where(valid, total, 1.0)
    log_total = tl.log(total)
    logprob = (at_target - highest) - log_total
    loss = -logprob
    if SMOOTHING:
        mean = tl.sum(plain, 1) / classes
        loss = (1 - smoothing) * loss + smoothing * ((highest - shift) + log_total - mean)
    if Z_LOSS:
        lse = highest + log_total
        loss += z_loss * lse * lse
    tl.store(losses + row, tl.where(valid, loss, 0.0), mask=there)
    if logprobs is not None:
        tl.store(logprobs + row, tl.where(valid, logprob, 0.0), mask=there)
    tl.store(statistics + 2 * row, highest, mask=there)
    tl.store(statistics + 2 * row + 1, total, mask=there)
    if GRADIENT:
        u = tl.where(inside, 1.0, float("nan"))
        if count is not None:
            u /= tl.load(count)
        u = tl.where(valid, u, 0.0)
        scale, rest, hit = _factors(
            u, at_target, highest, total, classes, smoothing, z_loss, Z_LOSS
        )
        _write_rows(
            z,
            z,
            there,
            valid,
            head,
            columns,
            classes,
            readable,
            highest,
            scale,
            rest,
            UNROLL,
            LANES,
            VEC,
            ALIGNED,
        )
        tl.debug_barrier()  # other threads have written there
        tl.store(logits + offset + target, hit.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dloss,
    logits,
    targets,
    statistics,
    count,
    dlogits,
    rows,
    dloss_stride,
    stride,
    dlogits_stride,
    columns,
    classes,
    readable,
    ignore_index,
    smoothing,
    z_loss,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SAME_STRIDE: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    target = tl.load(targets + row, mask=there, other=ignore_index)
    valid = there & (target != ignore_index)
    inside = (target >= 0) & (target < classes) & valid
    highest = tl.load(statistics + 2 * row, mask=there, other=0.0)
    total = tl.load(statistics + 2 * row + 1, mask=there, other=1.0)
    u = tl.load(dloss + row * dloss_stride, mask=there, other=0.0).to(tl.float32)
    if count is not None:
        u /= tl.load(count)
    u = tl.where(inside, u, tl.where(valid, float("nan"), 0.0))
    offset = row * stride
    at_target = tl.load(logits + offset + target, mask=inside, other=0.0).to(tl.float32)
    scale, rest, hit = _factors(u, at_target, highest, total, classes, smoothing, z_loss, Z_LOSS)
    start, head = _bounds(offset, VEC, ALIGNED)
    # The same stride has the same boundaries, which the compiler sees in `start` alone.
    out_start = start if SAME_STRIDE else row * dlogits_stride + head
    _write_rows(
        logits + start[:, None, None, None],
        dlogits + out_start[:, None, None, None],
        there,
        valid,
        head,
        columns,
        classes,
        readable,
        highest,
        scale,
        rest,
        UNROLL,
        LANES,
        VEC,
        ALIGNED,
    )
    tl.debug_barrier()  # other threads have written there
    tl.store(dlogits + row * dlogits_stride + target, hit.to(dlogits.dtype.element_ty), mask=inside)


@triton.jit
def _count_kernel(targets, count, rows, ignore_index, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        target = tl.load(targets + row, mask=row < rows, other=ignore_index)
        found += ((target != ignore_index) & (row < rows)).to(tl.int32)
    tl.store(count, tl.sum(found, 0).to(tl.float32))


@triton.jit
def _reduce_kernel(losses, count, loss, rows, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(losses + row, mask=row < rows, other=0.0)
    result = tl.sum(total, 0)
    if count is not None:
        result /= tl.load(count)
    tl.store(loss, result)


def count_of(targets: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """How many of the targets (R,) are not ignored, as () fp32 on the device; None if no mean is
    asked for."""
    if reduction != "mean":
        return None
    count = targets.new_empty((), dtype=torch.float32)
    rows = targets.shape[0]
    launch(_count_kernel, (1,), targets, count, rows, ignore_index, BLOCK=4096, warps=16)
    return count


def reduced(losses: Tensor, count: Tensor | None, reduction: str) -> Tensor:
    """The row losses (R,), their sum, or with `count` their mean, added in a fixed order."""
    if reduction == "none":
        return losses
    loss = losses.new_empty(())
    launch(_reduce_kernel, (1,), losses, count, loss, losses.shape[0], BLOCK=4096, warps=16)
    return loss


def _layout(logits: Tensor, classes: int) -> tuple[int, dict[str, int | bool]]:
    """Up to where reading a row is harmless, and the constants of its layout.

    Masks by a multiple of 16 leave 16-byte loads whole; what they read beyond the classes is pad.
    """
    columns, stride = logits.shape[1], logits.stride(0)
    aligned = stride % 16 == 0
    rounded = -(-classes // 16) * 16
    readable = rounded if aligned and rounded <= columns else classes
    return readable, {"VEC": 16 // logits.element_size(), "ALIGNED": aligned}


def forward_rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    logprobs: Tensor | None,
    statistics: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
    gradient: bool,
) -> None:
    """Writes losses (R,), log-probabilities (R,) where wanted and statistics (R, 2) of logits (R, V).

    With `gradient` the gradient of the sum of losses, over `count` where that is given, takes the
    place of the logits.
    """
    rows, columns = logits.shape
    readable, layout = _layout(logits, vocab_size)

    def run(config: Config) -> None:
        launch(
            _forward_kernel,
            (triton.cdiv(rows, config.rows),),
            logits,
            targets,
            losses,
            logprobs,
            statistics,
            count if gradient else None,
            rows,
            logits.stride(0),
            columns,
            vocab_size,
            readable,
            ignore_index,
            label_smoothing,
            z_loss,
            ROWS=config.rows,
            UNROLL=config.unroll,
            LANES=32 * config.warps,
            SMOOTHING=label_smoothing != 0,
            Z_LOSS=z_loss != 0,
            GRADIENT=gradient,
            warps=config.warps,
            **layout,
        )

    chosen = rule(rows, vocab_size, logits.element_size(), gradient, label_smoothing != 0)
    # What overwrites its input cannot be repeated on it.
    run(chosen if gradient else _tuned("forward", logits, vocab_size, chosen, run))


def backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
) -> None:
    """Writes the gradient to dlogits (R, V), which may be the logits; dloss is () or (R,) fp32."""
    count = count_of(targets, ignore_index, reduction)
    backward_rows(
        dloss,
        dloss.stride(0) if reduction == "none" else 0,
        logits,
        targets,
        statistics,
        count,
        dlogits,
        ignore_index,
        label_smoothing,
        z_loss,
        vocab_size,
    )


def backward_rows(
    dloss: Tensor,
    dloss_stride: int,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    count: Tensor | None,
    dlogits: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> None:
    """Writes the gradient of rows whose losses have the gradients dloss[row * dloss_stride], over
    `count` where that is given."""
    rows, columns = logits.shape
    readable, layout = _layout(logits, vocab_size)
    inplace = dlogits.data_ptr() == logits.data_ptr()

    def run(config: Config) -> None:
        launch(
            _backward_kernel,
            (triton.cdiv(rows, config.rows),),
            dloss,
            logits,
            targets,
            statistics,
            count,
            dlogits,
            rows,
            dloss_stride,
            logits.stride(0),
            dlogits.stride(0),
            columns,
            vocab_size,
            readable,
            ignore_index,
            label_smoothing,
            z_loss,
            ROWS=config.rows,
            UNROLL=config.unroll,
            LANES=32 * config.warps,
            SAME_STRIDE=logits.stride(0) == dlogits.stride(0),
            Z_LOSS=z_loss != 0,
            warps=config.warps,
            **layout,
        )

    chosen = rule(rows, vocab_size, logits.element_size(), False, False)
    run(chosen if inplace else _tuned("backward", logits, vocab_size, chosen, run))


def _tuned(
    name: str, logits: Tensor, classes: int, chosen: Config, run: Callable[[Config], None]
) -> Config:
    key = (name, *logits.shape, logits.stride(0), classes, logits.dtype)
    return tuned("cross_entropy", key, logits, chosen, candidates(), run)


def forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """On logits (R, V) and targets (R,): (loss () or (R,) fp32, statistics (R, 2) fp32)."""
    rows = logits.shape[0]
    losses = logits.new_empty((rows,), dtype=torch.float32)
    statistics = logits.new_empty((rows, 2), dtype=torch.float32)
    forward_rows(
        logits,
        targets,
        losses,
        None,
        statistics,
        None,
        ignore_index,
        label_smoothing,
        z_loss,
        vocab_size,
        False,
    )
    return reduced(losses, count_of(targets, ignore_index, reduction), reduction), statistics
