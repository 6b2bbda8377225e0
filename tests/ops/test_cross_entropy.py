"""cross_entropy: the fp64 rule, hard logits, padding, layouts, errors, torch.compile."""

import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast import backends
from gpt2fast.functional import cross_entropy
from gpt2fast.ops.cross_entropy import autograd
from tests.ops.numerics import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_deterministic,
    device_of,
)

VOCAB, PADDED = 50257, 50304
REDUCTIONS = ("none", "mean", "sum")
OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.2, "z_loss": 1e-2},
)


@pytest.fixture
def here(backend: str) -> Iterator[str]:
    """Everything in the test is on a backend and its device."""
    with gpt2fast.use_backend(backend), device_of(backend):
        yield backend


def some_targets(rows: int, classes: int, ignored: bool = True) -> Tensor:
    targets = torch.randint(0, classes, (rows,))
    if ignored and rows > 2:
        targets[1] = -100
    return targets


def loss_of(logits: Tensor, targets: Tensor, **options: object) -> Tensor:
    return cross_entropy(logits, targets, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", [1, 5, 80, 768, 2047, 2049, 4133])
def test_cross_entropy(backend: str, classes: int, options: dict, dtype: torch.dtype) -> None:
    for rows, reduction in ((1, "mean"), (3, "none"), (17, "sum")):
        inputs = {"logits": 3 * torch.randn(rows, classes), "targets": some_targets(rows, classes)}
        assert_accurate(
            lambda reduction=reduction, **kw: loss_of(reduction=reduction, **kw, **options),
            inputs,
            dtype=dtype,
            backend=backend,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gpt2_vocabulary_with_its_odd_stride(
    backend: str, reduction: str, dtype: torch.dtype
) -> None:
    inputs = {"logits": 2 * torch.randn(2, 3, VOCAB), "targets": some_targets(6, VOCAB).view(2, 3)}

    def loss(**kw: object) -> Tensor:
        return loss_of(reduction=reduction, **kw)

    assert_accurate(loss, inputs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("options", OPTIONS[::3])
@pytest.mark.parametrize("garbage", [0.0, 1e4, float("inf"), float("nan")])
def test_pad_columns_carry_no_probability(here: str, garbage: float, options: dict) -> None:
    logits = torch.randn(5, PADDED)
    logits[:, VOCAB:] = garbage
    targets = some_targets(5, VOCAB)
    results = []
    for padded in (False, True):
        leaf = logits.clone().requires_grad_()
        call = leaf if padded else leaf[:, :VOCAB]
        loss = cross_entropy(call, targets, vocab_size=VOCAB if padded else None, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[1][1][:, VOCAB:], torch.zeros(5, PADDED - VOCAB))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocab_size", [1, 50, 79, 80])
def test_vocab_size(backend: str, vocab_size: int, options: dict, dtype: torch.dtype) -> None:
    inputs = {"logits": torch.randn(9, 80), "targets": some_targets(9, vocab_size)}
    assert_accurate(
        lambda **kw: loss_of(vocab_size=vocab_size, reduction="sum", **kw, **options),
        inputs,
        dtype=dtype,
        backend=backend,
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "case",
    ["sure and right", "sure and wrong", "one huge", "huge offset", "huge negative", "spread"],
)
@pytest.mark.parametrize("width", [80, 5000])
def test_hard_logits(backend: str, width: int, case: str, options: dict) -> None:
    rows = 16
    logits, targets = torch.randn(rows, width), torch.randint(0, width, (rows,))
    each = torch.arange(rows)
    if case == "sure and right":  # p -> 1: losses from 1e-1 to below fp32's resolution
        logits[each, targets] = torch.linspace(5, 40, rows)
    elif case == "sure and wrong":
        logits[each, (targets + 1) % width] = 50
    elif case == "one huge":
        logits[each, targets] = 1e4
        logits[8:, 3] = -1e4
    elif case == "huge offset":
        logits += 1e4
    elif case == "huge negative":
        logits -= 1e4
    else:  # the maximum grows from block to block
        logits = torch.linspace(-1e4, 1e4, width).repeat(rows, 1)
        targets = torch.linspace(0, width - 1, rows).long()
    assert_accurate(
        lambda **kw: loss_of(reduction="none", **kw, **options),
        {"logits": logits, "targets": targets},
        backend=backend,
    )


@pytest.mark.parametrize("masked", ["some", "first blocks", "all but the target"])
def test_masked_logits(backend: str, masked: str) -> None:
    logits, targets = torch.randn(7, 5000), torch.randint(4500, 5000, (7,))
    if masked == "some":
        logits[torch.rand(7, 5000) < 0.5] = -torch.inf
    elif masked == "first blocks":
        logits[:, :4500] = -torch.inf
    else:
        logits[:] = -torch.inf
    logits[torch.arange(7), targets] = 1.0
    inputs = {"logits": logits, "targets": targets}
    assert_accurate(lambda **kw: loss_of(reduction="none", **kw), inputs, backend=backend)
    with gpt2fast.use_backend(backend):
        logits, targets = (t.to(device_of(backend)) for t in (logits, targets))
        leaf = logits.clone().requires_grad_()
        cross_entropy(leaf, targets).backward()
    assert (leaf.grad[logits == -torch.inf] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 79, 4999])
def test_bad_logits_show_in_the_loss(here: str, value: float, column: int) -> None:
    logits = torch.randn(3, 5000)
    logits[1, column] = value
    loss = cross_entropy(logits, torch.tensor([5, 6, 7]), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


def test_impossible_targets_match_torch(here: str) -> None:
    logits, targets = torch.randn(3, 80), torch.tensor([5, 6, 7])
    logits[1, 6] = logits[2] = -torch.inf
    for smoothing in (0.0, 0.1):
        measured, expected = (
            f(logits, targets, reduction="none", label_smoothing=smoothing)
            for f in (cross_entropy, torch.nn.functional.cross_entropy)
        )
        torch.testing.assert_close(measured, expected, equal_nan=True)


def test_matches_torch(here: str) -> None:
    logits, targets = torch.randn(33, 997), some_targets(33, 997)
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.1, 1.0):
            kw = {"reduction": reduction, "label_smoothing": smoothing}
            torch.testing.assert_close(
                cross_entropy(logits, targets, **kw),
                torch.nn.functional.cross_entropy(logits, targets, **kw),
            )


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 79, 10**9])
def test_ignore_index(backend: str, ignore_index: int) -> None:
    targets = torch.randint(1, 79, (9,))
    targets[[0, 4, 8]] = ignore_index
    for options in OPTIONS:
        inputs = {"logits": torch.randn(9, 80), "targets": targets}
        assert_accurate(
            lambda o=options, **kw: loss_of(ignore_index=ignore_index, **o, **kw),
            inputs,
            backend=backend,
        )


