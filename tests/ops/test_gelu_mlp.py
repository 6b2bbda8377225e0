"""gelu_mlp: the fp64 rule for values and every gradient, layouts, memory, errors, torch.compile."""

import ctypes
import importlib
import shutil
import subprocess
import types
import unittest.mock
from pathlib import Path

import pytest
import torch

import gpt2fast
from gpt2fast import backends
from gpt2fast.backends import load
from gpt2fast.functional import gelu_mlp
from gpt2fast.ops.gelu_mlp import autograd
from tests import cuda_emulator
from tests.ops.numerics import (
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_deterministic,
    compare,
    device_of,
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
def test_gelu_mlp(backend: str, rows: int, width: int, dtype: torch.dtype) -> None:
    assert_accurate(gelu_mlp, inputs(rows, width), dtype=dtype, backend=backend)


def test_gpt2_width(backend: str) -> None:
    assert_accurate(gelu_mlp, inputs(2, 65, 768), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_hidden_and_output_size(backend: str, dtype: torch.dtype) -> None:
    given = inputs(2, 3, 17, 24, hidden=97, out=33)
    assert_accurate(gelu_mlp, given, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_biases(backend: str, dtype: torch.dtype) -> None:
    assert_accurate(gelu_mlp, inputs(9, 80, bias=False), dtype=dtype, backend=backend)


@pytest.mark.parametrize("missing", ["fc_bias", "proj_bias"])
def test_without_one_bias(backend: str, missing: str) -> None:
    assert_accurate(gelu_mlp, {**inputs(9, 80), missing: None}, backend=backend)


NAMES = ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "wanted", [*([name] for name in NAMES), ["fc_bias", "proj_weight"], ["x", "proj_bias"]]
)
def test_only_some_inputs_require_gradients(
    backend: str, wanted: list[str], dtype: torch.dtype
) -> None:
    assert_accurate(gelu_mlp, inputs(9, 80), wanted=wanted, dtype=dtype, backend=backend)


def test_large_preactivations(backend: str) -> None:
    given = inputs(9, 80)
    assert_accurate(gelu_mlp, {**given, "x": 1e4 * given["x"]}, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_strided_arguments(backend: str, dtype: torch.dtype) -> None:
    given = inputs(6, 80)
    transposed = {
        name: given[name].t().contiguous().t() for name in ("x", "fc_weight", "proj_weight")
    }
    assert not transposed["x"].is_contiguous()
    assert_accurate(gelu_mlp, {**given, **transposed}, dtype=dtype, backend=backend)
    rest = {name: value for name, value in given.items() if name != "x"}
    assert_accurate(
        lambda packed, **rest: gelu_mlp(packed[:, 80:160], **rest),
        {"packed": torch.randn(6, 240), **rest},
        dtype=dtype,
        backend=backend,
    )
    assert_accurate(  # columns that are not contiguous in any direction
        lambda fc_weight, proj_weight, **rest: gelu_mlp(
            fc_weight=fc_weight[:, ::2], proj_weight=proj_weight[:, ::2], **rest
        ),
        {
            **given,
            "fc_weight": given["fc_weight"].repeat_interleave(2, 1),
            "proj_weight": given["proj_weight"].repeat_interleave(2, 1),
        },
        dtype=dtype,
        backend=backend,
    )


def test_zero_stride_upstream_gradient(backend: str) -> None:
    assert_accurate(lambda **given: gelu_mlp(**given).sum(), inputs(9, 80), backend=backend)
    assert_accurate(lambda **given: gelu_mlp(**given).sum(0), inputs(9, 80), backend=backend)
    assert_accurate(
        lambda **given: gelu_mlp(**given).sum((0, 1)), inputs(2, 9, 80), backend=backend
    )


def leaves_of(
    backend: str, *shape: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    return {
        name: value.to(device_of(backend), dtype).requires_grad_()
        for name, value in inputs(*shape).items()
    }


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_empty_batch(backend: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(backend, 0, 5, 80, dtype=dtype)
    with gpt2fast.use_backend(backend):
        y = gelu_mlp(**leaves)
    assert y.shape == (0, 5, 80)
    y.sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rows", [1, 1024, 1025, 2500])
def test_no_grad_gives_the_same_bits(backend: str, rows: int, dtype: torch.dtype) -> None:
    """The path that keeps nothing for a backward does without h."""
    leaves = leaves_of(backend, rows, 24, dtype=dtype)
    with gpt2fast.use_backend(backend):
        y = gelu_mlp(**leaves)
        assert y.requires_grad
        with torch.no_grad():
            assert torch.equal(gelu_mlp(**leaves), y)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_backward_twice_gives_the_same(backend: str, dtype: torch.dtype) -> None:
    """dh is written over dact, never over what was saved."""
    leaves = leaves_of(backend, 9, 80, dtype=dtype)
    with gpt2fast.use_backend(backend):
        y = gelu_mlp(**leaves)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    kept = dy.clone()
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert torch.equal(dy, kept)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 80), (1025, 83), (4099, 33)])
def test_column_sum(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    column_sum = load("gelu_mlp", backend).column_sum
    x = (torch.randn(shape) + 3).to(dtype)
    wide = torch.zeros(shape[0], shape[1] + 7, dtype=dtype, device=device_of(backend))
    wide[:, 3 : 3 + shape[1]] = x
    total = column_sum(wide[:, 3 : 3 + shape[1]])
    compare("sum", total.cpu(), x.float().sum(0), x.double().sum(0))
    assert torch.equal(total, column_sum(x.to(device_of(backend))))


def test_fp32_biases_beside_half_weights(backend: str) -> None:
    leaves = leaves_of(backend, 9, 80)
    for name in ("x", "fc_weight", "proj_weight"):
        leaves[name] = leaves[name].detach().bfloat16().requires_grad_()
    with gpt2fast.use_backend(backend):
        y = gelu_mlp(**leaves)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype, name


def test_autocast_works_as_for_linear(backend: str) -> None:
    given = inputs(9, 80)
    device = device_of(backend)
    leaves = {name: value.to(device, copy=True).requires_grad_() for name, value in given.items()}
    with torch.autocast(device.type, torch.bfloat16), gpt2fast.use_backend(backend):
        y = gelu_mlp(**leaves)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        truth = gelu_mlp(**{n: v.double() for n, v in given.items()})
        with gpt2fast.use_backend("reference"):
            expected = gelu_mlp(**{n: v.bfloat16() for n, v in given.items()})
    compare("output", y.detach().cpu(), expected, truth)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32, name


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_deterministic(backend: str, dtype: torch.dtype) -> None:
    given = leaves_of(backend, 1025 if dtype == torch.float32 else 130, 80, dtype=dtype)
    dy = torch.randn_like(given["x"])

    def run() -> list[torch.Tensor]:
        leaves = [value.detach().clone().requires_grad_() for value in given.values()]
        with gpt2fast.use_backend(backend):
            y = gelu_mlp(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert_deterministic(run)


def test_compiles(backend: str) -> None:
    assert_compiles(gelu_mlp, inputs(2, 6, 24), backend)
    assert_compiles(gelu_mlp, inputs(6, 24, bias=False), backend)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    x, fc_weight, fc_bias, proj_weight, proj_bias = (
        t.to(device, dtype) for t in inputs(2, 3, 24, out=20).values()
    )
    for biases in ((fc_bias, proj_bias), (None, None)):
        for save in (True, False):
            arguments = (x, fc_weight, biases[0], proj_weight, biases[1], save, backend)
            torch.library.opcheck(autograd.gelu_mlp_forward, arguments)
    h, dy = x.new_empty(6, 96).normal_(), x.new_empty(2, 3, 20).normal_()
    for index in range(5 if dtype == torch.float32 else 0):
        for need in ([i == index for i in range(5)], [i != index for i in range(5)]):
            arguments = (dy, x, h, fc_weight, fc_bias, proj_weight, need, backend)
            torch.library.opcheck(
                autograd.gelu_mlp_backward,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )
    torch.library.opcheck(
        autograd.gelu_mlp_backward,
        (dy, x, h, fc_weight, fc_bias, proj_weight, [True] * 5, backend),
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


def test_reference_and_kernel_differ_in_bits(backend: str) -> None:
    """Guards the tests themselves: `use_backend` really switches the code that runs."""
    given = {name: value.to(device_of(backend)) for name, value in inputs(64, 80).items()}
    with gpt2fast.use_backend("reference"):
        expected = gelu_mlp(**given)
    with gpt2fast.use_backend(backend):
        assert not torch.equal(gelu_mlp(**given), expected)


def tile(rows: int, columns: int, depth: int, **more: object) -> dict[str, object]:
    """A configuration of the Triton kernel, as keywords: its module may be missing."""
    rest = {"warps": 4, "stages": 2, "programs": 1, "parts": 1, "descriptors": False, "flat": False}
    return {"rows": rows, "columns": columns, "depth": depth, **rest, **more}


@pytest.fixture
def configured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Runs the Triton products with one configuration; lists which launches used descriptors."""
    if not (found := backends.status("triton")).available:
        pytest.skip(found.detail)
    module = load("gelu_mlp", "triton")
    used: list[bool] = []

    def launch(*arguments: object, **constants: object) -> None:
        if "DESCRIPTORS" in constants:
            used.append(bool(constants["DESCRIPTORS"]))
        original(*arguments, **constants)

    original = module.launch
    monkeypatch.setattr(module, "launch", launch)
    config = module.Config(**request.param)
    monkeypatch.setattr(module, "_configure", lambda *_: config)
    used.append(config.descriptors)
    return used


CONFIGS = [
    tile(32, 64, 32),
    tile(32, 64, 32, descriptors=True),
    tile(16, 64, 32, parts=2, descriptors=True, programs=2),
    tile(64, 128, 64, parts=4),
    tile(64, 128, 32, parts=4, descriptors=True, flat=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("configured", CONFIGS, indirect=True)
def test_triton_tiles(configured: list[bool], dtype: torch.dtype) -> None:
    """Several tiles in both directions and several steps, with ragged ends, in every layout."""
    given = inputs(70, 80, hidden=168, out=96)
    assert_accurate(gelu_mlp, given, dtype=dtype, backend="triton")
    turned = {name: given[name].t().contiguous().t() for name in ("fc_weight", "proj_weight")}
    assert_accurate(gelu_mlp, {**given, **turned}, dtype=dtype, backend="triton")
    assert len(configured) == 5
    assert all(used == configured[0] for used in configured)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("configured", CONFIGS[1:3], indirect=True)
def test_triton_without_alignment(configured: list[bool], dtype: torch.dtype) -> None:
    """Rows that do not begin at multiples of 16 bytes go by pointers."""
    assert_accurate(gelu_mlp, inputs(67, 33, hidden=101, out=41), dtype=dtype, backend="triton")
    given = inputs(67, 48, hidden=96)
    assert_accurate(
        lambda wide, **rest: gelu_mlp(wide[:, 1:49], **rest),
        {"wide": torch.randn(67, 64), **{n: v for n, v in given.items() if n != "x"}},
        dtype=dtype,
        backend="triton",
    )
    assert configured == [True, False, False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("configured", [tile(32, 64, 32, fused=False)], indirect=True)
def test_triton_unfused(configured: list[bool], dtype: torch.dtype) -> None:
    assert_accurate(gelu_mlp, inputs(70, 80), dtype=dtype, backend="triton")
    for wanted in (["fc_bias"], ["fc_weight"], ["proj_weight"], ["proj_bias"]):
        assert_accurate(gelu_mlp, inputs(9, 80), dtype=dtype, wanted=wanted, backend="triton")
    assert configured == [False]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CUDA products on wgmma and TMA; lists their launches."""
    return cuda_emulator.launches_on_hopper("gelu_mlp", monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("rows", "width", "hidden"), [(1, 80, 96), (130, 264, 328), (3, 8, 8), (193, 72, 40)]
)
def test_cuda_on_hopper(
    on_hopper: list[str], rows: int, width: int, hidden: int, dtype: torch.dtype
) -> None:
    """One and several tiles both ways, fewer and more steps than stages, ragged ends, weights as in
    nn.Linear and as in Conv1D."""
    given = inputs(rows, width, hidden=hidden)
    assert_accurate(gelu_mlp, given, dtype=dtype, backend="cuda")
    turned = {name: given[name].t().contiguous().t() for name in ("fc_weight", "proj_weight")}
    assert_accurate(gelu_mlp, {**given, **turned}, dtype=dtype, backend="cuda")
    assert on_hopper.count("gelu_product_hopper_forward") == 2
    assert on_hopper.count("gelu_product_hopper_backward") == 2


@pytest.mark.parametrize(
    "wanted", [["fc_bias"], ["proj_weight"], ["fc_weight"], ["fc_bias", "proj_weight"]]
)
def test_cuda_on_hopper_some_gradients(on_hopper: list[str], wanted: list[str]) -> None:
    given = inputs(70, 80)
    for missing in ({}, {"fc_bias": None} if "fc_bias" not in wanted else {}):
        assert_accurate(
            gelu_mlp, {**given, **missing}, dtype=torch.bfloat16, wanted=wanted, backend="cuda"
        )
    assert "gelu_product_hopper_forward" in on_hopper


def test_cuda_on_hopper_same_bits(on_hopper: list[str]) -> None:
    """Without a backward to come h is not written; run after run gives the same bits, in the emulator
    whatever the order in which threads run and copies arrive."""
    leaves = leaves_of("cuda", 130, 72, dtype=torch.bfloat16)
    kernels = backends.cuda_kernels()
    runs = []
    with gpt2fast.use_backend("cuda"):
        for backwards in (False, True):
            if kernels.emulated:
                kernels.options(reversed=backwards)
            y = gelu_mlp(**leaves)
            runs.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
            if kernels.emulated:
                kernels.options()
        with torch.no_grad():
            runs.append([gelu_mlp(**leaves)])
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=False):
            assert torch.equal(a, b)


def test_cuda_on_hopper_rows_that_tma_does_not_take(on_hopper: list[str]) -> None:
    """Rows that overlap go to mma.sync, rows that begin anywhere to cuBLAS."""
    given = inputs(70, 80)
    rest = {name: value for name, value in given.items() if name != "x"}
    assert_accurate(
        lambda row, **rest: gelu_mlp(row.expand(70, 80), **rest),
        {"row": torch.randn(1, 80), **rest},
        dtype=torch.bfloat16,
        backend="cuda",
    )
    assert [name for name in on_hopper if "product" in name] == [
        "gelu_product_forward",
        "gelu_product_hopper_backward",
    ]
    on_hopper.clear()
    assert_accurate(
        lambda wide, **rest: gelu_mlp(wide[:, 1:81], **rest),
        {"wide": torch.randn(70, 96), **rest},
        dtype=torch.bfloat16,
        backend="cuda",
    )
    assert "gelu_product_hopper_forward" not in on_hopper


@pytest.fixture(params=["stand-in", "library"])
def cublaslt(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[int]:
    """The backend on the library, or on a stand-in for it on a CPU; lists the epilogues it ran."""
    module = load("gelu_mlp", "cublaslt")
    if request.param == "library":
        if not (found := backends.status("cublaslt")).available:
            pytest.skip(found.detail)
    else:
        if torch.cuda.is_available():
            pytest.skip("the library itself is here")
        if (compiler := shutil.which("g++")) is None:
            pytest.skip("the stand-in is built with g++, which is not here")
        made = tmp_path / "cublaslt.so"
        source = cuda_emulator.CSRC / "testing" / "cublaslt.cpp"
        subprocess.run([compiler, "-O2", "-fPIC", "-shared", source, "-o", made], check=True)
        library = ctypes.CDLL(str(made))
        monkeypatch.setattr(module, "cublaslt", lambda: library)
        monkeypatch.setattr(backends, "status", lambda name: backends.Status(True, name))
        monkeypatch.setattr(backends, "_device_of", lambda _: "cpu")
    ran: list[int] = []

    def product(a: torch.Tensor, b: torch.Tensor, epilogue: int, *rest: object) -> bool:
        if taken := original(a, b, epilogue, *rest):
            ran.append(epilogue)
        return taken

    original = module._product
    monkeypatch.setattr(module, "_product", product)
    for cached in (module._handle, module._plan):
        cached.cache_clear()
    return ran


@pytest.mark.parametrize("dtype", DTYPES)
def test_cublaslt(cublaslt: list[int], dtype: torch.dtype) -> None:
    """Every epilogue, both layouts of weights, rows that lie apart; then what it does not take."""
    given = inputs(9, 80, hidden=96, out=72)
    assert_accurate(gelu_mlp, given, dtype=dtype, backend="cublaslt")
    turned = {name: given[name].t().contiguous().t() for name in ("fc_weight", "proj_weight")}
    assert_accurate(gelu_mlp, {**given, **turned}, dtype=dtype, backend="cublaslt")
    assert cublaslt == [164, 208] * 2  # GELU_AUX_BIAS, DGELU_BGRAD
    cublaslt.clear()
    assert_accurate(gelu_mlp, {**given, "fc_bias": None}, dtype=dtype, backend="cublaslt")
    without_grad = torch.no_grad()(gelu_mlp)
    assert_accurate(without_grad, given, dtype=dtype, wanted=[], backend="cublaslt")
    assert cublaslt == [160, 192, 36]  # GELU_AUX, DGELU, GELU_BIAS
    cublaslt.clear()
    assert_accurate(
        lambda packed, **rest: gelu_mlp(packed[:, 80:160], **rest),
        {"packed": torch.randn(9, 240), **{n: v for n, v in given.items() if n != "x"}},
        dtype=dtype,
        backend="cublaslt",
    )
    assert cublaslt == [164, 208]
    assert_accurate(gelu_mlp, inputs(9, 33, hidden=41), dtype=dtype, backend="cublaslt")
    assert len(cublaslt) == 2


def test_cublaslt_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(backends.ctypes, "CDLL", missing)
    monkeypatch.setattr(backends, "cublaslt", backends.cublaslt.__wrapped__)
    found = backends.status.__wrapped__("cublaslt")
    assert not found.available
    assert "neither libcublasLt.so.13 nor libcublasLt.so.12 is found" in found.detail


def test_cublaslt_of_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.SimpleNamespace(cublasLtGetVersion=unittest.mock.Mock(return_value=140000))
    monkeypatch.setattr(backends.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(backends, "cublaslt", backends.cublaslt.__wrapped__)
    assert "says that it is version 140000" in backends.status.__wrapped__("cublaslt").detail


def test_cublaslt_never_chosen_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "status", lambda name: backends.Status(True, name))
    monkeypatch.setattr(backends, "selected", dict)
    assert backends._choose_for("cuda", "gelu_mlp") == "triton"
    monkeypatch.setattr(backends, "selected", lambda: {"gelu_mlp": {"5": {"backend": "cublaslt"}}})
    assert backends._choose_for("cuda", "gelu_mlp") == "cublaslt"


def test_triton_rule_has_tiles_that_fit() -> None:
    """Small batches take small tiles; every shipped tile is a power of two that tl.dot takes."""
    if not backends.status("triton").available:
        pytest.skip(backends.status("triton").detail)
    module, common = (
        load("gelu_mlp", "triton"),
        importlib.import_module("gpt2fast.ops.triton_common"),
    )
    for target in (common.A100, common.H100, common.B200):
        for backward in (False, True):
            rows = []
            for height in (1, 16, 200, 2048, 65536):
                for depth in (1, 5, 768, 1600):
                    for dtype in DTYPES:
                        config = module.rule(target, height, 4 * depth, depth, dtype, backward)
                        assert config.fused == (dtype != torch.float32)
                        for size in (config.rows, config.columns, config.depth):
                            assert size >= 16
                            assert size & (size - 1) == 0
                config = module.rule(target, height, 3072, 768, torch.bfloat16, backward)
                rows.append(config.rows)
            assert rows[0] == rows[1] == 16
            assert rows[-1] == 128
            assert rows == sorted(rows)
