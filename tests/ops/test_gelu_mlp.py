"""gelu_mlp: the fp64 rule for values and every gradient, layouts, memory, errors, torch.compile."""

import pytest
import torch

import gpt2fast
from gpt2fast.functional import gelu_mlp
from gpt2fast.ops.gelu_mlp import autograd, cpu
from tests.ops.numerics import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_deterministic,
    compare,
)


def inputs(
    *shape: int, hidden: int | None = None, out: int | None = None, bias: bool = True
) -> dict[str, torch.Tensor | None]:
    width = shape[-1]
    hidden, out = hidden or 4 * width, out or width
    return {
        "x": torch.randn(shape),
        "fc_weight": torch.randn(hidden, width) / width**0.5,
        "fc_bias": torch.randn(hidden) if bias else None,
        "proj_weight": torch.randn(out, hidden) / hidden**0.5,
        "proj_bias": torch.randn(out) if bias else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [80, 5, 1])
@pytest.mark.parametrize("rows", [1, 3, 1025])
def test_gelu_mlp(isa: str, rows: int, width: int, dtype: torch.dtype) -> None:
    assert_accurate(gelu_mlp, inputs(rows, width), dtype=dtype)


def test_gpt2_width(isa: str) -> None:
    assert_accurate(gelu_mlp, inputs(2, 65, 768))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_hidden_and_output_size(isa: str, dtype: torch.dtype) -> None:
    assert_accurate(gelu_mlp, inputs(2, 3, 17, 24, hidden=97, out=33), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_biases(dtype: torch.dtype) -> None:
    assert_accurate(gelu_mlp, inputs(9, 80, bias=False), dtype=dtype)


@pytest.mark.parametrize("missing", ["fc_bias", "proj_bias"])
def test_without_one_bias(missing: str) -> None:
    assert_accurate(gelu_mlp, {**inputs(9, 80), missing: None})


NAMES = ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")


@pytest.mark.parametrize(
    "wanted", [*([name] for name in NAMES), ["fc_bias", "proj_weight"], ["x", "proj_bias"]]
)
def test_only_some_inputs_require_gradients(wanted: list[str]) -> None:
    assert_accurate(gelu_mlp, inputs(9, 80), wanted=wanted)


def test_large_preactivations() -> None:
    given = inputs(9, 80)
    assert_accurate(gelu_mlp, {**given, "x": 1e4 * given["x"]})


def test_strided_arguments() -> None:
    given = inputs(6, 80)
    transposed = {
        name: given[name].t().contiguous().t() for name in ("x", "fc_weight", "proj_weight")
    }
    assert not transposed["x"].is_contiguous()
    assert_accurate(gelu_mlp, {**given, **transposed})
    rest = {name: value for name, value in given.items() if name != "x"}
    assert_accurate(
        lambda packed, **rest: gelu_mlp(packed[:, 80:160], **rest),
        {"packed": torch.randn(6, 240), **rest},
    )


def test_zero_stride_upstream_gradient() -> None:
    assert_accurate(lambda **given: gelu_mlp(**given).sum(), inputs(9, 80))
    assert_accurate(lambda **given: gelu_mlp(**given).sum((0, 1)), inputs(2, 9, 80))


def test_empty_batch() -> None:
    leaves = {name: value.requires_grad_() for name, value in inputs(0, 5, 80).items()}
    y = gelu_mlp(**leaves)
    assert y.shape == (0, 5, 80)
    y.sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@pytest.mark.parametrize("rows", [1, 1024, 1025, 2500])
def test_no_grad_gives_the_same_bits(rows: int) -> None:
    """The path that keeps nothing for a backward runs the GELU in place, chunk by chunk."""
    leaves = {name: value.requires_grad_() for name, value in inputs(rows, 24).items()}
    y = gelu_mlp(**leaves)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(gelu_mlp(**leaves), y)


def test_backward_twice_gives_the_same() -> None:
    """dh is written over dact, never over what was saved."""
    leaves = {name: value.requires_grad_() for name, value in inputs(9, 80).items()}
    y, dy = gelu_mlp(**leaves), torch.randn(9, 80)
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    kept = dy.clone()
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert torch.equal(dy, kept)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 80), (1025, 83), (4099, 33)])
def test_column_sum(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) + 3).to(dtype)
    wide = torch.zeros(shape[0], shape[1] + 7, dtype=dtype)
    wide[:, 3 : 3 + shape[1]] = x
    total = cpu.column_sum(wide[:, 3 : 3 + shape[1]])
    compare("sum", total, x.float().sum(0), x.double().sum(0))
    assert torch.equal(total, cpu.column_sum(x))