def test_ignored_rows_are_not_read(here: str) -> None:
    logits = torch.full((2, 80), float("nan"))
    logits[0] = 0
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([3, -100]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(80.0).log())
    assert torch.equal(logits.grad[1], torch.zeros(80))


@pytest.mark.parametrize("options", OPTIONS)
def test_all_ignored(here: str, options: dict) -> None:
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", [0.0] * 3)):
        for backend in (here, "reference"):
            logits = torch.randn(3, 80, requires_grad=True)
            with gpt2fast.use_backend(backend):
                loss = cross_entropy(logits, torch.full((3,), -100), reduction=reduction, **options)
            loss.sum().backward()
            assert torch.equal(logits.grad, torch.zeros(3, 80))
            torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 80), (0, 5, 80), (3, 0, 80)])
def test_empty_batch(here: str, shape: tuple[int, ...]) -> None:
    for reduction in REDUCTIONS:
        logits = torch.randn(shape, requires_grad=True)
        targets = torch.zeros(shape[:-1], dtype=torch.int64)
        loss = cross_entropy(logits, targets, reduction=reduction)
        assert loss.shape == (targets.shape if reduction == "none" else ())
        loss.sum().backward()
        assert logits.grad.shape == shape


def test_one_row_without_batch(backend: str) -> None:
    for reduction in REDUCTIONS:
        inputs = {"logits": torch.randn(80), "targets": torch.tensor(3)}
        assert_accurate(
            lambda r=reduction, **kw: loss_of(reduction=r, **kw), inputs, backend=backend
        )


