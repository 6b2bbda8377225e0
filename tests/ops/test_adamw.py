"""adamw_ and global_norm: the fp64 rule over steps, layouts, errors, opcheck."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast.backends import status
from gpt2fast.functional import adamw_, global_norm
from gpt2fast.ops.adamw import autograd
from gpt2fast.ops.random import random_words
from tests.ops.numerics import DTYPES, assert_deterministic, compare, device_of

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
    masters: bool = False,
    on_device: bool = False,
    **scalars: float,
) -> list[list[Tensor]]:
    """Parameters, moments and masters after the steps that `gradients` gives, from `params`.

    `on_device`: the number of the step and the learning rate are tensors.
    """
    device = device_of(backend)
    params = [p.to(device, dtype, copy=True) for p in params]
    first, second = moments(params), moments(params)
    wide = [p.float() for p in params] if masters else []
    options = {**SCALARS, **scalars, "masters": wide if masters else None}
    if scale is not None:
        options["grad_scale"] = torch.tensor(scale, device=device)
    steps = [torch.zeros((), device=device) for _ in params]
    if on_device:
        options["lr"] = torch.tensor(options["lr"], device=device)
    with gpt2fast.use_backend(backend):
        for number, grads in enumerate(gradients, 1):
            torch._foreach_add_(steps, 1)
            grads = [g.to(device, dtype) for g in grads]
            adamw_(params, grads, first, second, step=steps if on_device else number, **options)
    return [[t.cpu() for t in tensors] for tensors in (params, first, second, wide)]


def draw(dtype: torch.dtype, steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters and gradients of very different sizes, rounded to `dtype`."""
    start = [torch.randn(shape).to(dtype).float() for shape in SHAPES]
    sizes = [10.0 ** float(torch.randint(-4, 3, ())) for _ in SHAPES]
    gradients = [
        [(torch.randn(s) * size).to(dtype).float() for s, size in zip(SHAPES, sizes, strict=True)]
        for _ in range(steps)
    ]
    return start, gradients


def assert_rule(backend: str, dtype: torch.dtype, steps: int = 20, **options: Any) -> None:
    start, gradients = draw(dtype, 6 if backend == "triton" else steps)
    plain = {name: value for name, value in options.items() if name != "on_device"}
    truth = train(start, gradients, "reference", torch.float64, **{**plain, "masters": False})
    expected = train(start, gradients, "reference", dtype, **plain)
    measured = train(start, gradients, backend, dtype, **options)
    truth[3] = truth[0] if measured[3] else []
    for name, m, e, t in zip("pmvw", measured, expected, truth, strict=True):
        for i, (mine, theirs, true) in enumerate(zip(m, e, t, strict=True)):
            compare(f"{name}[{i}]", mine, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.37])