def test_fp32_biases_beside_half_weights() -> None:
    given = inputs(9, 80)
    half = {name: value.bfloat16() for name, value in given.items() if "bias" not in name}
    leaves = {name: value.requires_grad_() for name, value in {**given, **half}.items()}
    y = gelu_mlp(**leaves)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype, name


def test_autocast_works_as_for_linear() -> None:
    given = inputs(9, 80)
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = gelu_mlp(**leaves)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        truth = gelu_mlp(**{n: v.double() for n, v in given.items()})
        with gpt2fast.use_backend("reference"):
            expected = gelu_mlp(**{n: v.bfloat16() for n, v in given.items()})
    compare("output", y.detach(), expected, truth)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32, name


def test_deterministic() -> None:
    given, dy = inputs(1025, 80), torch.randn(1025, 80)

    def run() -> list[torch.Tensor]:
        leaves = [value.clone().requires_grad_() for value in given.values()]
        y = gelu_mlp(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_deterministic(run)


def test_compiles() -> None:
    assert_compiles(gelu_mlp, inputs(2, 6, 24), "cpu")
    assert_compiles(gelu_mlp, inputs(6, 24, bias=False), "cpu")


def test_opcheck() -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias = inputs(2, 3, 24, out=20).values()
    for biases in ((fc_bias, proj_bias), (None, None)):
        for save in (True, False):
            arguments = (x, fc_weight, biases[0], proj_weight, biases[1], save, "cpu")
            torch.library.opcheck(autograd.gelu_mlp_forward, arguments)
    h, dy = torch.randn(6, 96), torch.randn(2, 3, 20)
    for index in range(5):
        for need in ([i == index for i in range(5)], [i != index for i in range(5)]):
            arguments = (dy, x, h, fc_weight, fc_bias, proj_weight, need, "cpu")
            torch.library.opcheck(
                autograd.gelu_mlp_backward,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )
    torch.library.opcheck(
        autograd.gelu_mlp_backward,
        (dy, x, h, fc_weight, fc_bias, proj_weight, [True] * 5, "cpu"),
    )


X, FC, PROJ = torch.zeros(3, 4), torch.zeros(16, 4), torch.zeros(4, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], FC, None, PROJ, None), TypeError, r"x must be a torch\.Tensor, got list"),
        ((X.long(), FC, None, PROJ, None), TypeError, "x must be floating point"),
        ((X, None, None, PROJ, None), TypeError, r"fc_weight must be a torch\.Tensor"),
        ((torch.tensor(1.0), FC, None, PROJ, None), ValueError, "x must have a last dimension"),
        ((X, FC[0], None, PROJ, None), ValueError, r"fc_weight must have shape \(out, in\)"),
        ((X, PROJ, None, FC, None), ValueError, r"fc_weight must have shape \(4, 4\)"),
        ((X, FC, None, FC, None), ValueError, r"proj_weight must have shape \(16, 16\)"),
        ((X, FC, X[0], PROJ, None), ValueError, "fc_bias must have shape"),
        ((X, FC, None, PROJ, FC[:, 0]), ValueError, "proj_bias must have shape"),
        ((X, FC.half(), None, PROJ, None), TypeError, r"fc_weight is torch\.float16 but x is"),
        ((X, FC, None, PROJ.double(), None), TypeError, r"proj_weight is torch\.float64 but x is"),
        ((X, FC.to("meta"), None, PROJ, None), ValueError, "fc_weight is on meta but x is on cpu"),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gelu_mlp(*arguments)


def test_reference_and_kernel_differ_in_bits() -> None:
    """Guards the tests themselves: `use_backend` really switches the code that runs."""
    given = inputs(64, 80)
    with gpt2fast.use_backend("reference"):
        expected = gelu_mlp(**given)
    with gpt2fast.use_backend("cpu"):
        assert not torch.equal(gelu_mlp(**given), expected)
