"""layer_norm and add_layer_norm: the fp64 rule, layouts, errors, torch.compile."""

import pytest
import torch

import gpt2fast
from gpt2fast.functional import add_layer_norm, layer_norm
from gpt2fast.ops.layer_norm import autograd
from tests.ops.numerics import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_deterministic,
    device_of,
)

ROWS = (1, 3, 1025)
WIDTHS = (768, 1600, 80, 5, 1)


def parameters(width: int) -> dict[str, torch.Tensor]:
    return {"weight": 1 + 0.1 * torch.randn(width), "bias": 0.1 * torch.randn(width)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_layer_norm(backend: str, rows: int, width: int, dtype: torch.dtype) -> None:
    inputs = {"x": torch.randn(rows, width), **parameters(width)}
    assert_accurate(layer_norm, inputs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_layer_norm(backend: str, width: int, dtype: torch.dtype) -> None:
    inputs = {"x": torch.randn(2, 33, width), "residual": torch.randn(2, 33, width)}
    assert_accurate(add_layer_norm, {**inputs, **parameters(width)}, dtype=dtype, backend=backend)


def test_large_mean_small_variance(backend: str) -> None:
    inputs = {"x": 1000 + 0.1 * torch.randn(17, 768), **parameters(768)}
    assert_accurate(layer_norm, inputs, backend=backend)


def test_constant_rows(backend: str) -> None:
    assert_accurate(
        layer_norm, {"x": torch.full((4, 768), 3.0), **parameters(768)}, backend=backend
    )


@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["bias"], ["x", "bias"]])
def test_only_some_inputs_require_gradients(backend: str, wanted: list[str]) -> None:
    inputs = {"x": torch.randn(9, 80), **parameters(80)}
    assert_accurate(layer_norm, inputs, wanted=wanted, backend=backend)


def test_without_parameters(backend: str) -> None:
    assert_accurate(layer_norm, {"x": torch.randn(9, 80)}, backend=backend)


def test_row_strided_input_is_read_in_place(backend: str) -> None:
    packed = torch.randn(2, 5, 3 * 80)
    assert_accurate(
        lambda packed, **p: layer_norm(packed[..., 80:160], **p),
        {"packed": packed, **parameters(80)},
        backend=backend,
    )
    inputs = {"x": torch.randn(80, 7).t(), **parameters(80)}
    assert_accurate(layer_norm, inputs, backend=backend)


def test_zero_stride_upstream_gradient(backend: str) -> None:
    def summed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, weight, bias).sum()

    assert_accurate(summed, {"x": torch.randn(9, 80), **parameters(80)}, backend=backend)


def test_empty_batch(backend: str) -> None:
    device = device_of(backend)
    x = torch.randn(0, 5, 80, requires_grad=True, device=device)
    weight = torch.ones(80, requires_grad=True, device=device)
    with gpt2fast.use_backend(backend):
        layer_norm(x, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_fp32_parameters_beside_bf16_input(backend: str) -> None:
    device = device_of(backend)
    x = torch.randn(9, 80, dtype=torch.bfloat16, requires_grad=True, device=device)
    weight = torch.ones(80, requires_grad=True, device=device)
    with gpt2fast.use_backend(backend):
        y = layer_norm(x, weight, torch.zeros(80, device=device))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


def test_deterministic(backend: str) -> None:
    with device_of(backend):
        x, dy = torch.randn(1025, 768), torch.randn(1025, 768)
        weight, bias = torch.randn(768), torch.randn(768)

    def run() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with gpt2fast.use_backend(backend):
            y = layer_norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_deterministic(run)


def test_compiles(backend: str) -> None:
    inputs = {"x": torch.randn(6, 80), **parameters(80)}
    assert_compiles(layer_norm, inputs, backend)
    assert_compiles(add_layer_norm, {"residual": torch.randn(6, 80), **inputs}, backend)


def test_opcheck(backend: str) -> None:
    with device_of(backend):
        x, weight, bias = torch.randn(6, 80), torch.randn(80), torch.randn(80)
    torch.library.opcheck(autograd.layer_norm_forward, (x, weight, bias, 1e-5, backend))
    torch.library.opcheck(autograd.add_layer_norm_forward, (x, x, weight, None, 1e-5, backend))
    _, statistics = autograd.layer_norm_forward(x, weight, bias, 1e-5, backend)
    for need in ((True, True), (True, False), (False, True)):
        arguments = (x, None, x, weight, statistics, *need, backend)
        torch.library.opcheck(autograd.layer_norm_backward, arguments)


def test_autocast_keeps_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm(torch.randn(3, 80)).dtype == torch.float32


def test_second_derivative_is_refused() -> None:
    x = torch.randn(3, 80, requires_grad=True)
    (grad,) = torch.autograd.grad(layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "x must be a torch.Tensor, got list"),
        ((torch.zeros(3, 4, dtype=torch.int64),), TypeError, "x must be floating point"),
        ((torch.tensor(1.0),), ValueError, "x must have a last dimension"),
        ((torch.zeros(3, 4), torch.zeros(5)), ValueError, "weight must have shape"),
        ((torch.zeros(3, 4), None, torch.zeros(3)), ValueError, "bias must have shape"),
        (
            (torch.zeros(3, 4), torch.zeros(4, device="meta")),
            ValueError,
            "weight is on meta but x is on cpu",
        ),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm(*arguments)


def test_wrong_residual() -> None:
    with pytest.raises(ValueError, match="residual must have shape"):
        add_layer_norm(torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(TypeError, match="residual must be floating point"):
        add_layer_norm(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64))


def test_half_precision_branch_on_fp32_stream() -> None:
    x, branch = torch.randn(3, 80), torch.randn(3, 80, dtype=torch.bfloat16, requires_grad=True)
    total, y = add_layer_norm(x, branch)
    assert total.dtype == y.dtype == torch.float32
    assert torch.equal(total, x + branch)
    y.square().sum().backward()
    assert branch.grad.dtype == torch.bfloat16


def test_reference_and_kernel_differ_in_bits(backend: str) -> None:
    """Guards the tests themselves: `use_backend` really switches the code that runs."""
    x = torch.randn(64, 768, device=device_of(backend))
    with gpt2fast.use_backend("reference"):
        expected = layer_norm(x)
    with gpt2fast.use_backend(backend):
        assert not torch.equal(layer_norm(x), expected)


@pytest.mark.parametrize("value", [84637.9, 3.3e7, 0.0])
@pytest.mark.parametrize("width", [768, 16384, 50257])
def test_constant_rows_at_any_mean_give_the_bias(backend: str, value: float, width: int) -> None:
    with device_of(backend), gpt2fast.use_backend(backend):
        bias = torch.randn(width)
        y = layer_norm(torch.full((2, width), value), None, bias)
    assert torch.equal(y, bias.expand(2, width))


def test_wide_rows_with_a_large_mean(backend: str) -> None:
    x = (torch.rand(20, 1) * 3e5).expand(20, 16384) + torch.randn(20, 16384)
    assert_accurate(layer_norm, {"x": x}, backend=backend)


def test_the_same_tensor_twice(backend: str) -> None:
    def doubled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_layer_norm(x, x)

    inputs = {"x": torch.randn(5, 80)}
    assert_accurate(doubled, inputs, backend=backend)
    assert_compiles(doubled, inputs, backend)