def test_layouts(backend: str) -> None:
    targets = some_targets(10, 80).view(2, 5)
    packed = torch.randn(2, 5, 240)
    assert_accurate(
        lambda packed, targets: cross_entropy(packed[..., 80:160], targets),
        {"packed": packed, "targets": targets},
        backend=backend,
    )
    inputs = {"logits": torch.randn(80, 7).t(), "targets": some_targets(7, 80)}
    assert_accurate(loss_of, inputs, backend=backend)
    sequence = torch.randint(0, 80, (2, 6))
    inputs = {"logits": torch.randn(2, 5, 80), "targets": sequence[:, 1:]}
    assert_accurate(loss_of, inputs, backend=backend)
    with gpt2fast.use_backend(backend):
        shared = torch.randn(1, 80, device=device_of(backend), requires_grad=True)
        some = targets.view(-1)[:7].clamp(0).to(shared.device)
        cross_entropy(shared.expand(7, 80), some).backward()
    assert shared.grad.isfinite().all()


def test_int32_targets(here: str) -> None:
    logits, targets = torch.randn(9, 80), some_targets(9, 80)
    assert torch.equal(cross_entropy(logits, targets), cross_entropy(logits, targets.int()))


def test_upstream_gradients_of_any_stride(backend: str) -> None:
    targets = some_targets(10, 80).view(2, 5)
    inputs = {"logits": torch.randn(2, 5, 80), "targets": targets}
    assert_accurate(lambda **kw: loss_of(reduction="none", **kw).sum(), inputs, backend=backend)
    assert_accurate(lambda **kw: loss_of(reduction="none", **kw).t(), inputs, backend=backend)
    assert_accurate(lambda **kw: loss_of(reduction="none", **kw).sum(0), inputs, backend=backend)
    assert_accurate(lambda **kw: loss_of(reduction="none", **kw)[:, ::2], inputs, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_is_fp32(here: str, dtype: torch.dtype) -> None:
    logits, targets = torch.randn(9, 80).to(dtype), some_targets(9, 80)
    for backend in (here, "reference"):
        with gpt2fast.use_backend(backend):
            assert cross_entropy(logits, targets).dtype == torch.float32
            with torch.autocast(logits.device.type, torch.bfloat16):
                assert cross_entropy(logits, targets).dtype == torch.float32


def test_row_offsets_beyond_32_bits(backend: str) -> None:
    """Two rows 2^31 + 64 elements apart in a sparse mapping, of which only their pages exist."""
    stride, classes = 2**31 + 64, 80
    space = torch.frombuffer(mmap.mmap(-1, 4 * (stride + classes)), dtype=torch.float32)
    logits = space.as_strided((2, classes), (stride, 1))
    values, targets = torch.randn(2, classes), torch.tensor([3, 79])
    logits.copy_(values)
    expected = values.clone().requires_grad_()
    with gpt2fast.use_backend(backend):
        loss = cross_entropy(expected, targets, reduction="none")
    loss.sum().backward()
    measured, statistics = autograd.cross_entropy_forward(
        logits, targets, -100, 0.0, 0.0, "none", classes, backend
    )
    assert torch.equal(measured, loss)
    autograd.cross_entropy_backward_inplace(
        torch.ones(2), logits, targets, statistics, -100, 0.0, 0.0, "none", classes, backend
    )
    assert torch.equal(logits, expected.grad)


# ---- the gradient in the logits' place ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_inplace_backward(here: str, options: dict, dtype: torch.dtype) -> None:
    logits, targets = torch.randn(2, 9, 84).to(dtype), some_targets(18, 80).view(2, 9)
    for view in (lambda x: x, lambda x: x[..., :80]):
        results = []
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            made = leaf * 1
            kw = {"vocab_size": 80, "inplace_backward": inplace, **options}
            loss = cross_entropy(view(made), targets, **kw)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_inplace_backward_uses_the_storage(here: str) -> None:
    seen = []
    logits = torch.randn(9, 80, requires_grad=True) * 1
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    cross_entropy(logits, some_targets(9, 80), inplace_backward=True).backward()
    assert seen == [logits.data_ptr()]


def test_inplace_backward_runs_once(here: str) -> None:
    leaf, targets = torch.randn(9, 80, requires_grad=True), some_targets(9, 80)
    loss = cross_entropy(leaf * 1, targets, inplace_backward=True)
    loss.backward(retain_graph=True)
    before = leaf.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(leaf.grad, before)


def test_inplace_backward_is_seen_by_other_ops(here: str) -> None:
    leaf, targets = torch.randn(9, 80, requires_grad=True), some_targets(9, 80)
    logits = leaf.tanh()  # saves its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(logits, targets, inplace_backward=True).backward()


def test_inplace_backward_refuses_what_it_cannot_do() -> None:
    targets = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="got a leaf"):
        cross_entropy(torch.randn(4, 8, requires_grad=True), targets, inplace_backward=True)
    for bad in (
        (torch.randn(1, 8, requires_grad=True) * 1).expand(4, 8),
        (torch.randn(8, 4, requires_grad=True) * 1).t(),
    ):
        with pytest.raises(ValueError, match="rows lie apart at one stride"):
            cross_entropy(bad, targets, inplace_backward=True)
    assert cross_entropy(torch.randn(4, 8), targets, inplace_backward=True).isfinite()


