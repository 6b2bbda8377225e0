"""Every CPU op at shapes, strides, dtypes and options that nobody chose, by the fp64 rule.

A test's examples are few and always the same. `GPT2FAST_FUZZ=2000 pytest tests/ops/test_fuzz.py` runs
so many new ones a test. An example also draws the instruction set and the number of threads.

The reference's error is a random number, too: where an output has one or a few elements it may be near
zero, and twice it is missed by luck. Among thousands of examples that happens, so the long run draws
such an example's values again, and says that it is wrong where three draws are.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpt2fast
from gpt2fast.decoding import WEIGHTS, Decoder, pack
from gpt2fast.functional import (
    adamw_,
    add_layer_norm,
    cross_entropy,
    embedding,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    gelu,
    gelu_mlp,
    global_norm,
    layer_norm,
    linear_cross_entropy,
    scaled_dot_product_attention,
)
from gpt2fast.ops.linear import cpu
from tests.conftest import cpu_isa, runnable_isas
from tests.ops.numerics import DTYPES, assert_accurate, compare
from tests.test_decoding import gpt, int8_bounds, last_logits, stored

EXAMPLES = int(os.environ.get("GPT2FAST_FUZZ", "0"))
DRAWS = 3 if EXAMPLES else 1
fuzz = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)

Shape = tuple[int, ...]
#: Around the lanes of every instruction set, the blocks of attention, and nothing at all.
SIZES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 127, 128, 129]),
    st.integers(10, 140),
)
WIDTHS = SIZES.filter(bool)
FEW = st.integers(0, 4)
FEW_FROM_ONE = st.integers(1, 4)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in a larger one: the shape of that, and the way to the tensor."""

    base: Shape
    order: Sequence[int]
    slices: tuple[slice, ...]
    shape: Shape

    def view(self, base: Tensor) -> Tensor:
        """The tensor of `shape` within `base`, expanded where a dimension has one element for all."""
        return base.permute(tuple(self.order))[self.slices].expand(self.shape)


@st.composite
def layouts(draw: st.DrawFn, shape: Shape, shared: Sequence[int] | None = None) -> Layout:
    """Dimensions in any order, with steps and margins; `shared` ones (all but the last) may repeat."""
    shared = range(len(shape) - 1) if shared is None else shared
    if draw(st.booleans()):  # as mostly
        whole = tuple(range(len(shape)))
        return Layout(shape, whole, tuple(slice(None) for _ in shape), shape)
    order = draw(st.permutations(range(len(shape))))
    extents, slices = [0] * len(shape), []
    for dim, (place, count) in enumerate(zip(order, shape, strict=True)):
        if dim in shared and count and draw(st.integers(0, 4)) == 0:
            extents[place] = 1
            slices.append(slice(None))
            continue
        before, after, step = draw(st.tuples(FEW, FEW, st.sampled_from([1, 1, 2, 3])))
        extents[place] = before + count * step + after
        slices.append(slice(before, before + count * step, step))
    return Layout(tuple(extents), order, tuple(slices), shape)


def with_luck(seed: int, test: Callable[[int], None]) -> None:
    """`test` with values of one seed, or of the next where it fails."""
    for draw in range(DRAWS):
        torch.manual_seed(seed + draw)
        try:
            return test(seed + draw)
        except AssertionError:
            if draw == DRAWS - 1:
                raise


@contextmanager
def somewhere(data: st.DataObject) -> Iterator[int]:
    """On one instruction set with some threads; gives a seed for values."""
    isa = data.draw(st.sampled_from(runnable_isas()), "isa")
    threads = data.draw(st.integers(1, 4), "threads")
    seed = data.draw(st.integers(0, 2**31), "seed")
    before = torch.get_num_threads()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    try:
        with cpu_isa(isa):
            yield seed
    finally:
        torch.set_num_threads(before)


def normal(std: float, shape: Shape) -> Tensor:
    return std * torch.randn(shape)


