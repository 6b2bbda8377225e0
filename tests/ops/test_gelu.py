"""gelu with bias: the fp64 rule, hard inputs, layouts, errors, torch.compile."""

import pytest
import torch

import gpt2fast
from gpt2fast.backends import load
from gpt2fast.functional import gelu
from gpt2fast.ops.gelu import autograd
from tests.ops.numerics import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_deterministic,
    device_of,
)

ROWS = (1, 3, 1025)
WIDTHS = (3072, 1600, 80, 5, 1)


def inputs(*shape: int) -> dict[str, torch.Tensor]:
    return {"x": 2 * torch.randn(shape), "bias": torch.randn(shape[-1])}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_gelu(backend: str, rows: int, width: int, dtype: torch.dtype) -> None:
    assert_accurate(gelu, inputs(rows, width), dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (4097,), (2, 33, 80), (3, 5001)])
def test_without_bias(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_accurate(gelu, {"x": 2 * torch.randn(shape)}, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("span", [0.01, 1.0, 4.0, 12.0, 1e4])
def test_every_part_of_the_curve(backend: str, span: float, dtype: torch.dtype) -> None:
    for top in (span, 0):
        curve = {"x": torch.linspace(-span, top, 4001)[None]}
        assert_accurate(gelu, curve, dtype=dtype, backend=backend)


def test_each_element_is_right(backend: str) -> None:
    """The largest error over many elements hides small ones: the left tail is checked by itself."""
    x = torch.linspace(-9, 9, 20001, device=device_of(backend)).requires_grad_()
    with gpt2fast.use_backend(backend):
        y = gelu(x)
    y.sum().backward()
    z = x.detach().double().requires_grad_()
    q = 2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    true = z * torch.sigmoid(q)
    true.sum().backward()
    # The exponent q carries its own rounding: |q| eps of relative error, beside a few roundings.
    relative = (4 + 2 * q.detach().abs()) * torch.finfo(torch.float32).eps
    assert ((y.double() - true).abs() <= relative * true.abs() + 1e-38).all()
    # The slope is a sum of two terms, so its error is measured against the larger.
    s = torch.sigmoid(q.detach())
    terms = s + (z.grad - s).abs()
    assert ((x.grad.double() - z.grad).abs() <= relative * terms).all()


def test_extreme_values(backend: str) -> None:
    with device_of(backend), gpt2fast.use_backend(backend):
        values = [0.0, -0.0, 1e20, -1e20, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
        x = torch.tensor(values * 2, requires_grad=True)
        y = gelu(x)
        y.backward(torch.ones(18))
    expected = torch.tensor([0.0, 0, 1e20, 0, 3e38, 0, torch.inf, 0, torch.nan] * 2)
    slope = torch.tensor([0.5, 0.5, 1, 0, 1, 0, 1, 0, torch.nan] * 2)
    torch.testing.assert_close(y.detach().cpu(), expected, equal_nan=True, rtol=0, atol=1e-30)
    torch.testing.assert_close(x.grad.cpu(), slope, equal_nan=True, rtol=0, atol=1e-30)


@pytest.mark.parametrize("wanted", [["x"], ["bias"]])
def test_only_some_inputs_require_gradients(backend: str, wanted: list[str]) -> None:
    assert_accurate(gelu, inputs(9, 80), wanted=wanted, backend=backend)


def test_strided_input(backend: str) -> None:
    packed, bias = torch.randn(2, 5, 3 * 80), torch.randn(80)
    assert_accurate(lambda packed: gelu(packed[..., 80:160]), {"packed": packed}, backend=backend)
    assert_accurate(
        lambda packed, bias: gelu(packed[..., 80:160], bias),
        {"packed": packed, "bias": bias},
        backend=backend,
    )
    assert_accurate(gelu, {"x": torch.randn(80, 7).t(), "bias": bias}, backend=backend)
    assert_accurate(
        lambda x, bias: gelu(x.expand(6, 80), bias),
        {"x": torch.randn(80), "bias": bias},
        backend=backend,
    )


def test_zero_stride_upstream_gradient(backend: str) -> None:
    assert_accurate(lambda x, bias: gelu(x, bias).sum(), inputs(9, 80), backend=backend)
    assert_accurate(lambda x: gelu(x).sum(0), {"x": torch.randn(9, 80)}, backend=backend)


def test_empty_batch(backend: str) -> None:
    device = device_of(backend)
    x = torch.randn(0, 5, 80, requires_grad=True, device=device)
    bias = torch.ones(80, requires_grad=True, device=device)
    with gpt2fast.use_backend(backend):
        gelu(x, bias).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fp32_bias_beside_half_input(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    x = torch.randn(9, 80, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(80, device=device, requires_grad=True)
    with gpt2fast.use_backend(backend):
        y = gelu(x, bias)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert bias.grad.dtype == torch.float32
    z = (x.detach().float() + bias.detach()).requires_grad_()
    expected = torch.nn.functional.gelu(z, approximate="tanh")
    expected.sum().backward()
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(bias.grad, z.grad.sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_beside_the_gradient_in_place(backend: str, dtype: torch.dtype) -> None:
    """What gelu_mlp uses: dx over dy and the activation, with the same bits as the plain calls."""
    with device_of(backend):
        x, dy = torch.randn(70, 83).to(dtype), torch.randn(70, 83).to(dtype)
        bias = torch.randn(83)
    y = autograd.gelu_forward(x, bias, backend)
    dx, dbias = autograd.gelu_backward(dy, x, bias, True, True, backend)
    activation = torch.empty_like(x)
    for need_bias in (True, False):
        both = dy.clone()
        into = load("gelu", backend).backward_into
        sums = into(both, x, bias, both, activation, need_bias)
        assert torch.equal(activation, y)
        assert torch.equal(both, dx)
        assert sums is None if not need_bias else torch.equal(sums, dbias)


def test_deterministic(backend: str) -> None:
    with device_of(backend):
        x, bias, dy = torch.randn(1025, 80), torch.randn(80), torch.randn(1025, 80)

    def run() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, bias)]
        with gpt2fast.use_backend(backend):
            y = gelu(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_deterministic(run)


def test_compiles(backend: str) -> None:
    assert_compiles(gelu, inputs(6, 80), backend)
    assert_compiles(gelu, {"x": torch.randn(6, 80)}, backend)


def test_opcheck(backend: str) -> None:
    with device_of(backend):
        x, bias = torch.randn(6, 80), torch.randn(80)
    torch.library.opcheck(autograd.gelu_forward, (x, bias, backend))
    torch.library.opcheck(autograd.gelu_forward, (x, None, backend))
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(autograd.gelu_backward, (x, x.clone(), bias, *need, backend))


def test_autocast_keeps_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert gelu(torch.randn(3, 80), torch.randn(80)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "x must be a torch.Tensor, got list"),
        ((torch.zeros(3, 4, dtype=torch.int64),), TypeError, "x must be floating point"),
        ((torch.tensor(1.0),), ValueError, "x must have a last dimension"),
        ((torch.zeros(3, 4), torch.zeros(5)), ValueError, "bias must have shape"),
        (
            (torch.zeros(3, 4), torch.zeros(4, device="meta")),
            ValueError,
            "bias is on meta but x is on cpu",
        ),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gelu(*arguments)


def test_reference_and_kernel_differ_in_bits(backend: str) -> None:
    """Guards the tests themselves: `use_backend` really switches the code that runs."""
    x = torch.randn(64, 768, device=device_of(backend))
    with gpt2fast.use_backend("reference"):
        expected = gelu(x)
    with gpt2fast.use_backend(backend):
        assert not torch.equal(gelu(x), expected)
