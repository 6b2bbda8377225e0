"""AdamW and the global norm on Triton: all tensors of a model in one launch.

step      g' = g * grad_scale,  m += (1 - beta1) (g' - m),  v += (1 - beta2) (g'^2 - v)
          p -= lr * weight_decay * p + lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
norm      sqrt(sum of all squares)
rounding  p to the nearest, or bf16 p, where there is a seed, up or down at random, up with the
          probability that makes the mean p: 16 random bits are added below the last place and the
          rest cut off. Element e of tensor t at a step has the word (seed, step, t, 0, e mod 2^32).
source    Loshchilov & Hutter 2019, as torch.optim.AdamW. Averages are written as differences, since
          fp32(1) - fp32(0.999) misses 1 - 0.999 by 1e-5 of itself.
layout    tensors of any shapes whose elements lie without gaps, p, g, m, v and master w in one order
          (others are copied). p and g fp32, bf16 or fp16; m, v and w fp32. With a master the update
          is the master's, and p is w rounded.
moves     step: p, m, v (w instead of p) read, g read, p, m, v (and w) written: 28 bytes a parameter
          in fp32, 28 in half precision with a master. Norm: g read.
work      A program takes CHUNK elements of one tensor. Which, it reads from `owners`; where the
          tensor lies, from one table of addresses per list of tensors. Tensors of one dtype and
          alignment share a launch. Norm: a program's partial sum is fp32 per lane and fp64 across
          lanes, taken again in fp64 where squares overflow or vanish; one program adds the partial
          sums in a fixed order: the same inputs give the same bits.
tables    A table is a function of the addresses in it, so it is kept under them and found again at
          the next step. It is written by kernels that carry the addresses as arguments: nothing is
          copied from the host's memory, so a table may be made while a CUDA graph is captured.
"""

import dataclasses
import functools
import math
import operator
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.ops.adamw.layout import Aligned, is_dense
from gpt2fast.ops.triton_common import INTERPRETED, head_words, launch, random_word, row_words

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: Tables kept; a model needs some ten.
KEPT = 64


@dataclasses.dataclass(frozen=True)
class Config:
    chunk: int  # elements that a program takes
    block: int  # elements at once
    warps: int


def rule() -> Config:
    """Eight elements a thread: with four or five arrays to read, 8 to 10 loads of 16 bytes in
    flight a thread. Chunks are long enough to hide finding them, and short enough for an even
    share. There is no tuning: a trial would change the parameters."""
    return Config(1 << 14, 1 << 12, 1) if INTERPRETED else Config(8192, 1024, 4)


@triton.jit
def _one_minus_power(log, number):
    """1 - beta^number from the logarithm of beta: a series where the difference would lose digits."""
    u = log * number
    series = 1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5 * (1 + u / 6 * (1 + u / 7)))))
    return tl.where(u > -0.25, -u * series, 1 - tl.exp(u))


@triton.jit
def _average(old, new, weight, rest):
    """old + weight (new - old), by the smaller of `weight` and `rest` = 1 - weight."""
    return tl.where(weight <= 0.5, old + (new - old) * weight, new + (old - new) * rest)