def test_adamw(backend: str, scale: float | None, dtype: torch.dtype) -> None:
    assert_rule(backend, dtype, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("on_device", [False, True])
def test_masters(backend: str, on_device: bool, dtype: torch.dtype) -> None:
    assert_rule(backend, dtype, masters=True, on_device=on_device, scale=0.37)


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_masters_follow_fp32_and_parameters_are_masters_rounded(
    name: str, dtype: torch.dtype
) -> None:
    """The same bits as fp32 parameters with the same gradients, whatever the rounding."""
    if not (found := status(name)).available:
        pytest.skip(found.detail)
    start, gradients = draw(dtype, 5)
    mixed = train(start, gradients, name, dtype, masters=True)
    single = train(start, gradients, name, torch.float32)
    for p, w, q in zip(mixed[0], mixed[3], single[0], strict=True):
        assert torch.equal(w, q)
        assert torch.equal(p, q.to(dtype))


def test_masters_keep_what_half_precision_would_lose(backend: str) -> None:
    """At lr 1e-4, 1.0 in bf16 never moves; its master does, and the parameter with it."""
    count, device = 64, device_of(backend)
    p, g = (torch.ones(40, dtype=torch.bfloat16, device=device) for _ in range(2))
    w, lost, single = p.float(), p.clone(), p.float()
    scalars = {"lr": 1e-4, "weight_decay": 0.0}
    lists, lost_lists, single_lists = ([moments([p]) for _ in range(2)] for _ in range(3))
    with gpt2fast.use_backend(backend):
        for step in range(1, count + 1):
            adamw_([p], [g], *lists, step=step, masters=[w], **scalars)
            adamw_([lost], [g], *lost_lists, step=step, **scalars)
            adamw_([single], [g.float()], *single_lists, step=step, **scalars)
    assert (lost == 1).all()
    assert torch.equal(w, single)
    assert torch.equal(p, w.bfloat16())
    assert (p < 1).all()


def assert_one_step(
    backend: str, lists: list[Tensor], step: int, on_device: bool = False, **options: float
) -> None:
    """The rule for one step on fp32 `lists`: parameter, gradient and both moments."""
    after = []
    for name, dtype in (
        ("reference", torch.float64),
        ("reference", torch.float32),
        (backend, None),
    ):
        device = device_of(name)
        tensors = [[t.to(device, dtype or t.dtype, copy=True)] for t in lists]
        changed: dict[str, Any] = {"step": step, **options}
        if on_device and dtype is None:
            changed["step"] = [torch.tensor(float(step), device=device)]
            changed["lr"] = torch.tensor(options["lr"], device=device)
        with gpt2fast.use_backend(name):
            adamw_(*tensors, **changed)
        after.append([t.cpu() for (t,) in tensors])
    for name, true, theirs, mine in zip("pgmv", *after, strict=True):
        compare(name, mine, theirs, true)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9999)])
def test_bias_correction_on_the_device(backend: str, betas: tuple[float, float], step: int) -> None:
    """1 - beta^step must keep its digits where beta^step is near 1."""
    values, second = torch.randn(64), torch.rand(64)
    lr = torch.tensor(1e-2).item()  # a number of fp32: the truth has no other
    options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": 1e-8, "weight_decay": 0.0}
    lists = [torch.zeros(64), values, values, second]
    assert_one_step(backend, lists, step, on_device=True, **options)


def test_parameters_may_be_at_different_steps(backend: str) -> None:
    device = device_of(backend)
    params = [torch.randn(5, device=device) for _ in range(3)]
    grads = [torch.randn(5, device=device) for _ in range(3)]
    alone = [p.clone() for p in params]
    numbers = (1, 7, 7)
    with gpt2fast.use_backend(backend):
        steps = [torch.tensor(float(n), device=device) for n in numbers]
        adamw_(params, grads, moments(params), moments(params), step=steps, **SCALARS)
        for p, g, n in zip(alone, grads, numbers, strict=True):
            adamw_([p], [g], moments([p]), moments([p]), step=n, **SCALARS)
    for p, q in zip(params, alone, strict=True):
        # One ulp: an update of 1e-3 of the parameter may fall on the other side of a half.
        torch.testing.assert_close(p, q, rtol=torch.finfo(p.dtype).eps, atol=0)


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
def test_scalars(backend: str, scalars: dict[str, float]) -> None:
    assert_rule(backend, torch.float32, **scalars)


@pytest.mark.parametrize("size", [1023, 1024, 8191, 8192, 8193, 16383, 16385, 40_000])
def test_sizes_about_a_chunk(backend: str, size: int) -> None:
    p, g = torch.randn(size), torch.randn(size)
    assert_one_step(backend, [p, g, *moments([p, p])], 1, **SCALARS)
    device = device_of(backend)
    with gpt2fast.use_backend(backend):
        norm = global_norm([g.to(device), g[:5].to(device)])
    true = torch.cat([g, g[:5]]).double().norm()
    assert abs(norm.cpu().double() / true - 1) < 1e-7


