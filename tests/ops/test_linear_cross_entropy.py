"""linear_cross_entropy: the fp64 rule, chunks, padding, early gradients, errors, torch.compile."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast.functional import cross_entropy, linear_cross_entropy
from gpt2fast.ops.linear_cross_entropy import autograd, cpu
from tests.ops.numerics import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_deterministic,
    device_of,
)

VOCAB, PADDED = 50257, 50304
REDUCTIONS = ("none", "mean", "sum")


@pytest.fixture
def here(backend: str) -> Iterator[str]:
    """Everything in the test is on a backend and its device."""
    with gpt2fast.use_backend(backend), device_of(backend):
        yield backend


def some_inputs(rows: int, width: int, vocab: int, classes: int | None = None) -> dict[str, Tensor]:
    targets = torch.randint(0, classes or vocab, (rows,))
    if rows > 2:
        targets[1] = -100
    return {
        "x": torch.randn(rows, width),
        "weight": torch.randn(vocab, width) * width**-0.5,
        "targets": targets,
    }


def bytes_for(rows: int, classes: int) -> int:
    return 4 * rows * classes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [1, 3, 41])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_linear_cross_entropy(
    backend: str, options: dict, rows: int, reduction: str, dtype: torch.dtype
) -> None:
    few = 1 if rows < 41 else 6
    for width, vocab, classes, chunk in (
        (80, 997, 997, 16),
        (5, 304, 257, few),
        (48, 304, 257, 999),
    ):
        assert_accurate(
            lambda o=(classes, chunk), **kw: linear_cross_entropy(
                vocab_size=o[0],
                chunk_bytes=bytes_for(o[1], o[0]),
                reduction=reduction,
                return_logprobs=True,
                **kw,
                **options,
            ),
            some_inputs(rows, width, vocab, classes),
            dtype=dtype,
            backend=backend,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt2_head(backend: str, dtype: torch.dtype) -> None:
    assert_accurate(
        lambda **kw: linear_cross_entropy(
            vocab_size=VOCAB, chunk_bytes=bytes_for(2, VOCAB), label_smoothing=0.1, **kw
        ),
        some_inputs(5, 64, PADDED, VOCAB),
        dtype=dtype,
        backend=backend,
    )


def test_half_weights_are_widened_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SLICE_BYTES", 4 * 48 * 100)
    for dtype in (torch.bfloat16, torch.float16):
        for reduction in ("mean", "none"):
            assert_accurate(
                lambda r=reduction, **kw: linear_cross_entropy(
                    reduction=r, chunk_bytes=bytes_for(7, 997), **kw
                ),
                some_inputs(23, 48, 997),
                dtype=dtype,
            )


@pytest.mark.parametrize("wanted", [["x"], ["weight"]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_one_input_requires_gradients(backend: str, reduction: str, wanted: list[str]) -> None:
    assert_accurate(
        lambda **kw: linear_cross_entropy(reduction=reduction, chunk_bytes=4 * 304 * 4, **kw),
        some_inputs(9, 80, 304),
        wanted=wanted,
        backend=backend,
    )


def test_only_needed_gradients_are_computed(here: str) -> None:
    i = some_inputs(9, 80, 304)
    for need in ((False, False), (True, False), (False, True)):
        _, _, _, dx, dweight = autograd.linear_cross_entropy_forward(
            i["x"], i["weight"], i["targets"], -100, 0.0, 0.0, "mean", 304, 999, *need, here
        )
        assert (dx is not None, dweight is not None) == need


def test_no_gradients_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu, "_add_dweight")
    monkeypatch.delattr(cpu._Head, "dx")
    i = some_inputs(9, 80, 304)
    plain = linear_cross_entropy(**i)
    assert not plain.requires_grad
    i["weight"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(**i), plain)


def test_agrees_with_the_unfused_loss(here: str) -> None:
    i = some_inputs(41, 80, 997)
    logits = i["x"] @ i["weight"].t()
    for reduction in REDUCTIONS:
        kw = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-3, "vocab_size": 900}
        i["targets"].clamp_(max=899)
        torch.testing.assert_close(
            linear_cross_entropy(**i, **kw), cross_entropy(logits, i["targets"], **kw)
        )


def test_logprobs(here: str) -> None:
    i = some_inputs(41, 80, 997)
    i["x"].requires_grad_()
    for backend in (here, "reference"):
        with gpt2fast.use_backend(backend):
            _, logprobs = linear_cross_entropy(
                **i, return_logprobs=True, z_loss=0.1, label_smoothing=0.5
            )
        logits = i["x"].detach() @ i["weight"].t()
        expected = -torch.nn.functional.cross_entropy(logits, i["targets"], reduction="none")
        torch.testing.assert_close(logprobs, expected)
        assert logprobs[1] == 0
        assert not logprobs.requires_grad


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pad_rows_of_the_weight_are_not_read(here: str, reduction: str, garbage: float) -> None:
    i = some_inputs(9, 80, 304, 257)
    i["weight"][257:] = garbage
    leaves = [i["x"].requires_grad_(), i["weight"].requires_grad_()]
    for backend in (here, "reference"):
        with gpt2fast.use_backend(backend):
            loss = linear_cross_entropy(**i, vocab_size=257, reduction=reduction).sum()
        dx, dweight = torch.autograd.grad(loss, leaves)
        assert loss.isfinite()
        assert dx.isfinite().all()
        assert dweight[:257].isfinite().all()
        assert torch.equal(dweight[257:], torch.zeros(47, 80))


@pytest.mark.parametrize("case", ["huge", "sure and right", "sure and wrong"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hard_logits(backend: str, reduction: str, case: str) -> None:
    rows = 32 if case == "huge" else 128  # so many that luck in rounding p - 1 does not decide
    i = some_inputs(rows, 64, 400)
    if case == "huge":
        i["weight"] *= 2000
    else:  # x of row r points to class r's weight, so that its logit stands out
        i["weight"] = 4 * torch.randn(400, 64)
        i["x"] = i["weight"][:rows] / 40
        i["targets"] = torch.arange(rows) + (case == "sure and wrong")
    assert_accurate(
        lambda **kw: linear_cross_entropy(
            reduction=reduction, chunk_bytes=bytes_for(rows // 3, 400), return_logprobs=True, **kw
        ),
        i,
        backend=backend,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_retained_graph_runs_twice(here: str, reduction: str) -> None:
    i = some_inputs(9, 80, 304)
    leaves = [i["x"].requires_grad_(), i["weight"].requires_grad_()]
    loss = linear_cross_entropy(**i, reduction=reduction, chunk_bytes=bytes_for(4, 304))
    upstream = torch.randn(loss.shape)
    first, second, third = (
        torch.autograd.grad(loss, leaves, u, retain_graph=True)
        for u in (upstream, upstream, 3 * upstream)
    )
    torch.testing.assert_close(first, second)
    torch.testing.assert_close([3 * g for g in first], list(third))
    # Gradients that were handed out are not written to again.
    torch.testing.assert_close(first, torch.autograd.grad(loss, leaves, upstream))


def test_retained_graph_accumulates(here: str) -> None:
    i = some_inputs(9, 80, 304)
    leaves = [i["x"].requires_grad_(), i["weight"].requires_grad_()]
    loss = linear_cross_entropy(**i)
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    torch.testing.assert_close([2 * g for g in once], [leaf.grad for leaf in leaves])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 0.125, 65536.0, float("nan")])
def test_upstream_gradient_scales(here: str, reduction: str, scale: float) -> None:
    i = some_inputs(9, 80, 304)
    leaves = [i["x"].requires_grad_(), i["weight"].requires_grad_()]
    grads = [
        torch.autograd.grad(linear_cross_entropy(**i, reduction=reduction) * s, leaves)
        for s in (1.0, scale)
    ]
    torch.testing.assert_close(
        [scale * g for g in grads[0]], list(grads[1]), rtol=0, atol=0, equal_nan=True
    )


def test_loss_scale_saves_small_fp16_gradients(here: str) -> None:
    """Unscaled gradients below fp16's range: the loss scale must act before they are rounded."""
    i = some_inputs(9, 80, 304)
    results = []
    for dtype in (torch.float16, torch.float32):
        x, weight = (i[n].half().to(dtype).requires_grad_() for n in ("x", "weight"))
        loss = linear_cross_entropy(x, weight, i["targets"]) * 1e-6
        results.append(torch.autograd.grad(loss * 2.0**17, [x, weight]))
    for half, single in zip(*results, strict=True):
        torch.testing.assert_close(half.float(), single, rtol=2e-3, atol=1e-6)