# ---- PyTorch's machinery ----


def test_deterministic(here: str) -> None:
    logits, targets = torch.randn(33, 5000), some_targets(33, 5000)

    def run() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, targets, label_smoothing=0.1)
        return [loss.detach().view(1), *torch.autograd.grad(loss, [leaf])]

    assert_deterministic(run)


def test_retained_graph_runs_twice(here: str) -> None:
    leaf, targets = torch.randn(9, 80, requires_grad=True), some_targets(9, 80)
    loss = cross_entropy(leaf, targets)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles(backend: str, reduction: str, inplace: bool) -> None:
    targets = some_targets(6, 70).to(device_of(backend))

    def head(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(
            x @ weight, targets, vocab_size=70, reduction=reduction, inplace_backward=inplace
        )

    assert_compiles(head, {"x": torch.randn(6, 5), "weight": torch.randn(5, 80)}, backend)


def test_opcheck(here: str) -> None:
    logits, targets = torch.randn(2, 3, 80), some_targets(6, 70).view(2, 3)
    for reduction in REDUCTIONS:
        options = (-100, 0.1, 1e-3, reduction, 70, here)
        torch.library.opcheck(autograd.cross_entropy_forward, (logits, targets, *options))
        loss, statistics = autograd.cross_entropy_forward(logits, targets, *options)
        arguments = (torch.ones_like(loss), logits, targets, statistics, *options)
        torch.library.opcheck(autograd.cross_entropy_backward, arguments)
        torch.library.opcheck(autograd.cross_entropy_backward_inplace, arguments)


def test_second_derivative_is_refused() -> None:
    logits = torch.randn(3, 80, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 2, 3]))
    (grad,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fp64_goes_to_the_reference() -> None:
    assert cross_entropy(torch.randn(3, 8).double(), torch.tensor([1, 2, 3])).dtype == torch.float64


def test_reference_and_kernel_differ_in_bits(here: str) -> None:
    """Guards the tests themselves: `use_backend` really switches the code that runs."""
    logits, targets = torch.randn(64, 5000), some_targets(64, 5000)
    results = []
    for backend in (here, "reference"):
        leaf = logits.clone().requires_grad_()
        with gpt2fast.use_backend(backend):
            cross_entropy(leaf, targets).backward()
        results.append(leaf.grad)
    assert not torch.equal(*results)


BAD_TARGETS = (-1, 70, 75, 80, 2**40, -(2**40))


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_targets_outside_the_vocabulary(isa: str, target: int) -> None:
    targets = torch.zeros(2, 3, dtype=torch.int64)
    targets[1, 1] = target
    with pytest.raises(IndexError, match=f"targets has {target} at row 4.*70 classes 0 to 69"):
        cross_entropy(torch.zeros(2, 3, 80), targets, vocab_size=70)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_targets_outside_the_vocabulary_give_nan_on_a_gpu(inplace: bool, options: dict) -> None:
    if not backends.status("triton").available:
        pytest.skip(backends.status("triton").detail)
    with gpt2fast.use_backend("triton"), device_of("triton"):
        for target in BAD_TARGETS:
            leaf = torch.randn(3, 80, requires_grad=True)
            targets = torch.tensor([3, target, 69])
            kw = {"vocab_size": 70, "inplace_backward": inplace, **options}
            losses = cross_entropy(leaf * 1, targets, reduction="none", **kw)
            losses.sum().backward()
            assert losses.isnan().tolist() == [False, True, False]
            assert leaf.grad[[0, 2]].isfinite().all()
            assert leaf.grad[1, :70].isnan().all()
            assert (leaf.grad[:, 70:] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], torch.zeros(1)), {}, TypeError, "logits must be a torch.Tensor, got list"),
        ((torch.zeros(3, 4).long(), None), {}, TypeError, "logits must be floating point"),
        ((torch.tensor(1.0), None), {}, ValueError, "logits must have a last dimension"),
        ((torch.zeros(3, 0), None), {}, ValueError, "logits must have a last dimension"),
        ((torch.zeros(3, 4), [1, 2, 3]), {}, TypeError, "targets must be a torch.Tensor, got list"),
        ((torch.zeros(3, 4), torch.zeros(3)), {}, TypeError, "targets must be int64 or int32"),
        ((torch.zeros(3, 4), torch.zeros(4).long()), {}, ValueError, "targets must have shape"),
        (
            (torch.zeros(3, 4), torch.zeros(3, device="meta").long()),
            {},
            ValueError,
            "targets is on meta but logits is on cpu",
        ),
        (None, {"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
        (None, {"z_loss": -1.0}, ValueError, "z_loss must not be negative"),
        (None, {"reduction": "avg"}, ValueError, "reduction must be one of none, mean, sum"),
        (None, {"vocab_size": 5}, ValueError, "vocab_size must be between 1 and .* 4, got 5"),
        (None, {"vocab_size": 0}, ValueError, "vocab_size must be between 1"),
    ],
)
def test_wrong_arguments(
    arguments: tuple | None, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(*(arguments or (torch.zeros(3, 4), torch.zeros(3).long())), **options)


def test_targets_may_be_strided_views(here: str) -> None:
    """Columns of a token table and expanded scalars: the kernel must see the values, not memory."""
    tokens = torch.randint(11, (6, 9))
    logits = torch.randn(6, 11)
    for targets in (tokens[:, -1], tokens[:, 3], torch.tensor(3).expand(6)):
        expected = torch.nn.functional.cross_entropy(logits, targets.clone())
        torch.testing.assert_close(cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("hidden", ["all", "one"])
def test_nan_before_the_first_finite_block_stays(here: str, hidden: str) -> None:
    logits = torch.randn(1, 9000)
    logits[:, :4096] = float("nan") if hidden == "all" else -float("inf")
    logits[0, 5] = float("nan")
    assert cross_entropy(logits, torch.tensor([8000])).isnan()


def test_inplace_backward_refuses_a_view_of_a_parameter() -> None:
    weight = torch.randn(6, 11, requires_grad=True)
    with pytest.raises(ValueError, match="a view of one"):
        cross_entropy(weight.view(6, 11), torch.zeros(6, dtype=torch.int64), inplace_backward=True)