def test_misaligned_tensors(backend: str) -> None:
    """Addresses that are no multiples of 16 bytes, beside those that are; neighbours stay."""
    device = device_of(backend)
    for dtype in DTYPES:
        flat = torch.randn(4000, device=device).to(dtype)
        before = flat.clone()
        params = [flat[1:1501], flat[1600:2600], flat[2603:3603]]
        grads = [torch.randn_like(p) for p in params]
        alone = [p.clone() for p in params]
        lists = [moments(params) for _ in range(2)]
        with gpt2fast.use_backend(backend):
            adamw_(params, grads, *lists, step=1, **SCALARS)
            adamw_(alone, grads, moments(alone), moments(alone), step=1, **SCALARS)
            norm = global_norm([flat[1:], flat[:1]])
        for p, q in zip(params, alone, strict=True):
            assert torch.equal(p, q)
        for gap in (slice(0, 1), slice(1501, 1600), slice(2600, 2603), slice(3603, 4000)):
            assert torch.equal(flat[gap], before[gap])
        assert abs(norm.cpu().double() / flat.cpu().double().norm() - 1) < 1e-7


def test_second_moment_settles_where_it_should(backend: str) -> None:
    """1 - 0.999 must not be rounded as fp32(1) - fp32(0.999), which misses by 1e-5."""
    count = 200 if backend == "triton" else 2000
    with device_of(backend), gpt2fast.use_backend(backend):
        p, g = [torch.zeros(64)], [torch.ones(64)]
        first, second = moments(p), moments(p)
        for step in range(1, count + 1):
            adamw_(p, g, first, second, step=step, **{**SCALARS, "beta2": 0.999})
    true = 1 - 0.999**count
    assert abs(second[0].cpu().double() / true - 1).max() < 3e-6  # rounding of 2000 sums


@pytest.mark.parametrize("step", [1, 10, 10**6])
def test_late_step(backend: str, step: int) -> None:
    """Bias corrections of 1 and tiny ones."""
    lists = [torch.randn(100), torch.randn(100), torch.randn(100), torch.rand(100)]
    assert_one_step(backend, lists, step, **SCALARS)


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
def test_layouts(backend: str, name: str) -> None:
    device = device_of(backend)
    laid = []
    for t in layouts()[name]:
        copy = torch.empty_strided(t.shape, t.stride(), device=device)
        if 0 in t.stride():
            copy = torch.rand(t.shape[1], device=device).expand(t.shape)
        else:
            copy.copy_(torch.rand(t.shape) + 0.1)
        laid.append(copy)
    plain = [t.contiguous().clone() for t in laid]
    storage = torch.empty(0, device=device).set_(laid[0].untyped_storage())
    before = storage.clone()
    with gpt2fast.use_backend(backend):
        for step in (1, 2, 3):
            for lists in (laid, plain):
                adamw_(*([t] for t in lists), step=step, **SCALARS)
    for mine, theirs in zip(laid, plain, strict=True):
        assert torch.equal(mine, theirs)
    if name == "strided parameter":  # the elements between are not ours
        assert torch.equal(before[1::2], storage[1::2])
        assert not torch.equal(before, storage)


def test_masters_in_any_layout(backend: str) -> None:
    with device_of(backend), gpt2fast.use_backend(backend):
        p = torch.randn(7, 5).bfloat16().t()
        g, w = torch.randn(5, 7).bfloat16(), p.float().contiguous()
        q, plain = p.clone().contiguous(), w.clone()
        adamw_([p], [g], moments([p]), moments([p]), step=1, masters=[w], **SCALARS)
        adamw_([q], [g], moments([q]), moments([q]), step=1, masters=[plain], **SCALARS)
    assert torch.equal(p, q)
    assert torch.equal(w, plain)


def test_tensors_of_several_dtypes_in_one_call(backend: str) -> None:
    for order in (DTYPES, DTYPES[::-1]):
        with device_of(backend), gpt2fast.use_backend(backend):
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