def test_weights_may_change_between_forward_and_backward(here: str) -> None:
    """Gradients of a reduced loss exist since forward; only a second backward needs the weights."""
    i = some_inputs(9, 80, 304)
    weight = i["weight"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(linear_cross_entropy(i["x"], weight, i["targets"]), [weight])
    loss = linear_cross_entropy(i["x"], weight, i["targets"])
    with torch.no_grad():
        weight.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weight(backend: str) -> None:
    """The weight is the embedding as well, and its gradients add up."""

    def tied(weight: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(torch.nn.functional.embedding(tokens, weight), weight, targets)

    tokens = torch.randint(0, 304, (3, 7))
    inputs = {"weight": torch.randn(304, 16), "tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    assert_accurate(tied, inputs, backend=backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradients_of_any_stride(backend: str, reduction: str) -> None:
    i = some_inputs(10, 80, 304)
    i["x"], i["targets"] = i["x"].view(2, 5, 80), i["targets"].view(2, 5)
    kw = {"reduction": reduction, "chunk_bytes": bytes_for(4, 304)}
    assert_accurate(lambda **i: linear_cross_entropy(**i, **kw).sum(), i, backend=backend)
    if reduction == "none":
        assert_accurate(lambda **i: linear_cross_entropy(**i, **kw).t(), i, backend=backend)
        assert_accurate(lambda **i: linear_cross_entropy(**i, **kw).sum(0), i, backend=backend)


def test_layouts(backend: str) -> None:
    i = some_inputs(10, 80, 304)
    assert_accurate(
        linear_cross_entropy,
        {
            "x": torch.randn(80, 10).t(),
            "weight": torch.randn(80, 304).t(),
            "targets": i["targets"].int(),
        },
        backend=backend,
    )
    packed = torch.randn(2, 5, 240)
    assert_accurate(
        lambda packed, weight, targets: linear_cross_entropy(
            packed[:, :4, 80:160], weight, targets[:, 1:]
        ),
        {"packed": packed, "weight": i["weight"], "targets": i["targets"].view(2, 5)},
        backend=backend,
    )
    one = {"x": torch.randn(80), "weight": i["weight"], "targets": torch.tensor(7)}
    for reduction in REDUCTIONS:
        assert_accurate(
            lambda r=reduction, **kw: linear_cross_entropy(reduction=r, **kw), one, backend=backend
        )


def test_all_ignored(here: str) -> None:
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", [0.0] * 9)):
        i = some_inputs(9, 80, 304)
        i["targets"].fill_(-100)
        leaves = [i["x"].requires_grad_(), i["weight"].requires_grad_()]
        with gpt2fast.use_backend(here):
            loss = linear_cross_entropy(**i, reduction=reduction, z_loss=0.1)
        for grad in torch.autograd.grad(loss.sum(), leaves):
            assert (grad == 0).all()
        torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(here: str, reduction: str, dtype: torch.dtype) -> None:
    x = torch.randn(0, 5, 80, dtype=dtype, requires_grad=True)
    weight = torch.randn(304, 80, dtype=dtype, requires_grad=True)
    targets = torch.zeros(0, 5, dtype=torch.int64)
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    loss.sum().backward()
    assert x.grad.shape == x.shape
    if reduction != "mean":
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_at_most_chunk_bytes_of_logits_exist() -> None:
    for rows, classes, limit in ((100, 50257, 64 << 20), (1025, 997, 10**6), (3, 997, 1)):
        chunks = list(cpu._chunks(rows, classes, limit))
        sizes = [c.stop - c.start for c in chunks]
        assert sum(sizes) == rows
        assert [c.start for c in chunks[1:]] == [c.stop for c in chunks[:-1]]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == 1 or 4 * max(sizes) * classes <= limit


def test_deterministic(here: str) -> None:
    i = some_inputs(41, 80, 997)

    def run() -> list[Tensor]:
        leaves = [i[n].clone().requires_grad_() for n in ("x", "weight")]
        loss = linear_cross_entropy(*leaves, i["targets"], chunk_bytes=bytes_for(16, 997))
        return [loss.detach().view(1), *torch.autograd.grad(loss, leaves)]

    assert_deterministic(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles(backend: str, reduction: str, dtype: torch.dtype) -> None:
    i = some_inputs(6, 16, 80, 70)
    i["x"], i["weight"] = i["x"].to(dtype), i["weight"].to(dtype)
    assert_compiles(
        lambda **kw: linear_cross_entropy(
            vocab_size=70, reduction=reduction, chunk_bytes=bytes_for(4, 70), **kw
        ),
        i,
        backend,
    )


def test_compiled_graph_returns_logprobs_and_runs_twice(here: str) -> None:
    i = some_inputs(6, 16, 80)
    leaves = [i["x"].requires_grad_(), i["weight"].requires_grad_()]

    def run() -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(**i, return_logprobs=True)

    torch._dynamo.reset()
    loss, logprobs = torch.compile(run, fullgraph=True, backend="aot_eager")()
    expected, expected_logprobs = run()
    torch.testing.assert_close(logprobs, expected_logprobs)
    grads = torch.autograd.grad(expected, leaves)
    for factor in (1, 3):
        again = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        torch.testing.assert_close([factor * g for g in grads], list(again))


def test_opcheck(here: str) -> None:
    i = some_inputs(6, 16, 80, 70)
    tensors = (i["x"].view(2, 3, 16), i["weight"], i["targets"].view(2, 3))
    for reduction in REDUCTIONS:
        options = (-100, 0.1, 1e-3, reduction, 70, bytes_for(4, 70))
        needs = ((True, True), (True, False), (False, True), (False, False))
        for need in needs if reduction == "mean" else needs[:1]:
            torch.library.opcheck(
                autograd.linear_cross_entropy_forward, (*tensors, *options, *need, here)
            )
    loss, _, statistics, dx, _ = autograd.linear_cross_entropy_forward(
        *tensors, *options, True, False, here
    )
    for need in ((True, True), (True, False)):
        arguments = (torch.ones_like(loss), *tensors, statistics, *options, *need, here)
        torch.library.opcheck(autograd.linear_cross_entropy_backward, arguments)
    scaled = (dx, torch.tensor(2.0), here)
    torch.library.opcheck(autograd.linear_cross_entropy_scale, scaled)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(here: str, reduction: str) -> None:
    i = some_inputs(9, 80, 304)
    leaves = [i["x"].requires_grad_(), i["weight"].requires_grad_()]
    with torch.autocast(i["x"].device.type, torch.bfloat16):
        loss = linear_cross_entropy(**i, reduction=reduction)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = linear_cross_entropy(*half, i["targets"], reduction=reduction)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for grad, other in zip(
        torch.autograd.grad(loss.sum(), leaves),
        torch.autograd.grad(expected.sum(), half),
        strict=True,
    ):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, other.float())


def test_second_derivative_is_refused() -> None:
    i = some_inputs(3, 8, 20)
    i["x"].requires_grad_()
    loss = linear_cross_entropy(**i).square()
    (grad,) = torch.autograd.grad(loss, i["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_targets_outside_the_vocabulary() -> None:
    i = some_inputs(9, 80, 304, 257)
    i["targets"][7] = 257
    with pytest.raises(IndexError, match=r"targets has 257 at row 7.*257 classes 0 to 256"):
        linear_cross_entropy(**i, vocab_size=257)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight must have shape \(vocabulary, 4\)"),
        ({"weight": torch.zeros(4)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(5, 4).long()}, TypeError, "weight must be floating point"),
        ({"weight": torch.zeros(5, 4).double()}, TypeError, "weight is torch.float64 but x is"),
        ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "weight is on meta"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be int64 or int32"),
        ({"targets": torch.zeros(2).long()}, ValueError, "targets must have shape"),
        ({"vocab_size": 6}, ValueError, "vocab_size must be between 1 and .* 5, got 6"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(5, 4)}
    arguments["targets"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **changed})


def test_targets_may_be_strided_views(here: str) -> None:
    tokens, x, weight = torch.randint(11, (6, 9)), torch.randn(6, 8), torch.randn(11, 8)
    for targets in (tokens[:, -1], torch.tensor(3).expand(6)):
        for reduction in ("mean", "none"):
            expected = torch.nn.functional.cross_entropy(
                x @ weight.t(), targets.clone(), reduction=reduction
            )
            measured = linear_cross_entropy(x, weight, targets, reduction=reduction)
            torch.testing.assert_close(measured, expected)
