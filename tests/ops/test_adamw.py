"""adamw_ and global_norm: the fp64 rule over steps, layouts, errors, opcheck."""

from itertools import chain

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast.functional import adamw_, global_norm
from gpt2fast.ops.adamw import autograd
from tests.ops.numerics import DTYPES, compare

SHAPES = ((768, 33), (1,), (5,), (0, 3), (1025,), (17, 16), (3, 1, 7), ())
SCALARS = {"lr": 6e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def moments(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]


def train(
    params: list[Tensor],
    gradients: list[list[Tensor]],
    backend: str,
    dtype: torch.dtype,
    scale: float | None = None,
    **scalars: float,
) -> list[list[Tensor]]:
    """Parameters and moments after the steps that `gradients` gives, from `params`."""
    params = [p.to(dtype) for p in params]
    params = [p.clone() for p in params]
    first, second = moments(params), moments(params)
    given = None if scale is None else torch.tensor(scale)
    with gpt2fast.use_backend(backend):
        for step, grads in enumerate(gradients, 1):
            grads = [g.to(dtype) for g in grads]
            options = {**SCALARS, **scalars}
            adamw_(params, grads, first, second, step=step, grad_scale=given, **options)
    return [params, first, second]


def assert_rule(
    dtype: torch.dtype, scale: float | None = None, steps: int = 20, **scalars: float
) -> None:
    start = [torch.randn(shape).to(dtype).float() for shape in SHAPES]
    sizes = [10.0 ** float(torch.randint(-4, 3, ())) for _ in SHAPES]
    gradients = [
        [(torch.randn(s) * size).to(dtype).float() for s, size in zip(SHAPES, sizes, strict=True)]
        for _ in range(steps)
    ]
    truth = train(start, gradients, "reference", torch.float64, scale, **scalars)
    expected = train(start, gradients, "reference", dtype, scale, **scalars)
    measured = train(start, gradients, "cpu", dtype, scale, **scalars)
    for name, m, e, t in zip(("p", "m", "v"), measured, expected, truth, strict=True):
        for i, (mine, theirs, true) in enumerate(zip(m, e, t, strict=True)):
            compare(f"{name}[{i}]", mine, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.37])
def test_adamw(isa: str, scale: float | None, dtype: torch.dtype) -> None:
    assert_rule(dtype, scale)


@pytest.mark.parametrize(
    "scalars",
    [
        {"beta1": 0.0, "beta2": 0.0},
        {"beta2": 0.999, "weight_decay": 0.0},
        {"beta1": 0.3, "beta2": 0.4},
        {"eps": 0.1},
        {"lr": 0.0},
        {"lr": 1.0, "weight_decay": 0.5},
    ],
)
def test_scalars(isa: str, scalars: dict[str, float]) -> None:
    assert_rule(torch.float32, **scalars)


def test_second_moment_settles_where_it_should() -> None:
    """1 - 0.999 must not be rounded as fp32(1) - fp32(0.999), which misses by 1e-5."""
    p, g = [torch.zeros(64)], [torch.ones(64)]
    first, second = moments(p), moments(p)
    scalars = {**SCALARS, "beta2": 0.999}
    for step in range(1, 2001):
        adamw_(p, g, first, second, step=step, **scalars)
    true = 1 - 0.999**2000
    assert abs(second[0].double() / true - 1).max() < 3e-6  # rounding of 2000 sums


def test_late_step() -> None:
    """Bias corrections of 1 and tiny ones."""
    for step in (1, 10, 10**6):
        p = [torch.randn(100, dtype=torch.float64)]
        g = [torch.randn(100, dtype=torch.float64)]
        m, v = [torch.randn(100).double()], [torch.rand(100).double()]
        lists = [p, g, m, v]
        single = [[t.float() for t in x] for x in lists]
        adamw_(*single, step=step, **SCALARS)
        adamw_(*lists, step=step, **SCALARS)
        torch.testing.assert_close(single[0][0].double(), p[0], rtol=1e-6, atol=1e-6)


def layouts() -> dict[str, list[Tensor]]:
    transposed, wide = torch.randn(7, 5).t(), torch.randn(5, 14)[:, ::2]
    contiguous = torch.randn(5, 7)
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return {
        "transposed parameter": [transposed, contiguous, contiguous, contiguous],
        "all transposed": [transposed] * 4,
        "strided parameter": [wide, contiguous, contiguous, contiguous],
        "strided gradient": [contiguous, wide, contiguous, contiguous],
        "strided moments": [contiguous, contiguous, wide, transposed],
        "all strided": [wide] * 4,
        "broadcast gradient": [contiguous, torch.randn(7).expand(5, 7), contiguous, contiguous],
        "channels last": [channels_last] * 4,
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str) -> None:
    four = layouts()[name]
    laid = []
    for t in four:
        copy = torch.empty_strided(t.shape, t.stride()) if 0 not in t.stride() else t
        values = torch.rand(t.shape) + 0.1
        laid.append(copy.copy_(values) if copy is not t else t)
    plain = [t.contiguous().clone() for t in laid]
    padding = laid[0].untyped_storage().clone()
    for step in (1, 2, 3):
        for lists in (laid, plain):
            adamw_(*([t] for t in lists), step=step, **SCALARS)
    for mine, theirs in zip(laid, plain, strict=True):
        assert torch.equal(mine, theirs)
    if name == "strided parameter":  # the elements between are not ours
        before = torch.tensor(padding, dtype=torch.uint8).view(torch.float32)
        after = torch.tensor(laid[0].untyped_storage(), dtype=torch.uint8).view(torch.float32)
        assert torch.equal(before[1::2], after[1::2])