def check(
    data: st.DataObject,
    function: Callable[..., Any],
    shapes: dict[str, Shape],
    integers: dict[str, tuple[Shape, Callable[[Shape], Tensor]]] | None = None,
    shared: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """The rule for function(**tensors, **options) with floating tensors of `shapes`.

    `integers` maps names to shapes and what makes such tensors. Weights are scaled by the root of their
    columns, as a layer's are. `shared` names the dimensions that may have stride 0: not those whose
    equal elements make a gradient vanish but for its rounding, as equal keys do. Outputs are
    transposed, so that upstream gradients come in any order of dimensions.
    """
    makers = {
        name: (shape, partial(normal, shape[-1] ** -0.5 if name.endswith("weight") else 1.0))
        for name, shape in shapes.items()
    } | (integers or {})
    found = {name: data.draw(layouts(shape, shared), name) for name, (shape, _) in makers.items()}
    wanted = data.draw(st.sets(st.sampled_from(list(shapes)), min_size=1), "wanted")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    turn = data.draw(st.randoms(use_true_random=False), "order of outputs").random()

    def test(seed: int) -> None:
        def run(**bases: Tensor) -> list[Tensor]:
            views = {name: found[name].view(base) for name, base in bases.items()}
            with torch.random.fork_rng(devices=[]):  # what comes next is not what made the inputs
                torch.manual_seed(seed)  # of dropout
                result = function(**views, **options)
            outputs = [result] if isinstance(result, Tensor) else list(result)
            return [o.transpose(0, -1) if turn < 0.5 and o.dim() else o for o in outputs]

        bases = {name: make(found[name].base) for name, (_, make) in makers.items()}
        assert_accurate(run, bases, dtype=dtype, wanted=sorted(wanted))

    with somewhere(data) as seed:
        with_luck(seed, test)


def some(data: st.DataObject, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Those of the optional arguments that are given."""
    return {name: shape for name, shape in shapes.items() if data.draw(st.booleans(), name)}


LEADING = st.lists(FEW, max_size=2).map(tuple) | st.tuples(SIZES)


@fuzz
@given(st.data())
def test_layer_norm(data: st.DataObject) -> None:
    leading, width = data.draw(LEADING, "leading"), data.draw(WIDTHS, "width")
    given = {"x": (*leading, width)} | some(data, {"weight": (width,), "bias": (width,)})
    check(data, layer_norm, given)


@fuzz
@given(st.data(), st.sampled_from([0.0, 0.0, 0.3, 1.0]))
def test_add_layer_norm(data: st.DataObject, dropout_p: float) -> None:
    leading, width = data.draw(LEADING, "leading"), data.draw(WIDTHS, "width")
    given = dict.fromkeys(("x", "residual"), (*leading, width))
    given |= some(data, {"weight": (width,), "bias": (width,)})
    check(data, add_layer_norm, given, dropout_p=dropout_p)


@fuzz
@given(st.data(), SIZES, WIDTHS, WIDTHS, st.booleans())
def test_linear(data: st.DataObject, rows: int, columns: int, depth: int, with_bias: bool) -> None:
    """Products by the kernel whatever machine and size: the rows of x, w or both may be columns."""
    found = [data.draw(layouts(s, ())) for s in ((rows, depth), (depth, columns), (columns,))]
    add = data.draw(st.booleans(), "add") and not with_bias

    def test(seed: int) -> None:
        a, b, bias = (layout.view(torch.randn(layout.base)) for layout in found)
        bias, out = (bias.contiguous() if with_bias else None), torch.randn(rows, columns)
        start = out.clone() if add else torch.zeros(())
        expected, truth = start + a @ b, start.double() + a.double() @ b.double()
        if bias is not None:
            expected, truth = expected + bias, truth + bias.double()
        compare("out", cpu.matmul(a, b, bias, out, add), expected, truth)

    with somewhere(data) as seed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "serves", lambda *given: True)
        with_luck(seed, test)


@fuzz
@given(st.data())
def test_gelu(data: st.DataObject) -> None:
    leading, width = data.draw(LEADING, "leading"), data.draw(WIDTHS, "width")
    check(data, gelu, {"x": (*leading, width)} | some(data, {"bias": (width,)}))


@fuzz
@given(st.data())
def test_gelu_mlp(data: st.DataObject) -> None:
    leading = data.draw(LEADING, "leading")
    width, hidden, out = data.draw(st.tuples(WIDTHS, WIDTHS, WIDTHS), "widths")
    given = {"x": (*leading, width), "fc_weight": (hidden, width), "proj_weight": (out, hidden)}
    biases = some(data, {"fc_bias": (hidden,), "proj_bias": (out,)})
    missing = {name: None for name in ("fc_bias", "proj_bias") if name not in biases}
    check(data, gelu_mlp, given | biases, **missing)


@fuzz
@given(st.data(), FEW, SIZES, WIDTHS, WIDTHS, FEW, FEW)
def test_embedding(
    data: st.DataObject,
    batch: int,
    length: int,
    width: int,
    vocabulary: int,
    position: int,
    more: int,
) -> None:
    tables = {"wte": (vocabulary, width), "wpe": (position + length + more, width)}
    idx = {"idx": ((batch, length), lambda shape: torch.randint(vocabulary, shape))}
    check(data, embedding, tables, idx, position=position)


def losses(
    data: st.DataObject, shape: Shape, columns: int
) -> tuple[dict[str, tuple[Shape, Callable[[Shape], Tensor]]], dict[str, Any]]:
    """Targets and options of a loss over `columns`; some rows ignored, but not all of a mean."""
    classes = data.draw(st.integers(1, columns), "vocab_size")
    ignored = data.draw(st.sampled_from([-100, -1, columns + 5]), "ignore_index")
    options = {
        "vocab_size": classes,
        "ignore_index": ignored,
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]), "smoothing"),
        "z_loss": data.draw(st.sampled_from([0.0, 0.0, 1e-2]), "z_loss"),
        "reduction": data.draw(
            st.sampled_from(["none", "sum", "mean"] if math.prod(shape) else ["none", "sum"]),
            "reduction",
        ),
    }

    def targets(shape: Shape) -> Tensor:
        found = torch.randint(classes, shape)
        return found.masked_fill(torch.rand(shape) < 0.2, ignored) if mask else found

    mask = options["reduction"] != "mean" and data.draw(st.booleans(), "ignored")
    return {"targets": (shape, targets)}, options


@fuzz
@given(st.data(), LEADING, WIDTHS)
def test_cross_entropy(data: st.DataObject, leading: Shape, columns: int) -> None:
    targets, options = losses(data, leading, columns)
    inplace = data.draw(st.booleans(), "inplace_backward")

    def loss(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        if inplace:
            logits = logits.contiguous() * 1
        return cross_entropy(logits, targets, inplace_backward=inplace, **options)

    check(data, loss, {"logits": (*leading, columns)}, targets, **options)


@fuzz
@given(st.data(), LEADING, WIDTHS, WIDTHS)
def test_linear_cross_entropy(
    data: st.DataObject, leading: Shape, width: int, columns: int
) -> None:
    targets, options = losses(data, leading, columns)
    options["chunk_bytes"] = data.draw(st.integers(1, 64 << 10), "chunk_bytes")

    given = {"x": (*leading, width), "weight": (columns, width)}
    options["return_logprobs"] = True
    check(data, linear_cross_entropy, given, targets, shared=(), **options)


DROPOUT = st.sampled_from([0.0, 0.0, 0.3, 1.0])
SCALES = st.sampled_from([None, None, 0.3, -0.2, 0.0])


def attention_options(
    data: st.DataObject, scale: str = "softmax_scale", causal: str = "causal"
) -> dict[str, Any]:
    """The options of attention, two of which have other names in PyTorch's function."""
    drawn = (data.draw(kind) for kind in (DROPOUT, SCALES, st.booleans()))
    return dict(zip(("dropout_p", scale, causal), drawn, strict=True))


@fuzz
@given(st.data(), FEW, SIZES, SIZES, FEW, WIDTHS)
def test_attention(
    data: st.DataObject, batch: int, queries: int, keys: int, heads: int, size: int
) -> None:
    if data.draw(st.booleans(), "flash"):
        shape = (batch, keys, heads, size)
        given = {"q": (batch, queries, heads, size), "k": shape, "v": shape}
        check(data, flash_attn_func, given, shared=(0, 2), **attention_options(data))
    else:
        shape = (batch, heads, keys, size)
        given = {"query": (batch, heads, queries, size), "key": shape, "value": shape}
        options = attention_options(data, "scale", "is_causal")
        check(data, scaled_dot_product_attention, given, shared=(0, 1), **options)


@fuzz
@given(st.data(), FEW, SIZES, FEW, WIDTHS)
def test_packed_attention(
    data: st.DataObject, batch: int, length: int, heads: int, size: int
) -> None:
    given = {"qkv": (batch, length, 3, heads, size)}
    check(data, flash_attn_qkvpacked_func, given, shared=(0, 3), **attention_options(data))


@fuzz
@given(
    st.data(),
    st.lists(st.tuples(SIZES, SIZES), max_size=4),
    FEW_FROM_ONE,
    WIDTHS,
    DROPOUT,
    st.booleans(),
)
def test_documents(
    data: st.DataObject,
    documents: list[tuple[int, int]],
    heads: int,
    size: int,
    dropout_p: float,
    causal: bool,
) -> None:
    queries, keys = ([pair[i] for pair in documents] for i in range(2))
    starts = [torch.tensor([0, *part]).cumsum(0).to(torch.int32) for part in (queries, keys)]
    longest = max(queries, default=0), max(keys, default=0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, *starts, *longest, dropout_p, causal=causal)

    given = {"q": (sum(queries), heads, size)} | dict.fromkeys("kv", (sum(keys), heads, size))
    check(data, attend, given, shared=(1,))


SHAPES = st.lists(st.lists(FEW, max_size=2).map(tuple) | st.tuples(SIZES), min_size=1, max_size=4)


@fuzz
@given(st.data(), SHAPES, st.sampled_from(DTYPES), st.integers(1, 3))
def test_adamw(data: st.DataObject, shapes: list[Shape], dtype: torch.dtype, steps: int) -> None:
    """Parameters, gradients and moments in layouts of their own."""
    own = [
        [data.draw(layouts(shape, None if name == "g" else ())) for shape in shapes]
        for name in "pgmv"
    ]
    masters = dtype != torch.float32 and data.draw(st.booleans(), "masters")
    scalars = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "grad_scale": data.draw(st.sampled_from([None, torch.tensor(0.37)])),
    }
    with somewhere(data):
        values = [
            [torch.randn(layout.base).to(dtype).double() for layout in kind] for kind in own[:2]
        ]

    def train(backend: str, dtype: torch.dtype, isa: str) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        p, g = ([v.to(dtype, copy=True) for v in kind] for kind in values)
        m, v = ([torch.zeros(layout.base, dtype=wide) for layout in kind] for kind in own[2:])
        lists = [
            [layout.view(base) for layout, base in zip(kind, bases, strict=True)]
            for kind, bases in zip(own, (p, g, m, v), strict=True)
        ]
        copies = [t.float() for t in lists[0]] if masters and dtype != torch.float64 else None
        with cpu_isa(isa), gpt2fast.use_backend(backend):
            for step in range(1, steps + 1):
                adamw_(*lists, step=step, masters=copies, **scalars)
        # Whole bases: what lies between the elements must stay.
        return [*p, *m, *v]

    isa = data.draw(st.sampled_from(runnable_isas()), "isa of the step")
    truth = train("reference", torch.float64, isa)
    expected, measured = train("reference", dtype, isa), train("cpu", dtype, isa)
    for i, tensors in enumerate(zip(measured, expected, truth, strict=True)):
        compare(f"tensor {i}", *tensors)


@fuzz
@given(st.data(), SHAPES, st.sampled_from(DTYPES))
def test_global_norm(data: st.DataObject, shapes: list[Shape], dtype: torch.dtype) -> None:
    found = [data.draw(layouts(shape)) for shape in shapes]
    with somewhere(data):
        tensors = [layout.view(torch.randn(layout.base).to(dtype)) for layout in found]
        with gpt2fast.use_backend("reference"):
            truth = global_norm([t.double() for t in tensors])
            expected = global_norm(tensors)
        with gpt2fast.use_backend("cpu"):
            compare("norm", global_norm(tensors), expected, truth)


@fuzz
@given(st.data(), SIZES, WIDTHS, WIDTHS, st.booleans(), st.sampled_from(WEIGHTS))
def test_decoding_products(
    data: st.DataObject, rows: int, outputs: int, columns: int, with_bias: bool, weights: Any
) -> None:
    found = [data.draw(layouts(s)) for s in ((rows, columns), (outputs, columns), (outputs,))]

    def test(seed: int) -> None:
        x, weight, bias = (layout.view(torch.randn(layout.base)) for layout in found)
        packed = pack(weight, weights)
        y = packed.linear(x, bias if with_bias else None)
        added = bias if with_bias else torch.zeros(outputs)
        truth = F.linear(x.double(), packed.dequantize().double(), added.double())
        if weights != "int8":
            compare("y", y, F.linear(x, packed.dequantize(), added), truth)
        elif rows:
            # The bias adds one rounding of the sum.
            near = int8_bounds(x, packed)[0] + torch.finfo(y.dtype).eps * truth.abs()
            assert ((y - truth).abs() <= near).all()

    with somewhere(data) as seed:
        with_luck(seed, test)


@fuzz
@given(st.data(), FEW_FROM_ONE, FEW_FROM_ONE, st.integers(1, 40), WIDTHS, st.lists(FEW_FROM_ONE))
def test_decoder(
    data: st.DataObject, batch: int, heads: int, size: int, vocabulary: int, parts: list[int]
) -> None:
    """Prompt and tokens, against the model on the reference with the weights as stored."""
    weights = data.draw(st.sampled_from(WEIGHTS[:2]), "weights")
    parts = [data.draw(st.integers(1, 90), "prompt"), *parts[:4]]

    def test(seed: int) -> None:
        model = gpt(
            n_layer=1, n_head=heads, n_embd=heads * size, vocab_size=vocabulary, block_size=120
        )
        rounded, decoder = stored(model, weights), Decoder(model, weights)
        idx, cache = torch.randint(vocabulary, (batch, sum(parts))), decoder.new_cache(batch)
        for part in idx.split(parts, 1):
            logits = decoder.forward_cached(part, cache)
        truth = last_logits(copy.deepcopy(rounded).double(), idx)
        compare("logits", logits, last_logits(rounded, idx), truth)

    with somewhere(data) as seed:
        with_luck(seed, test)
