"""Linear + cross-entropy on the CPU: matrix products (ops/linear) around the cross-entropy kernels.

Rows go in chunks, so that few logits exist at a time. Where gradients are wanted and their upstream
gradient is one number, a chunk's logits turn into their gradient in place, one row after another
while it is in the cache, and the two products of backward follow at once:

    logits = x_c W^T;  loss, dlogits = cross_entropy(logits)
    dx_c = dlogits W;  dW += dlogits^T x_c

Logits, their gradient, dx and dW are fp32 whatever the inputs, so that sums are rounded once and
fp16 gradients do not underflow before a loss scale reaches them. Half-precision weights are widened
in slices of the vocabulary: CPUs without 16-bit arithmetic multiply fp32 2 to 3 times faster.
FLOPs: 2 M V C forward, 6 M V C with gradients; memory: chunk_bytes + dW + dx.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.cross_entropy.cpu import count, mean_factor
from gpt2fast.ops.linear.cpu import matmul
from gpt2fast.ops.registry import DTYPE_CODES

SLICE_BYTES = 16 << 20  # of widened half-precision weights at a time


class _Head:
    """Products with the first `vocab_size` rows of the weight, in fp32."""

    def __init__(self, weight: Tensor, vocab_size: int) -> None:
        self.weight = weight[:vocab_size]
        self.classes, width = self.weight.shape
        self.step = self.classes
        self.wide: Tensor | None = None
        if weight.dtype != torch.float32:
            self.step = max(1, min(self.classes, SLICE_BYTES // (4 * width)))
            self.wide = weight.new_empty((self.step, width), dtype=torch.float32)

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """(slice of the vocabulary, its fp32 weights); the weights are valid until the next."""
        if self.wide is None:
            yield slice(0, self.classes), self.weight
            return
        for begin in range(0, self.classes, self.step):
            part = slice(begin, min(begin + self.step, self.classes))
            yield part, self.wide[: part.stop - begin].copy_(self.weight[part])

    def logits(self, x: Tensor, out: Tensor) -> None:
        for part, weight in self.slices():
            matmul(x, weight.t(), out=out[:, part])

    def dx(self, dlogits: Tensor, out: Tensor) -> None:
        for part, weight in self.slices():
            matmul(dlogits[:, part], weight, out=out, add=part.start > 0)


def _add_dweight(dlogits: Tensor, x: Tensor, dweight: Tensor, first: bool) -> None:
    matmul(dlogits.t(), x, out=dweight, add=not first)


def _chunks(rows: int, classes: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of the rows, of equal size but for rounding, of at most `chunk_bytes` fp32 logits."""
    most = max(1, chunk_bytes // (4 * classes))
    number = -(-rows // most)
    for i in range(number):
        yield slice(rows * i // number, rows * (i + 1) // number)


def _buffer(x: Tensor, classes: int, chunk_bytes: int) -> Tensor:
    # Rows start on a cache line: an odd vocabulary would misalign them all.
    rows = max((c.stop - c.start for c in _chunks(x.shape[0], classes, chunk_bytes)), default=0)
    return x.new_empty((rows, -(-classes // 16) * 16), dtype=torch.float32)[:, :classes]


def _gradients(
    x: Tensor, weight: Tensor, vocab_size: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx = x.new_empty(x.shape, dtype=torch.float32) if need_dx else None
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if need_dweight else None
    if dweight is not None:
        if x.shape[0] == 0:
            dweight.zero_()
        dweight[vocab_size:].zero_()
    return dx, dweight


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
    """On x (M, C), weight (V, C), targets (M,), all fp32 but the targets: (loss () or (M,),
    logprobs (M,), statistics (M, 2) for `backward`, dx (M, C), dweight (V, C)).

    Gradients, where needed, are those of the loss for an upstream gradient of one; with reduction
    "none" there are none yet.
    """
    rows = x.shape[0]
    factor = mean_factor(count(targets, vocab_size, ignore_index), reduction)
    losses, logprobs = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    statistics = x.new_empty((rows, 2), dtype=torch.float32)
    dx, dweight = _gradients(x, weight, vocab_size, need_dx, need_dweight)
    head, buffer = _Head(weight, vocab_size), _buffer(x, vocab_size, chunk_bytes)
    kernels, threads = cpu_kernels(), torch.get_num_threads()
    for chunk in _chunks(rows, vocab_size, chunk_bytes):
        part = x[chunk].float()
        logits = buffer[: part.shape[0]]
        head.logits(part, logits)
        kernels.cross_entropy_forward(
            logits.data_ptr(),
            logits.stride(0),
            targets[chunk].data_ptr(),
            losses[chunk].data_ptr(),
            logprobs[chunk].data_ptr(),
            statistics[chunk].data_ptr(),
            need_dx or need_dweight,
            factor,
            *logits.shape,
            vocab_size,
            ignore_index,
            label_smoothing,
            z_loss,
            DTYPE_CODES[logits.dtype],
            threads,
        )
        if dx is not None:
            head.dx(logits, dx[chunk])
        if dweight is not None:
            _add_dweight(logits, part, dweight[:vocab_size], chunk.start == 0)
    loss = losses if reduction == "none" else losses.sum() * factor
    return loss, logprobs, statistics, dx, dweight


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
    rows = x.shape[0]
    factor = mean_factor(count(targets, vocab_size, ignore_index), reduction)
    dx, dweight = _gradients(x, weight, vocab_size, need_dx, need_dweight)
    head, buffer = _Head(weight, vocab_size), _buffer(x, vocab_size, chunk_bytes)
    upstream = dloss.reshape(-1).expand(rows)
    for chunk in _chunks(rows, vocab_size, chunk_bytes):
        part = x[chunk].float()
        logits = buffer[: part.shape[0]]
        head.logits(part, logits)
        cpu_kernels().cross_entropy_backward(
            upstream[chunk].data_ptr(),
            upstream.stride(0),
            factor,
            logits.data_ptr(),
            logits.stride(0),
            targets[chunk].data_ptr(),
            statistics[chunk].data_ptr(),
            logits.data_ptr(),
            logits.stride(0),
            *logits.shape,
            vocab_size,
            ignore_index,
            label_smoothing,
            z_loss,
            DTYPE_CODES[logits.dtype],
            torch.get_num_threads(),
        )
        if dx is not None:
            head.dx(logits, dx[chunk])
        if dweight is not None:
            _add_dweight(logits, part, dweight[:vocab_size], chunk.start == 0)
    return dx, dweight


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, which costs nothing where the factor is 1."""
    if factor.item() != 1.0:
        gradient.mul_(factor)