def test_versions_are_counted(backend: str) -> None:
    """Autograd must see that a saved parameter has changed."""
    with device_of(backend), gpt2fast.use_backend(backend):
        p = torch.randn(4, requires_grad=True)
        loss = (p * p).sum()
        with torch.no_grad():
            adamw_([p], [torch.ones(4)], moments([p]), moments([p]), step=1, **SCALARS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_deterministic(backend: str) -> None:
    start, gradients = draw(torch.float32, 2)

    def run() -> list[Tensor]:
        trained = train(start, gradients, backend, torch.float32, 0.5)
        with gpt2fast.use_backend(backend):
            norm = global_norm([t.to(device_of(backend)) for t in start])
        return [t.reshape(-1) for t in (*chain(*trained), norm.cpu())]

    assert_deterministic(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm(backend: str, dtype: torch.dtype) -> None:
    with device_of(backend), gpt2fast.use_backend(backend):
        tensors = [torch.randn(shape).to(dtype) for shape in (*SHAPES, (40_000,), (16_385,))]
        tensors.append(torch.randn(40, 30).to(dtype).t())
        tensors.append(torch.randn(40, 30).to(dtype)[:, ::3])
        tensors.append(torch.randn(30).to(dtype).expand(40, 30))
        true = torch.cat([t.double().flatten() for t in tensors]).norm()
        norm = global_norm(tensors)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(norm.double() / true - 1) < 1e-7


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in Triton's interpreter
def test_global_norm_of_extreme_values(backend: str) -> None:
    with device_of(backend), gpt2fast.use_backend(backend):
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


def test_opcheck(backend: str) -> None:
    with device_of(backend):
        p = [torch.randn(9, 5).bfloat16(), torch.randn(3).bfloat16()]
        g = [torch.rand_like(t) for t in p]
        m, v, w = ([torch.rand_like(t, dtype=torch.float32) for t in p] for _ in range(3))
        scalar, steps = torch.tensor(0.5), [torch.tensor(2.0), torch.tensor(3.0)]
        seed = torch.tensor(7)
    scalars = (2.0, 1e-3, 0.9, 0.99, 1e-8, 0.1, backend)
    for extra in (
        ([], [], None, None, None),
        (w, [], None, scalar, None),
        (w, steps, scalar, scalar, None),
        ([], steps, scalar, scalar, seed),
    ):
        torch.library.opcheck(autograd.adamw, (p, g, m, v, *extra, *scalars))
    torch.library.opcheck(autograd.global_norm, (p, backend))


def test_compiles(backend: str) -> None:
    def step(params: list[Tensor], grads: list[Tensor], *rest: Tensor) -> Tensor:
        count, rate, *others = rest
        m, v, w = others[:2], others[2:4], others[4:]
        norm = global_norm(grads)
        options = {**SCALARS, "lr": rate, "masters": w, "grad_scale": 1 / norm}
        adamw_(params, grads, m, v, step=[count, count], **options)
        return norm

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        with device_of(backend), gpt2fast.use_backend(backend):
            params = [torch.randn(9, 5).bfloat16(), torch.randn(3).bfloat16()]
            grads = [torch.randn_like(p) for p in params]
            rest = [torch.tensor(2.0), torch.tensor(1e-2), *moments(params), *moments(params)]
            masters = [p.float() for p in params]
            norm = call(params, grads, *rest, *masters)
        results.append([norm, *params, *rest, *masters])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


# With these, gradients of 1 take lr off parameters, whatever they were: in one rounding to fp32.
EXACT = {"beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}


def rounded(
    backend: str,
    params: list[Tensor],
    lr: float,
    seed: int = 5,
    step: int = 3,
    on_device: bool = False,
    **options: Any,
) -> list[Tensor]:
    """`params` less lr, rounded stochastically: one step with gradients of 1, in exact arithmetic."""
    device = device_of(backend)
    params = [p.to(device, copy=True) for p in params]
    grads = [torch.ones_like(p) for p in params]
    number: Any = [torch.tensor(float(step), device=device) for _ in params] if on_device else step
    word = torch.tensor(seed, device=device)
    options = {**EXACT, "lr": lr, "step": number, "rounding_seed": word, **options}
    with gpt2fast.use_backend(backend):
        adamw_(params, grads, moments(params), moments(params), **options)
    return [p.cpu() for p in params]


def bf16s(*shape: int) -> Tensor:
    """Random bf16 numbers in [1, 2)."""
    return (1 + torch.rand(shape)).bfloat16().clamp(max=1.99)


@pytest.mark.parametrize("on_device", [False, True])
def test_stochastic_rounding_has_the_same_bits_everywhere(backend: str, on_device: bool) -> None:
    """Tensors about the sizes of chunks, off 16 bytes, transposed and empty, beside one in fp32."""
    flat = bf16s(3000)
    params = [bf16s(8191), flat[1:1500], bf16s(0), bf16s(7, 5).t(), torch.randn(9), bf16s(8193)]
    params += [bf16s(3) for _ in range(130)]  # more than a launch takes
    mine, theirs = (
        rounded(name, params, 0.3 / 128, step=70_000, on_device=on_device, seed=-(2**62) + 3)
        for name in (backend, "reference")
    )
    for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(p, q), i


@pytest.mark.parametrize("share", [0.0, 1 / 65536, 0.25, 0.5, 0.875, 65535 / 65536])
def test_stochastic_rounding_is_unbiased(backend: str, share: float) -> None:
    """Above 1 a step of `share` places goes down one place with this probability: where 16 bits
    that are alike likely are below it."""
    count, place = 200_000, 2.0**-7
    (p,) = rounded(backend, [torch.full((count,), 1.5, dtype=torch.bfloat16)], share * place)
    zero, step = torch.zeros((), dtype=torch.int64), torch.tensor(3)
    words = random_words(torch.tensor(5), step, zero, zero, torch.arange(count))
    assert torch.equal(p, torch.where(words >> 16 < share * 65536, 1.5 - place, 1.5).bfloat16())
    down = (p < 1.5).double()
    assert abs(down.mean() - share) <= 5 * math.sqrt(share * (1 - share) / count)


def test_stochastic_rounding_draws_anew(backend: str) -> None:
    """Elements, tensors, steps and seeds are independent; negative numbers are their positive ones."""
    count, place = 100_000, 2.0**-7
    p = torch.full((count,), 1.5, dtype=torch.bfloat16)
    one, two = (t == 1.5 for t in rounded(backend, [p, p], place / 2))
    (step,) = (t == 1.5 for t in rounded(backend, [p], place / 2, step=4))
    (seed,) = (t == 1.5 for t in rounded(backend, [p], place / 2, seed=6))
    (high,) = (t == 1.5 for t in rounded(backend, [p], place / 2, seed=5 + (1 << 32)))
    limit = 5 * math.sqrt(0.25 / count)
    for other in (two, step, seed, high, one.roll(1), one.roll(2), one.roll(256)):
        assert abs((one == other).double().mean() - 0.5) < limit
    (again,) = (t == 1.5 for t in rounded(backend, [p], place / 2))
    assert torch.equal(one, again)
    (negative,) = rounded(backend, [-p], -place / 2)  # away from 0 as above
    assert torch.equal(-negative == 1.5, one)


def test_stochastic_rounding_of_special_values(backend: str) -> None:
    p = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-120, 2.0**127 * (2 - 2**-7)]).bfloat16()
    assert torch.equal(rounded(backend, [p], 0.0)[0], p)
    for sign in (1, -1):
        assert (rounded(backend, [sign * p[-1:]], -sign * 3e38)[0] == sign * math.inf).all()
    quiet = torch.full((1000,), -1, dtype=torch.int32).view(torch.float32)  # all bits of a NaN set
    with gpt2fast.use_backend(backend), device_of(backend):
        p, g = torch.ones(1000).bfloat16(), torch.ones(1000).bfloat16()
        scale = quiet[0].to(p.device)
        seed = torch.tensor(1)
        lists = [p], [g], moments([p]), moments([p])
        adamw_(*lists, step=1, lr=0.1, grad_scale=scale, rounding_seed=seed)
    assert p.isnan().all()


def test_stochastic_rounding_keeps_what_half_precision_would_lose(backend: str) -> None:
    """At lr 1e-4, 1.0 in bf16 never moves by rounding to nearest; so it does in the mean."""
    count, size, device = 40, 20_000, device_of(backend)
    p, g = (torch.ones(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    lists = [p], [g], moments([p]), moments([p])
    seed = torch.tensor(0, device=device)
    with gpt2fast.use_backend(backend):
        for step in range(1, count + 1):
            adamw_(*lists, step=step, lr=1e-4, weight_decay=0.0, rounding_seed=seed)
    # Below 1 a place is 2^-8. Each element has fallen by a binomial number of places.
    share = 1e-4 * 2**8
    deviation = math.sqrt(count * share * (1 - share) / size) / 2**8
    assert abs(p.double().mean() - (1 - count * 1e-4)) < 5 * deviation
    truth = count * share * (1 - share) / 2**16
    assert abs(p.double().var() / truth - 1) < 5 * math.sqrt(3 / size)


@pytest.mark.parametrize("scale", [None, 0.37])
def test_stochastic_rounding_rounds_the_right_number(backend: str, scale: float | None) -> None:
    """Parameters are neighbours of the exact ones, moments as without."""
    start, gradients = draw(torch.bfloat16, 1)
    truth = train(start, gradients, "reference", torch.float64, scale)
    plain = train(start, gradients, backend, torch.bfloat16, scale)
    seed = torch.tensor(11, device=device_of(backend))
    found = train(start, gradients, backend, torch.bfloat16, scale, rounding_seed=seed)
    assert any(not torch.equal(p, q) for p, q in zip(plain[0], found[0], strict=True))
    for m, n in zip(chain(*plain[1:3]), chain(*found[1:3]), strict=True):
        assert torch.equal(m, n)
    for p, true in zip(found[0], truth[0], strict=True):
        place = 2.0 ** (true.abs().clamp(min=2.0**-126).log2().floor() - 7)
        # fp32's own rounding may move a number over a neighbour by its error
        assert ((p.double() - true).abs() < place * (1 + 2.0**-12)).all()


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
    with pytest.raises(ValueError, match="lr must have shape"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=torch.ones(1))
    with pytest.raises(ValueError, match="step has 2 tensors but params has 1"):
        adamw_(ONE, ONE, ONE, ONE, step=[torch.ones(())] * 2, lr=1e-3)
    with pytest.raises(TypeError, match=r"step\[0\] must be torch\.float32, got torch\.int64"):
        adamw_(ONE, ONE, ONE, ONE, step=[torch.tensor(1)], lr=1e-3)
    seed = torch.tensor(1)
    with pytest.raises(
        TypeError, match=r"rounding_seed is for bfloat16 parameters, but params\[0\]"
    ):
        adamw_(HALF, HALF, ONE, ONE, step=1, lr=1e-3, rounding_seed=seed)
    with pytest.raises(TypeError, match=r"rounding_seed must be torch\.int64, got torch\.int32"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=1e-3, rounding_seed=seed.int())
    with pytest.raises(TypeError, match=r"rounding_seed must be a torch\.Tensor, got int"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=1e-3, rounding_seed=5)
    with pytest.raises(TypeError, match=r"grad_scale must be a torch\.Tensor, got float"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=1e-3, grad_scale=0.5)
    with pytest.raises(ValueError, match=r"rounding_seed must have shape \(\)"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=1e-3, rounding_seed=seed[None])
    with pytest.raises(ValueError, match="rounding_seed is on meta"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=1e-3, rounding_seed=seed.to("meta"))
    with pytest.raises(ValueError, match="rounding_seed is for parameters without masters"):
        adamw_(HALF, HALF, ONE, ONE, step=1, lr=1e-3, masters=ONE, rounding_seed=seed)
    with pytest.raises(TypeError, match=r"masters are for bfloat16 and float16 parameters"):
        adamw_(ONE, ONE, ONE, ONE, step=1, lr=1e-3, masters=ONE)
    with pytest.raises(ValueError, match="masters has 0 tensors but params has 1"):
        adamw_(HALF, HALF, ONE, ONE, step=1, lr=1e-3, masters=[])
    with pytest.raises(TypeError, match=r"tensors\[0\] must be a torch\.Tensor"):
        global_norm([1.0])
