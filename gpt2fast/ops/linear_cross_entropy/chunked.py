"""The chunks of linear + cross-entropy on a GPU, whichever kernels it runs on.

Rows go in chunks, so that few logits exist at a time. Where gradients are wanted and their upstream
gradient is one number, a chunk's logits turn into their gradient in place, and the two products of
backward follow at once:

    logits = x_c W^T;  loss, dlogits = cross_entropy(logits)
    dx_c = dlogits W;  dW += dlogits^T x_c

Logits and their gradient have the inputs' dtype; dx and dW are fp32, and every product adds in fp32.
fp16 gradients are those of the sum of the losses, whose probabilities fit fp16's range, and dx and
dW are divided by the number of rows for the mean.

A vocabulary that is not a multiple of 64 makes every product slow. Then the classes' weights are
copied to a padded matrix (2 x 77 MB moved for GPT-2, some 0.2 % of the work), the logits' pad columns
get gradient 0, and the weight's own pad rows are never read.

moves     4 passes over the logits besides the two of cross-entropy: written, read by two products;
          dW is read and written once more for each chunk.
FLOPs     2 M V C forward, 6 M V C with gradients; memory: chunk_bytes + dW + dx (+ W).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a backend brings: the functions of its cross-entropy, and one of its own."""

    count_of: Callable[..., Tensor | None]
    reduced: Callable[..., Tensor]
    forward_rows: Callable[..., None]
    backward_rows: Callable[..., None]
    #: (values, factor, count): values *= factor / count, 0 for no rows; either may be None
    scale: Callable[[Tensor, Tensor | None, Tensor | None], None]


@functools.cache
def _library_adds(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch adds half-precision products to fp32 matrices here: on GPUs, not on CPUs."""
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
    if a.dtype == torch.float32 or not _library_adds(a.dtype, a.device):
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _chunks(rows: int, columns: int, itemsize: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of the rows of about equal size, of at most `chunk_bytes` of logits (at least a row);
    a multiple of 128 rows where that makes no more chunks, as tiles of the products are."""
    most = max(1, chunk_bytes // (itemsize * columns))
    step = -(-rows // -(-rows // most)) if rows else 1
    step = min(most, -(-step // 128) * 128)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


class _Head:
    """The products with the classes' weights (K, C), and the buffers of a chunk and of gradients."""

    def __init__(
        self,
        kernels: Kernels,
        x: Tensor,
        weight: Tensor,
        vocab_size: int,
        chunk_bytes: int,
        need_dx: bool,
        need_dweight: bool,
    ) -> None:
        self.kernels, self.x, self.classes = kernels, x, vocab_size
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
                self.kernels.scale(gradient, factor, count)
        return [self.dx, self.dweight]


def forward(
    kernels: Kernels,
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
    count = kernels.count_of(targets, ignore_index, reduction)
    late = count if x.dtype == torch.float16 else None
    head = _Head(kernels, x, weight, vocab_size, chunk_bytes, need_dx, need_dweight)
    for chunk in head.chunks:
        logits = head.logits(chunk)
        kernels.forward_rows(
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
    return kernels.reduced(losses, count, reduction), logprobs, statistics, dx, dweight


def backward(
    kernels: Kernels,
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
    count = kernels.count_of(targets, ignore_index, reduction)
    each = reduction == "none"
    late = not each and x.dtype == torch.float16
    upstream = dloss.reshape(-1) if each else dloss.new_ones(()) if late else dloss
    head = _Head(kernels, x, weight, vocab_size, chunk_bytes, need_dx, need_dweight)
    for chunk in head.chunks:
        logits = head.logits(chunk)
        kernels.backward_rows(
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
