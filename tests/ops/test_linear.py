"""linear and the matrix products beneath it: the fp64 rule, blocks and edges, who computes what."""

from collections.abc import Iterator

import pytest
import torch

import gpt2fast
from gpt2fast import backends
from gpt2fast.backends import cpu_extension
from gpt2fast.functional import linear
from gpt2fast.ops.linear import cpu
from tests.ops.numerics import assert_accurate, assert_compiles, assert_deterministic, compare


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products go to the kernel on every machine."""
    monkeypatch.setenv("GPT2FAST_CPU_MATMUL", "kernel")
    cpu.preferred.cache_clear()
    yield
    cpu.preferred.cache_clear()


def operand(rows: int, columns: int, across: bool, pad: int = 0) -> torch.Tensor:
    """Random (rows, columns), or the transpose of such, with `pad` columns to skip in each row."""
    if across:
        return operand(columns, rows, False, pad).t()
    return torch.randn(rows, columns + pad)[:, :columns]


SHAPES = [  # rows, columns, depth: blocks of 64, 256 and 1024; groups of 48; sums of 256
    (1, 1, 1),
    (5, 3, 2),
    (48, 64, 256),
    (49, 65, 257),
    (47, 17, 255),
    (256, 96, 300),
    (257, 50, 40),
    (300, 300, 30),
    (7, 1030, 20),
    (20, 7, 1030),
    (96, 33, 2100),
    (1, 50, 300),  # few rows
    (2, 130, 257),
    (6, 37, 600),
    (8, 40, 300),
    (64, 65, 513),
    (65, 40, 300),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("a_across", "b_across"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("pad", [0, 3])
def test_product(
    isa: str, shape: tuple[int, int, int], a_across: bool, b_across: bool, pad: int
) -> None:
    rows, columns, depth = shape
    a, b = operand(rows, depth, a_across, pad), operand(depth, columns, b_across, pad)
    if a_across and a.stride(1) == 1:
        a = a.as_strided(a.shape, (1, rows + pad))  # one column: the strides do not tell
    bias = torch.randn(columns)
    start = torch.randn(rows, columns + pad)
    for what in ("store", "bias", "add"):
        wide = start.clone()
        out = wide[:, :columns]
        cpu.product(a, b, bias if what == "bias" else None, out, what == "add")
        exact = a.double() @ b.double()
        expected = a @ b
        if what == "bias":
            exact, expected = exact + bias, expected + bias
        elif what == "add":
            exact, expected = exact + start[:, :columns], expected + start[:, :columns]
        compare(what, out, expected, exact)
        assert torch.equal(wide[:, columns:], start[:, columns:])


def test_bias_and_result_of_any_stride(isa: str) -> None:
    a, b = torch.randn(64, 80), torch.randn(130, 80).t()
    bias, wide = torch.randn(260)[::2], torch.zeros(64, 260)
    expected, exact = a @ b + bias, a.double() @ b.double() + bias.double()
    compare("bias", cpu.matmul(a, b, bias), expected, exact)
    cpu.matmul(a, b, bias, out=wide[:, ::2])
    compare("out", wide[:, ::2], expected, exact)
    assert not wide[:, 1::2].any()


def test_threads_do_not_change_bits(isa: str) -> None:
    before = torch.get_num_threads()
    for a_across, b_across in ((False, True), (False, False), (True, False)):
        a, b = operand(300, 520, a_across), operand(520, 290, b_across)
        results = []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(cpu.product(a, b, None, torch.empty(300, 290), False))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert torch.equal(results[0], other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_column(isa: str, value: float) -> None:
    for a_across, b_across in ((False, True), (False, False), (True, False)):
        a, b = operand(50, 40, a_across), operand(40, 70, b_across)
        a[49, 3] = value
        out = cpu.product(a, b, None, torch.empty(50, 70), False)
        assert not out[49].isfinite().any()
        assert out[:49].isfinite().all()
        a[49, 3] = 0.0
        b[39, 69] = value
        out = cpu.product(a, b, None, torch.empty(50, 70), False)
        assert not out[:, 69].isfinite().any()
        assert out[:, :69].isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 200), (257,), (600,), (3,)], ids=str)
def test_linear(isa: str, shape: tuple[int, ...], bias: bool) -> None:
    """Rows of which all, some or no products are the kernel's."""
    given = {"x": torch.randn(*shape, 80), "weight": torch.randn(130, 80), "bias": None}
    if bias:
        given["bias"] = torch.randn(130)
    assert_accurate(linear, given)


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "tensor_kernels", lambda: None)  # where products are counted
    seen = []
    product = cpu.product
    monkeypatch.setattr(
        cpu, "product", lambda *given: seen.append(given[0].shape) or product(*given)
    )
    x, weight = torch.randn(2, 64, 80, requires_grad=True), torch.randn(130, 80, requires_grad=True)

    def products() -> int:
        seen.clear()
        linear(x, weight).sum().backward()
        return len(seen)

    assert products() == 3
    with gpt2fast.use_backend("reference"):
        assert products() == 0
    for name, count in (("blas", 0), ("kernel", 3)):
        monkeypatch.setenv("GPT2FAST_CPU_MATMUL", name)
        cpu.preferred.cache_clear()
        assert products() == count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.clear()
        assert linear(x, weight).dtype == torch.bfloat16
    assert not seen
    for few in (x[:1, :3], x.bfloat16().float()[:, ::2, :], x.expand(9, 2, 64, 80)):
        linear(few, weight)
    assert not seen
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert not seen


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2FAST_CPU_MATMUL", "auto")
    cpu.preferred.cache_clear()
    vectors = cpu_extension().runnable[-1] != "portable"
    wanted = cpu_extension().amd and vectors and torch.backends.mkl.is_available()
    assert cpu.preferred(1) == cpu.preferred(cpu.MOST_THREADS) == wanted
    assert not cpu.preferred(cpu.MOST_THREADS + 1)
    monkeypatch.setenv("GPT2FAST_CPU_MATMUL", "mkl")
    cpu.preferred.cache_clear()
    with pytest.raises(ValueError, match="auto, kernel or blas, got 'mkl'"):
        cpu.preferred(1)


def test_only_what_is_wanted(isa: str) -> None:
    for wanted in (["x"], ["weight"], ["bias"], ["x", "bias"]):
        given = {"x": torch.randn(64, 80), "weight": torch.randn(130, 80), "bias": torch.randn(130)}
        assert_accurate(linear, given, wanted=wanted)


def test_compiles_as_one_graph() -> None:
    given = {"x": torch.randn(64, 80), "weight": torch.randn(130, 80), "bias": torch.randn(130)}
    assert_compiles(linear, given, "cpu")


def test_deterministic(isa: str) -> None:
    x, weight, bias = torch.randn(100, 80), torch.randn(130, 80), torch.randn(130)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    dy = torch.randn(100, 130)

    def run() -> list[torch.Tensor]:
        y = linear(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_deterministic(run)


def test_empty_and_wrong_input_is_torch_s() -> None:
    assert linear(torch.randn(0, 80), torch.randn(130, 80)).shape == (0, 130)
    with pytest.raises(RuntimeError):
        linear(torch.randn(64, 81), torch.randn(130, 80))
    with pytest.raises(RuntimeError):
        linear(torch.randn(64, 80), torch.randn(130, 80).double())
    with pytest.raises(RuntimeError):
        linear(torch.randn(64, 80), torch.randn(130, 80), torch.randn(7))
