"""gpt2fast.optim.AdamW against torch.optim.AdamW."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast.optim import AdamW
from tests.ops.numerics import device_of

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def groups(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> list[dict[str, Any]]:
    """GPT-2's two groups on a few odd tensors, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(65, 33), (7,), (300,), (1025, 3), ()]
    values = [torch.randn(s, generator=generator) for s in shapes]
    params = [value.to(device, dtype).requires_grad_() for value in values]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "lr": 1e-3},
    ]


def flat(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.3).to(p.device, p.dtype)


def run(optimizer: torch.optim.Optimizer, first: int, last: int, clip: float | None) -> None:
    for step in range(first, last):
        set_gradients(flat(optimizer), step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(flat(optimizer), clip)
        optimizer.step()


@functools.cache
def trained_by_torch(dtype: torch.dtype | None, max_norm: float | None, last: int) -> list[Tensor]:
    optimizer = torch.optim.AdamW(groups(dtype or torch.float32), **OPTIONS)
    run(optimizer, 0, last, max_norm)
    return flat(optimizer)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
def test_follows_torch_over_many_steps(
    backend: str, max_norm: float | None, capturable: bool
) -> None:
    last = 10 if backend == "triton" else 60
    options = {**OPTIONS, "max_norm": max_norm, "capturable": capturable}
    with gpt2fast.use_backend(backend):
        ours = AdamW(groups(device=device_of(backend)), **options)
        run(ours, 0, last, None)
    truth = trained_by_torch(torch.float64, max_norm, last)
    theirs = trained_by_torch(None, max_norm, last)
    for p, q, t in zip(flat(ours), theirs, truth, strict=True):
        error, reference = (p.cpu() - t).abs().max(), (q - t).abs().max()
        assert error <= 2 * reference + 3e-7 * t.abs().max()
        state = ours.state[p]
        assert state["step"] == last
        assert state["step"].device == (p.device if capturable else torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capturable", [False, True])
def test_master_weights(backend: str, capturable: bool, dtype: torch.dtype) -> None:
    """Masters take the very steps of fp32 parameters with the same gradients, and parameters are
    the masters rounded; fp32 parameters beside them have none."""
    device = device_of(backend)
    mixed, single = groups(dtype, device), groups(dtype, device)
    single[0]["params"] = [p.detach().float().requires_grad_() for p in single[0]["params"]]
    single[1]["params"] = [p.detach().float().requires_grad_() for p in single[1]["params"]]
    mixed[1]["params"][0] = single[1]["params"][0].detach().clone().requires_grad_()
    options = {**OPTIONS, "max_norm": 1.0, "capturable": capturable}
    with gpt2fast.use_backend(backend):
        ours = AdamW(mixed, master_weights=True, **options)
        theirs = AdamW(single, **options)
        for step in range(5):
            set_gradients(flat(ours), step)
            for p, q in zip(flat(ours), flat(theirs), strict=True):
                q.grad = p.grad.float()
            ours.step()
            theirs.step()
    assert "master" not in ours.state[mixed[1]["params"][0]]
    for p, q in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(p, q.to(p.dtype))
        assert torch.equal(ours.state[p].get("master", p), q)
        assert ours.state[p].get("master", p).dtype == torch.float32


def test_masters_survive_a_state_dict() -> None:
    """Also one that PyTorch's loading rounds; torch takes a state with masters, and we one without."""
    options = {**OPTIONS, "max_norm": 1.0, "master_weights": True}
    whole, first, second = (AdamW(groups(torch.bfloat16), **options) for _ in range(3))
    run(whole, 0, 10, None)
    run(first, 0, 5, None)
    for p, q in zip(flat(second), flat(first), strict=True):
        p.data.copy_(q.data)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(copy.deepcopy(saved))
    run(second, 5, 10, None)
    for p, q in zip(flat(second), flat(whole), strict=True):
        assert torch.equal(second.state[p]["master"], whole.state[q]["master"])
        assert torch.equal(p, q)
    theirs = torch.optim.AdamW(groups(torch.bfloat16), **OPTIONS)
    theirs.load_state_dict(copy.deepcopy(saved))
    run(theirs, 5, 6, None)
    assert theirs.state[flat(theirs)[0]]["step"] == 6
    back = AdamW(groups(torch.bfloat16), **options)
    del saved["state"][0]["master"]
    back.load_state_dict(saved)
    run(back, 5, 6, None)
    p = flat(back)[0]
    assert torch.equal(back.state[p]["master"].bfloat16(), p)
    without = AdamW(groups(torch.bfloat16), **OPTIONS)
    without.load_state_dict(copy.deepcopy(first.state_dict()))
    assert not any("master" in without.state[p] for p in flat(without))
    run(without, 5, 6, None)


@pytest.mark.parametrize("capturable", [False, True])
def test_state_of_a_capturable_optimizer(backend: str, capturable: bool) -> None:
    """A state goes between capturable and not, and to torch."""
    device = device_of(backend)
    with gpt2fast.use_backend(backend):
        first = AdamW(groups(device=device), **OPTIONS, capturable=capturable)
        run(first, 0, 3, None)
        second = AdamW(groups(device=device), **OPTIONS, capturable=not capturable)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for p, q in zip(flat(second), flat(first), strict=True):
            p.data.copy_(q.data)
        run(first, 3, 5, None)
        run(second, 3, 5, None)
    theirs = torch.optim.AdamW(groups(device=device), **OPTIONS)
    theirs.load_state_dict(copy.deepcopy(second.state_dict()))
    run(theirs, 5, 6, None)
    for p, q, r in zip(flat(first), flat(second), flat(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert second.state[q]["step"] == 5
        assert theirs.state[r]["step"] == 6


def test_learning_rate_on_the_device(backend: str) -> None:
    device = device_of(backend)
    rate = torch.tensor(0.1, device=device)
    p = torch.tensor([3.0], device=device, requires_grad=True)
    with gpt2fast.use_backend(backend):
        optimizer = AdamW([p], lr=rate, weight_decay=0.0, capturable=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert abs(p.item() - 2.9) < 1e-5
        rate.fill_(0.5)
        optimizer.step()
    assert abs(p.item() - 2.4) < 1e-5


def test_state_may_be_replaced_between_steps(backend: str) -> None:
    """Nothing that is kept from step to step is believed when the state has changed."""
    device = device_of(backend)
    with gpt2fast.use_backend(backend):
        ours, fresh = (AdamW(groups(device=device), **OPTIONS) for _ in range(2))
        run(ours, 0, 2, None)
        for p, q in zip(flat(fresh), flat(ours), strict=True):
            p.data.copy_(q.data)
        ours.state.clear()
        for p in flat(ours):
            p.data = p.data.clone()
        run(ours, 2, 4, None)
        run(fresh, 2, 4, None)
        state = ours.state[flat(ours)[0]]
        state["step"] = torch.tensor(10.0)
        state["exp_avg"] = state["exp_avg"].double()
        set_gradients(flat(ours), 4)
        with pytest.raises(TypeError, match=r"exp_avgs\[0\] must be torch\.float32"):
            ours.step()
    for p, q in zip(flat(ours), flat(fresh), strict=True):
        assert torch.equal(p, q)
    assert state["step"] == 11


@pytest.mark.parametrize("capturable", [False, True])
def test_stochastic_rounding(backend: str, capturable: bool) -> None:
    """Steps far below bf16's last place add up in the mean, without a master; fp32 beside stays."""
    device, size, count, lr = device_of(backend), 20_000, 30, 1e-4
    halves = [torch.ones(size, dtype=torch.bfloat16, device=device) for _ in range(2)]
    single = torch.ones(5, device=device)
    start = [{"params": [halves[0], single]}, {"params": [halves[1]]}]
    options = {"lr": lr, "weight_decay": 0.0, "capturable": capturable}
    with gpt2fast.use_backend(backend):
        ours = AdamW(start, stochastic_rounding=True, **options)
        for _ in range(count):
            for p in flat(ours):
                p.grad = torch.ones_like(p)
            ours.step()
    torch.testing.assert_close(single.cpu(), torch.full((5,), 1 - count * lr))
    share = lr * 2**8  # of a place below 1
    deviation = (count * share * (1 - share) / size) ** 0.5 / 2**8
    for p in halves:
        assert abs(p.double().mean() - (1 - count * lr)) < 5 * deviation
        assert set(ours.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    same = (halves[0] == halves[1]).double().mean()  # groups draw apart
    assert same < 0.9


@pytest.mark.parametrize("capturable", [False, True])
def test_stochastic_rounding_is_repeated_by_a_resumed_run(capturable: bool) -> None:
    """Another optimiser with the state, and one that torch has loaded, go on with the same bits."""
    options = {**OPTIONS, "stochastic_rounding": True, "capturable": capturable}
    whole, first, second = (AdamW(groups(torch.bfloat16), **options) for _ in range(3))
    plain = AdamW(groups(torch.bfloat16), **OPTIONS, capturable=capturable)
    for optimizer, last in ((whole, 8), (first, 5), (plain, 8)):
        run(optimizer, 0, last, None)
    for p, q in zip(flat(second), flat(first), strict=True):
        p.data.copy_(q)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, 5, 8, None)
    twin = copy.deepcopy(first)
    run(twin, 5, 8, None)
    for p, q, r in zip(*map(flat, (whole, second, twin)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    assert not all(torch.equal(p, q) for p, q in zip(flat(whole), flat(plain), strict=True))
    torch.optim.AdamW(groups(torch.bfloat16)).load_state_dict(whole.state_dict())


def test_copies_keep_their_options() -> None:
    ours = AdamW(groups(torch.bfloat16), **OPTIONS, max_norm=1.0, master_weights=True)
    run(ours, 0, 2, None)
    twin = copy.deepcopy(ours)
    run(ours, 2, 4, None)
    run(twin, 2, 4, None)
    for p, q in zip(flat(ours), flat(twin), strict=True):
        assert torch.equal(p, q)
        assert twin.state[q]["step"] == 4


def test_what_a_cuda_graph_cannot_hold_is_refused() -> None:
    params = groups()[0]["params"]
    with pytest.raises(RuntimeError, match="capturable=True"):
        AdamW(params)._check_capture([params])
    optimizer = AdamW(params, capturable=True)
    with pytest.raises(RuntimeError, match="take a step before"):
        optimizer._check_capture([params])
    set_gradients(params, 0)
    optimizer.step()
    optimizer._check_capture([params])
    rounding = AdamW(params, capturable=True, stochastic_rounding=True)
    rounding.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="take a step before"):  # its seed is made there
        rounding._check_capture([params])


def test_a_pickle_from_before_stochastic_rounding() -> None:
    optimizer = AdamW(groups()[0]["params"])
    state = optimizer.__getstate__()
    del state["stochastic_rounding"]
    old = AdamW.__new__(AdamW)
    old.__setstate__(state)
    set_gradients(flat(old), 0)
    old.step()
    assert all(old.state[p]["step"] == 1 for p in flat(old))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float32, "master_weights"),
        (torch.bfloat16, "master_weights"),
        (torch.bfloat16, "stochastic_rounding"),
    ],
)
def test_step_in_a_cuda_graph(dtype: torch.dtype, kept: str) -> None:
    """Gradients are made within the graph, so their addresses are new to the optimiser there."""
    options = {**OPTIONS, "max_norm": 1.0, kept: True}
    eager, graphed = (
        AdamW(groups(dtype, "cuda"), **options, capturable=capturable)
        for capturable in (False, True)
    )
    sources = [torch.zeros_like(p) for p in flat(graphed)]

    def step() -> None:
        for p, source in zip(flat(graphed), sources, strict=True):
            p.grad = source * 1
        graphed.step()

    graph = torch.cuda.CUDAGraph()
    for number in range(6):
        set_gradients(flat(eager), number)
        for p, source in zip(flat(eager), sources, strict=True):
            source.copy_(p.grad)
        eager.step()
        if number == 1:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step()
            torch.cuda.synchronize()
        if number == 0:
            step()
        else:
            graph.replay()
        for p, q in zip(flat(eager), flat(graphed), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


def test_fp64_agrees_with_torch() -> None:
    ours = AdamW(groups(torch.float64), **OPTIONS, max_norm=1.0)
    theirs = torch.optim.AdamW(groups(torch.float64), **OPTIONS)
    run(ours, 0, 50, None)
    run(theirs, 0, 50, 1.0)
    for p, q in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_gradients_are_not_written_and_the_norm_is_given(backend: str) -> None:
    ours = AdamW(groups(device=device_of(backend)), **OPTIONS, max_norm=1.0)
    assert ours.grad_norm is None
    set_gradients(flat(ours), 0)
    before = [p.grad.clone() for p in flat(ours)]
    with gpt2fast.use_backend(backend):
        ours.step()
    for p, kept in zip(flat(ours), before, strict=True):
        assert torch.equal(p.grad, kept)
    torch.testing.assert_close(ours.grad_norm, torch.cat([g.flatten() for g in before]).norm())


def test_infinite_max_norm_measures_only() -> None:
    plain, measuring = AdamW(groups(), **OPTIONS), AdamW(groups(), max_norm=torch.inf, **OPTIONS)
    for optimizer in (plain, measuring):
        run(optimizer, 0, 3, None)
    assert plain.grad_norm is None
    assert measuring.grad_norm > 0
    for p, q in zip(flat(plain), flat(measuring), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_goes_from_one_class_to_the_other(ours_first: bool) -> None:
    """20 steps in one class, its state into the other, 20 more: as 40 steps of torch."""

    def torch_adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups(), **OPTIONS)

    def our_adamw() -> torch.optim.Optimizer:
        return AdamW(groups(), **OPTIONS)

    make_first, make_second = (our_adamw, torch_adamw) if ours_first else (torch_adamw, our_adamw)
    first, second, whole = make_first(), make_second(), torch_adamw()
    run(first, 0, 20, None)
    for p, q in zip(flat(second), flat(first), strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, 20, 40, None)
    run(whole, 0, 40, None)
    assert second.param_groups[1]["lr"] == 1e-3
    assert second.state_dict()["state"].keys() == whole.state_dict()["state"].keys()
    for p, q in zip(flat(second), flat(whole), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        state, expected = second.state[p], whole.state[q]
        assert state.keys() == expected.keys()
        assert state["step"] == expected["step"] == 40
        assert state["step"].dtype == expected["step"].dtype
        torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype: torch.dtype) -> None:
    whole, first, second = (AdamW(groups(dtype), **OPTIONS, max_norm=1.0) for _ in range(3))
    run(whole, 0, 10, None)
    run(first, 0, 5, None)
    for p, q in zip(flat(second), flat(first), strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, 5, 10, None)
    for p, q in zip(flat(second), flat(whole), strict=True):
        assert second.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(p, q)


def test_options_that_are_not_offered_are_refused_on_load() -> None:
    theirs = torch.optim.AdamW(groups(), amsgrad=True)
    run(theirs, 0, 1, None)
    with pytest.raises(ValueError, match="amsgrad=True"):
        AdamW(groups()).load_state_dict(theirs.state_dict())


def test_missing_gradients_are_skipped_and_steps_may_differ() -> None:
    ours, theirs = AdamW(groups(), **OPTIONS), torch.optim.AdamW(groups(), **OPTIONS)
    for optimizer in (ours, theirs):
        for step in range(4):
            set_gradients(flat(optimizer), step)
            if step < 2:
                flat(optimizer)[0].grad = None
            optimizer.step()
    assert ours.state[flat(ours)[0]]["step"] == 2
    assert ours.state[flat(ours)[1]]["step"] == 4
    for p, q in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_no_gradient_at_all() -> None:
    ours = AdamW(groups(), max_norm=1.0)
    ours.step()
    assert ours.grad_norm == 0
    assert not ours.state


def test_not_finite_gradient_behaves_as_torch() -> None:
    ours, theirs = AdamW(groups(), max_norm=1.0), torch.optim.AdamW(groups())
    for optimizer in (ours, theirs):
        set_gradients(flat(optimizer), 0)
        flat(optimizer)[0].grad[0, 0] = torch.nan
    torch.nn.utils.clip_grad_norm_(flat(theirs), 1.0)
    ours.step()
    theirs.step()
    assert ours.grad_norm.isnan()
    for p, q in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(p.isnan(), q.isnan())


def test_a_closure_is_measured_anew() -> None:
    """Its gradients are others than those that `measure` saw."""
    p = torch.tensor([3.0], requires_grad=True)
    optimizer = AdamW([p], max_norm=1.0)
    p.grad = torch.tensor([100.0])
    assert optimizer.measure() == 100

    def closure() -> Tensor:
        p.grad = torch.tensor([2.0])
        return p.detach()

    optimizer.step(closure)
    assert optimizer.grad_norm == 2


def test_closure_and_scheduler_and_tensor_lr() -> None:
    p = torch.tensor([3.0], requires_grad=True)
    optimizer = AdamW([p], lr=torch.tensor(0.1), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert abs(p.item() - 2.9) < 1e-5
    schedule.step()
    optimizer.step(closure)
    assert abs(p.item() - 2.85) < 1e-3


def test_named_parameters_and_layouts() -> None:
    model = torch.nn.Linear(4, 6)
    model.weight = torch.nn.Parameter(torch.randn(4, 6).t())
    twin = copy.deepcopy(model)
    ours = AdamW(model.named_parameters(), **OPTIONS)
    theirs = torch.optim.AdamW(twin.named_parameters(), **OPTIONS)
    x = torch.randn(3, 4)
    for net, optimizer in ((model, ours), (twin, theirs)):
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_reference_backend_gives_the_same() -> None:
    ours, reference = (AdamW(groups(), **OPTIONS, max_norm=1.0) for _ in range(2))
    run(ours, 0, 10, None)
    with gpt2fast.use_backend("reference"):
        run(reference, 0, 10, None)
    for p, q in zip(flat(ours), flat(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"lr": float("nan")}, "lr must not be negative, got nan"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0 and below 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be at least 0 and below 1"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"max_norm": 0.0}, "max_norm must be positive or None, got 0.0"),
        ({"master_weights": True, "stochastic_rounding": True}, "master_weights lose nothing"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([torch.zeros(3, requires_grad=True)], **options)


def test_stochastic_rounding_is_for_bfloat16() -> None:
    half = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    with pytest.raises(TypeError, match=r"is for bfloat16 parameters, got torch\.float16"):
        AdamW([half], stochastic_rounding=True)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"parameters must be floating point, got torch\.complex64"):
        AdamW([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