@triton.jit
def _at(table, tensor, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's address in its table, as a pointer to its element `start`. The compiler is told
    of addresses that are multiples of 16 bytes."""
    pointer = tl.load(table + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _load(place, offset, size, WHOLE: tl.constexpr):
    # A mask by any size would split a 16-byte access.
    if WHOLE:
        return tl.load(place + offset).to(tl.float32)
    else:
        return tl.load(place + offset, mask=offset < size, other=0.0).to(tl.float32)


@triton.jit
def _store(place, offset, size, x, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(place + offset, x.to(place.dtype.element_ty))
    else:
        tl.store(place + offset, x.to(place.dtype.element_ty), mask=offset < size)


@triton.jit
def _round_stochastically(x, word):
    """fp32 x as one of the two bf16 numbers around it; a NaN stays."""
    bits = (x.to(tl.uint32, bitcast=True) + (word >> 16)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _update(
    p, g, m, v, w, offset, size, scale, new1, old1, new2, old2, decay, rate, root, eps, first_word,
    second_word, start, WHOLE,
):  # fmt: skip
    grad = _load(g, offset, size, WHOLE) * scale
    first = _load(m, offset, size, WHOLE)
    second = _load(v, offset, size, WHOLE)
    value = _load(p if w is None else w, offset, size, WHOLE)
    first = _average(first, grad, new1, old1)
    second = _average(second, grad * grad, new2, old2)
    value -= value * decay + first / (tl.sqrt(second) * root + eps) * rate
    _store(m, offset, size, first, WHOLE)
    _store(v, offset, size, second, WHOLE)
    rounded = value
    if first_word is not None:
        word = random_word(first_word, second_word, start + offset)
        rounded = _round_stochastically(value, word)
    _store(p, offset, size, rounded, WHOLE)
    if w is not None:
        _store(w, offset, size, value, WHOLE)


@triton.jit
def _update_kernel(
    owners,
    starts,
    sizes,
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    masters,
    steps,
    places,
    lr_tensor,
    grad_scale,
    seed,
    number,
    lr,
    correction1,
    correction2,
    log1,
    log2,
    new1,
    old1,
    new2,
    old2,
    eps,
    weight_decay,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.load(owners + tl.program_id(0))
    start = (tl.program_id(0) - tl.load(starts + tensor)).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(sizes + tensor) - start, CHUNK).to(tl.int32)
    p = _at(params, tensor, start, TYPE, ALIGNED)
    g = _at(grads, tensor, start, TYPE, ALIGNED)
    m = _at(exp_avgs, tensor, start, tl.float32, ALIGNED)
    v = _at(exp_avg_sqs, tensor, start, tl.float32, ALIGNED)
    w = None
    if masters is not None:
        w = _at(masters, tensor, start, tl.float32, ALIGNED)
    if steps is not None:
        number = tl.load(_at(steps, tensor, 0, tl.float32, False))
        correction1 = _one_minus_power(log1, number)
        correction2 = _one_minus_power(log2, number)
    if lr_tensor is not None:
        lr = tl.load(lr_tensor)
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    first, second = None, None
    if seed is not None:
        first, second = head_words(seed, number, tl.load(places + tensor))
        first, second = row_words(first, second, tl.zeros((), tl.uint32))
    decay = lr * weight_decay
    rate = lr / correction1
    root = 1 / tl.sqrt(correction2)
    if size == CHUNK:
        for i in range(0, CHUNK, BLOCK):
            offset = i + tl.arange(0, BLOCK)
            _update(
                p, g, m, v, w, offset, size, scale, new1, old1, new2, old2, decay, rate, root, eps,
                first, second, start, True,
            )  # fmt: skip
    else:
        for i in range(0, size, BLOCK):
            offset = i + tl.arange(0, BLOCK)
            _update(
                p, g, m, v, w, offset, size, scale, new1, old1, new2, old2, decay, rate, root, eps,
                first, second, start, False,
            )  # fmt: skip


@triton.jit
def _squares_kernel(
    owners,
    starts,
    sizes,
    tensors,
    partials,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.load(owners + tl.program_id(0))
    start = (tl.program_id(0) - tl.load(starts + tensor)).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(sizes + tensor) - start, CHUNK).to(tl.int32)
    x = _at(tensors, tensor, start, TYPE, ALIGNED)
    lanes = tl.zeros((BLOCK,), tl.float32)
    if size == CHUNK:
        for i in range(0, CHUNK, BLOCK):
            value = _load(x, i + tl.arange(0, BLOCK), size, True)
            lanes += value * value
    else:
        for i in range(0, size, BLOCK):
            value = _load(x, i + tl.arange(0, BLOCK), size, False)
            lanes += value * value
    total = tl.sum(lanes.to(tl.float64), 0)
    if (total > 1e-20) & (total < 1e37):
        tl.store(partials + tl.program_id(0), total)
    else:  # squares may have vanished or overflowed (or there is a NaN, or all are 0)
        wide = tl.zeros((BLOCK,), tl.float64)
        for i in range(0, size, BLOCK):
            value = _load(x, i + tl.arange(0, BLOCK), size, False).to(tl.float64)
            wide += value * value
        tl.store(partials + tl.program_id(0), tl.sum(wide, 0))


@triton.jit
def _norm_kernel(partials, norm, count, BLOCK: tl.constexpr):
    lanes = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, count, BLOCK):
        offset = i + tl.arange(0, BLOCK)
        lanes += tl.load(partials + offset, mask=offset < count, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(lanes, 0)).to(tl.float32))


# ---- tables ----------------------------------------------------------------------------------------

_tables: OrderedDict[tuple[object, ...], tuple[int, list[Tensor]]] = OrderedDict()
_captured: dict[tuple[object, ...], list[Tensor]] = {}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _kept(kind: str, values: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """The tensors on `device` that `kind` makes of `values`: from the last time, or made now."""
    make = {"table": _table, "shares": _shares}[kind]
    if device.type == "meta":
        return make(values, device)
    key = kind, values, device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream, found = _tables.get(key, (0, None))
    if capturing:
        if found is None:
            return make(values, device)  # in the graph, which writes it again at every replay
        _captured[key] = found  # the graph will read it for as long as it lives
        return found
    if found is None or stream != _stream(device):  # another stream may be ahead of the writing
        found = make(values, device)
        _tables[key] = _stream(device), found
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return found


def _table(values: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """The values as int64."""
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(values))
    return [table]


def _shares(values: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """How programs share tensors out whose sizes, after the chunk's, are `values`: the tensor of
    each program, the first program of each tensor, and the sizes."""
    chunk, *sizes = values
    (table,) = _table(tuple(sizes), device)
    counts = (table + (chunk - 1)) // chunk
    owners = torch.repeat_interleave(counts, output_size=_programs(chunk, sizes))
    return [owners.int(), (counts.cumsum(0) - counts).int(), table]


def _programs(chunk: int, sizes: Iterable[int]) -> int:
    return sum(-(-size // chunk) for size in sizes)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Tensors of one launch."""

    dtype: torch.dtype
    aligned: bool
    sizes: tuple[int, ...]
    addresses: list[tuple[int, ...]]  # of each list of tensors, and what else is in a table


def _groups(
    lists: Sequence[Sequence[Tensor]], numbers: Sequence[Tensor] = (), with_places: bool = False
) -> list[_Group]:
    """The tensors by dtype and alignment; `numbers` are scalars beside them. A last column has
    their places in the lists, if asked for."""
    sizes = tuple(map(Tensor.numel, lists[0]))
    dtypes = [t.dtype for t in lists[0]]
    addresses = [tuple(map(Tensor.data_ptr, tensors)) for tensors in lists]
    aligned = not functools.reduce(operator.or_, chain(*addresses), 0) & 15
    if numbers:
        addresses.append(tuple(map(Tensor.data_ptr, numbers)))
    if with_places:
        addresses.append(tuple(range(len(sizes))))
    if aligned and len(set(dtypes)) == 1 and 0 not in sizes:
        return [_Group(dtypes[0], True, sizes, addresses)]
    found: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, dtype in enumerate(dtypes):
        if sizes[i]:
            whole = not any(column[i] & 15 for column in addresses[: len(lists)])
            found.setdefault((dtype, whole), []).append(i)
    return [
        _Group(
            *key,
            tuple(sizes[i] for i in of),
            [tuple(column[i] for i in of) for column in addresses],
        )
        for key, of in found.items()
    ]


# ---- the backend -----------------------------------------------------------------------------------


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    seed: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place: p and g of one dtype, moments and masters fp32, grad_scale a fp32 scalar.

    `masters` is empty or has one for each parameter; so has `steps`, which then stands in for
    `step`, as `lr_tensor` does for `lr`. With a `seed` bf16 parameters are rounded stochastically.
    """
    config, device = rule(), params[0].device
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else [])]
    aligned = Aligned(lists, [True, False, True, True, True][: len(lists)], seed is not None)
    for group in _groups(aligned.lists, steps, seed is not None):
        tables: list[Tensor | None] = [
            _kept("table", column, device)[0] for column in group.addresses
        ]
        if not masters:
            tables.insert(4, None)
        if not steps:
            tables.insert(5, None)
        stochastic = seed is not None and group.dtype == torch.bfloat16
        if not stochastic:
            tables[6:] = [None]  # the places of fp32 tensors beside them
        launch(
            _update_kernel,
            (_programs(config.chunk, group.sizes),),
            *_kept("shares", (config.chunk, *group.sizes), device),
            *tables,
            lr_tensor,
            grad_scale,
            seed if stochastic else None,
            float(step),
            float(lr),
            1.0 if steps else 1 - beta1**step,
            1.0 if steps else 1 - beta2**step,
            math.log(beta1) if beta1 else -math.inf,
            math.log(beta2) if beta2 else -math.inf,
            float(1 - beta1),
            float(beta1),
            float(1 - beta2),
            float(beta2),
            float(eps),
            float(weight_decay),
            TYPE=TYPES[group.dtype],
            ALIGNED=group.aligned,
            CHUNK=config.chunk,
            BLOCK=config.block,
            warps=config.warps,
        )
    aligned.finish()


def global_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of all squares), an fp32 scalar."""
    config, device = rule(), tensors[0].device
    dense = [t if is_dense(t) else t.contiguous() for t in tensors]
    groups = _groups([dense])
    programs = [_programs(config.chunk, group.sizes) for group in groups]
    partials = tensors[0].new_empty((sum(programs),), dtype=torch.float64)
    norm = tensors[0].new_empty((), dtype=torch.float32)
    first = 0
    for group, count in zip(groups, programs, strict=True):
        part = partials[first : first + count]
        first += count
        launch(
            _squares_kernel,
            (count,),
            *_kept("shares", (config.chunk, *group.sizes), device),
            *_kept("table", group.addresses[0], device),
            part,
            TYPE=TYPES[group.dtype],
            ALIGNED=group.aligned,
            CHUNK=config.chunk,
            BLOCK=config.block,
            warps=config.warps,
        )
    launch(_norm_kernel, (1,), partials, norm, sum(programs), BLOCK=4096, warps=16)
    return norm