def test_tensors_of_several_dtypes_in_one_call() -> None:
    for order in (DTYPES, DTYPES[::-1]):
        params = [torch.randn(333).to(dtype) for dtype in order]
        grads = [torch.randn(333).to(dtype) for dtype in order]
        alone = [p.clone() for p in params]
        adamw_(params, grads, moments(params), moments(params), step=1, **SCALARS)
        for p, g, together in zip(alone, grads, params, strict=True):
            adamw_([p], [g], moments([p]), moments([p]), step=1, **SCALARS)
            assert torch.equal(p, together)


def test_the_number_of_threads_does_not_change_bits() -> None:
    start = [torch.randn(50_001), torch.randn(3), torch.randn(40_000)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(2)]
    before = torch.get_num_threads()
    results, norms = [], []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(train(start, gradients, "cpu", torch.float32))
            norms.append(global_norm(start))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(chain(*results[0]), chain(*other), strict=True):
            assert torch.equal(a, b)
    assert norms[0] == norms[1] == norms[2]


def test_versions_are_counted() -> None:
    """Autograd must see that a saved parameter has changed."""
    p = torch.randn(4, requires_grad=True)
    loss = (p * p).sum()
    with torch.no_grad():
        adamw_([p], [torch.ones(4)], moments([p]), moments([p]), step=1, **SCALARS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm(isa: str, dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in (*SHAPES, (40_000,), (16_385,))]
    tensors.append(torch.randn(40, 30).to(dtype).t())
    tensors.append(torch.randn(40, 30).to(dtype)[:, ::3])
    tensors.append(torch.randn(30).to(dtype).expand(40, 30))
    true = torch.cat([t.double().flatten() for t in tensors]).norm()
    norm = global_norm(tensors)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(norm.double() / true - 1) < 1e-7


def test_global_norm_of_extreme_values(isa: str) -> None:
    for value in (3e38, 1e20, 1e-30, 0.0):
        true = value * 10
        norm = global_norm([torch.full((60,), value), torch.full((40,), value)]).item()
        assert norm == (pytest.approx(true, rel=1e-6, abs=0) if true < 3.4e38 else torch.inf)
    assert global_norm([torch.tensor([1.0, torch.nan])]).isnan()
    assert global_norm([torch.tensor([1.0, -torch.inf])]).isinf()
    assert global_norm([]) == 0
    assert global_norm([torch.zeros(0)]) == 0


def test_double_goes_to_the_reference() -> None:
    p, g = [torch.randn(7, dtype=torch.float64)], [torch.randn(7, dtype=torch.float64)]
    adamw_(p, g, moments(p), moments(p), step=1, **SCALARS)
    norm = global_norm([torch.ones(4), torch.ones(12, dtype=torch.float64)])
    assert norm.dtype == torch.float64
    assert abs(norm - 4) < 1e-6
    with gpt2fast.use_backend("cpu"), pytest.raises(TypeError, match="backend 'cpu' has kernels"):
        adamw_(p, g, moments(p), moments(p), step=1, **SCALARS)


def test_opcheck() -> None:
    p = [torch.randn(9, 5), torch.randn(3)]
    g, m, v = ([torch.rand_like(t) for t in p] for _ in range(3))
    for scale in (None, torch.tensor(0.5)):
        torch.library.opcheck(
            autograd.adamw, (p, g, m, v, scale, 2.0, 1e-3, 0.9, 0.99, 1e-8, 0.1, "cpu")
        )
    torch.library.opcheck(autograd.global_norm, (p, "cpu"))


ONE, HALF = [torch.zeros(3)], [torch.zeros(3, dtype=torch.float16)]


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        ((ONE, [], ONE, ONE), ValueError, "grads has 0 tensors but params has 1"),
        ((ONE, ONE, ONE * 2, ONE), ValueError, "exp_avgs has 2 tensors but params has 1"),
        ((ONE, [None], ONE, ONE), TypeError, r"grads\[0\] must be a torch\.Tensor"),
        ((ONE, [torch.zeros(4)], ONE, ONE), ValueError, r"grads\[0\] must have shape \(3,\)"),
        ((ONE, HALF, ONE, ONE), TypeError, r"grads\[0\] is torch\.float16 but params\[0\] is"),
        ((ONE, ONE, HALF, ONE), TypeError, r"exp_avgs\[0\] must be torch\.float32"),
        ((HALF, HALF, ONE, HALF), TypeError, r"exp_avg_sqs\[0\] must be torch\.float32"),
        (([ONE[0].long()], ONE, ONE, ONE), TypeError, r"params\[0\] must be floating point"),
        ((ONE, [ONE[0].to("meta")], ONE, ONE), ValueError, r"grads\[0\] is on meta"),
    ],
)
def test_wrong_arguments(lists: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adamw_(*lists, step=1, lr=1e-3)


def test_wrong_scalars() -> None:
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        adamw_(ONE, ONE, ONE, ONE, step=0, lr=1e-3)
    with pytest.raises(ValueError, match="grad_scale must have shape"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=1e-3, grad_scale=torch.ones(1))
    with pytest.raises(TypeError, match=r"tensors\[0\] must be a torch\.Tensor"):
        global_norm([1.0])
