"""Linear + cross-entropy on Triton: matrix products around the cross-entropy kernel, in chunks.

Rows go in chunks, so that few logits exist at a time. Where gradients are wanted and their upstream
gradient is one number, a chunk's logits turn into their gradient in place, and the two products of
backward follow at once:

    logits = x_c W^T;  loss, dlogits = cross_entropy(logits)
    dx_c = dlogits W;  dW += dlogits^T x_c

Logits and their gradient have the inputs' dtype; dx and dW are fp32, and every product adds in fp32.
fp16 gradients are those of the sum of the losses, whose probabilities fit fp16's range, and dx and
dW are divided by the number of rows for the mean.

The products are PyTorch's (cuBLAS), but for half-precision products that are fp32: those are
PyTorch's where it can add to an fp32 matrix, else a kernel of our own, which the interpreter runs.

A vocabulary that is not a multiple of 64 makes every product slow. Then the classes' weights are
copied to a padded matrix (2 x 77 MB moved for GPT-2, some 0.2 % of the work), the logits' pad columns
get gradient 0, and the weight's own pad rows are never read.

moves     4 passes over the logits besides the two of cross-entropy: written, read by two products;
          dW is read and written once more for each chunk.
FLOPs     2 M V C forward, 6 M V C with gradients; memory: chunk_bytes + dW + dx (+ W).
"""

import dataclasses
import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.cross_entropy.triton import backward_rows, count_of, forward_rows, reduced
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


@functools.cache
def _library_adds(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch adds half-precision products to fp32 matrices (CUDA, from 2.9 on)."""
    if device.type != "cuda":
        return False
    a, out = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=out)
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b or out += a b, for fp32 `out`."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif not _library_adds(a.dtype, a.device):
        product(a, b, out, add)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


# ---- the loss ----------------------------------------------------------------------------------------


def _chunks(rows: int, columns: int, itemsize: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of the rows of about equal size, of at most `chunk_bytes` of logits (at least a row);
    a multiple of 128 rows where that makes no more chunks, as tiles of the products are."""
    most = max(1, chunk_bytes // (itemsize * columns))
    step = -(-rows // -(-rows // most)) if rows else 1
    step = min(most, -(-step // 128) * 128)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


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


class _Head:
    """The products with the classes' weights (K, C), and the buffers of a chunk and of gradients."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        vocab_size: int,
        chunk_bytes: int,
        need_dx: bool,
        need_dweight: bool,
    ) -> None:
        self.x, self.classes = x, vocab_size
        columns = -(-vocab_size // 64) * 64
        self.weight = weight[:vocab_size]
        if columns != vocab_size:
            self.weight = weight.new_empty((columns, weight.shape[1]))
            self.weight[:vocab_size].copy_(weight[:vocab_size])
            self.weight[vocab_size:].zero_()
        self.chunks = list(_chunks(x.shape[0], columns, x.element_size(), chunk_bytes))
        most = self.chunks[0].stop if self.chunks else 0
        self.buffer = x.new_empty((most, columns))
        self.dx = x.new_empty(x.shape, dtype=torch.float32) if need_dx else None
        self.dweight: Tensor | None = None
        if need_dweight:
            shape = (max(columns, weight.shape[0]), weight.shape[1])
            whole = weight.new_empty(shape, dtype=torch.float32)
            self.sum, self.dweight = whole[:columns], whole[: weight.shape[0]]
            if not self.chunks:
                whole.zero_()

    def logits(self, chunk: slice) -> Tensor:
        out = self.buffer[: chunk.stop - chunk.start]
        return torch.mm(self.x[chunk], self.weight.t(), out=out)

    def add_gradients(self, dlogits: Tensor, chunk: slice) -> None:
        if self.dx is not None:
            _multiply(dlogits, self.weight, self.dx[chunk])
        if self.dweight is not None:
            _multiply(dlogits.t(), self.x[chunk], self.sum, chunk.start > 0)

    def gradients(self, factor: Tensor | None, count: Tensor | None) -> list[Tensor | None]:
        """dx and dweight, times `factor` and over `count` where given."""
        if self.dweight is not None:
            self.dweight[self.classes :].zero_()
        for gradient in (self.dx, self.dweight):
            if gradient is not None and (factor is not None or count is not None):
                _scale(gradient, factor, count)
        return [self.dx, self.dweight]


def forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    chunk_bytes: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """On x (M, C), weight (V, C), targets (M,): (loss () or (M,), logprobs (M,), statistics (M, 2)
    for `backward`, dx (M, C), dweight (V, C)), all fp32.

    Gradients, where needed, are those of the loss for an upstream gradient of one; with reduction
    "none" there are none yet.
    """
    rows = x.shape[0]
    losses, logprobs = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    statistics = x.new_empty((rows, 2), dtype=torch.float32)
    count = count_of(targets, ignore_index, reduction)
    late = count if x.dtype == torch.float16 else None
    head = _Head(x, weight, vocab_size, chunk_bytes, need_dx, need_dweight)
    for chunk in head.chunks:
        logits = head.logits(chunk)
        forward_rows(
            logits,
            targets[chunk],
            losses[chunk],
            logprobs[chunk],
            statistics[chunk],
            count if late is None else None,
            ignore_index,
            label_smoothing,
            z_loss,
            vocab_size,
            need_dx or need_dweight,
        )
        head.add_gradients(logits, chunk)
    dx, dweight = head.gradients(None, late)
    return reduced(losses, count, reduction), logprobs, statistics, dx, dweight


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    chunk_bytes: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx (M, C), dweight (V, C)) in fp32 for dloss () or (M,), from logits computed once more."""
    count = count_of(targets, ignore_index, reduction)
    each = reduction == "none"
    late = not each and x.dtype == torch.float16
    upstream = dloss.reshape(-1) if each else dloss.new_ones(()) if late else dloss
    head = _Head(x, weight, vocab_size, chunk_bytes, need_dx, need_dweight)
    for chunk in head.chunks:
        logits = head.logits(chunk)
        backward_rows(
            upstream[chunk] if each else upstream,
            upstream.stride(0) if each else 0,
            logits,
            targets[chunk],
            statistics[chunk],
            None if late else count,
            logits,
            ignore_index,
            label_smoothing,
            z_loss,
            vocab_size,
        )
        head.add_gradients(logits, chunk)
    dx, dweight = head.gradients(dloss if late else None, count if late else None)
    return dx, dweight
