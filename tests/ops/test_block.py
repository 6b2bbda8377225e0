"""The transformer block as one op: the fp64 rule, the bits of its ops one by one, who is left out."""

import copy
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import gpt2fast
import gpt2fast.nn as fast
from gpt2fast import backends
from gpt2fast.ops.block import autograd, cpu, functional, reference
from gpt2fast.ops.linear import cpu as linear_cpu
from tests.ops.numerics import assert_accurate, assert_deterministic

NAMES = [name for name, _ in autograd.NAMES]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products go to the kernel on every machine."""
    monkeypatch.setenv("GPT2FAST_CPU_MATMUL", "kernel")
    linear_cpu.preferred.cache_clear()
    yield
    linear_cpu.preferred.cache_clear()


def inputs(
    batch: int, length: int, width: int, hidden: int | None = None, bias: bool = True
) -> dict[str, Tensor | None]:
    hidden = hidden or 4 * width
    shapes = {
        "attn": (3 * width, width),
        "proj": (width, width),
        "fc": (hidden, width),
        "out": (width, hidden),
    }
    given: dict[str, Tensor | None] = {
        "x": torch.randn(batch, length, width),
        "branch": torch.randn(batch, length, width),
    }
    for name, layer in ((name, name.rpartition("_")[0]) for name in NAMES):
        if layer in shapes:
            rows, columns = shapes[layer]
            matrix = torch.randn(rows, columns) / columns**0.5
            given[name] = matrix if name.endswith("weight") else torch.randn(rows)
        else:
            given[name] = 1 + 0.3 * torch.randn(width)
        if not bias and name.endswith("bias"):
            given[name] = None
    return given


def block(
    x: Tensor, branch: Tensor | None, n_head: int, dropouts: Any = (0.0, 0.0, 0.0), **given: Any
) -> tuple[Tensor, Tensor]:
    """The op, or within `use_backend("reference")` the reference, with one seed for both."""
    parameters = [given[name] for name in NAMES]
    torch.manual_seed(5)
    if backends._forced == "reference":
        seeds = torch.randint(2**63 - 1, (3,)) if any(dropouts) else None
        return reference.block(x, branch, *parameters, seeds, n_head, 1e-5, 1e-3, *dropouts)
    found = functional.block(x, branch, parameters, n_head, 1e-5, 1e-3, dropouts)
    assert found is not None
    return found


SHAPES = [(2, 17, 48, 3), (1, 1, 32, 2), (3, 97, 80, 5), (2, 113, 24, 1), (1, 3, 768, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block(isa: str, shape: tuple[int, int, int, int]) -> None:
    *sizes, n_head = shape
    assert_accurate(block, {**inputs(*sizes), "n_head": n_head})


@pytest.mark.parametrize("hidden", [96, 33])
def test_without_branch_biases_and_with_another_hidden_width(isa: str, hidden: int) -> None:
    given = {**inputs(2, 19, 32, hidden, bias=False), "branch": None, "n_head": 4}
    assert_accurate(block, given)
    assert_accurate(block, {**given, "ln_1_weight": None, "ln_2_weight": None})


def test_more_rows_than_a_chunk(isa: str) -> None:
    assert_accurate(block, {**inputs(5, 257, 16), "n_head": 1})  # 1285: 1024 and 261


@pytest.mark.parametrize(
    "dropouts",
    [(0.2, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.1), (0.3, 0.2, 0.5), (0.0, 1.0, 1.0)],
)
def test_dropout(isa: str, dropouts: tuple[float, float, float]) -> None:
    """The masks are the reference's: a kept element for a dropped one would be far off."""
    given = {**inputs(2, 33, 32), "n_head": 2, "dropouts": dropouts}
    assert_accurate(block, given)
    assert_accurate(block, {**given, "branch": None})


@pytest.mark.parametrize(
    "wanted",
    [
        ["x"],
        ["branch"],
        *([name] for name in NAMES),
        ["x", "fc_weight"],
        ["attn_bias", "ln_1_bias"],
    ],
    ids=str,
)
def test_only_some_inputs_require_gradients(wanted: list[str]) -> None:
    assert_accurate(block, {**inputs(2, 19, 32), "n_head": 2}, wanted=wanted)


def test_hard_inputs(isa: str) -> None:
    given = {**inputs(2, 33, 32), "n_head": 2}
    mean, peak, wide = (given[name] for name in ("x", "attn_weight", "fc_weight"))
    assert_accurate(block, {**given, "x": mean + 100})  # large mean
    assert_accurate(block, {**given, "attn_weight": 2 * peak})  # peaked softmax
    assert_accurate(block, {**given, "fc_weight": 10 * wide})  # saturated GELU


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_and_zero_strides(which: int) -> None:
    given = {**inputs(2, 19, 32), "n_head": 2}
    leaves = {n: t.requires_grad_() for n, t in given.items() if isinstance(t, Tensor)}
    tensors = list(leaves.values())
    results = []
    for name in ("cpu", "reference"):
        with gpt2fast.use_backend(name):
            part = block(**given)[which].sum()  # the gradient has stride 0
            results.append(torch.autograd.grad(part, tensors, allow_unused=True))
    for ours, theirs in zip(*results, strict=True):
        expected = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_deterministic(isa: str) -> None:
    given = {**inputs(2, 19, 32), "n_head": 2, "dropouts": (0.1, 0.1, 0.1)}
    leaves = {n: t.requires_grad_() for n, t in given.items() if isinstance(t, Tensor)}
    upstream = [torch.randn(2, 19, 32) for _ in range(2)]

    def run() -> list[Tensor]:
        out = block(**given)
        return [t.detach() for t in out] + list(
            torch.autograd.grad(out, list(leaves.values()), upstream)
        )

    assert_deterministic(run)


def test_opcheck(isa: str) -> None:
    given = inputs(1, 5, 16)
    tensors = [given["x"], given["branch"], *(given[name] for name in NAMES)]
    for seeds, dropouts in ((None, (0.0, 0.0, 0.0)), (torch.arange(3), (0.1, 0.2, 0.3))):
        for save in (True, False):
            arguments = (*tensors, seeds, 2, 1e-5, 1e-5, *dropouts, save)
            torch.library.opcheck(autograd.block_forward, arguments)
        total, out, saved = autograd.block_forward(*tensors, seeds, 2, 1e-5, 1e-5, *dropouts, True)
        upstream = (torch.randn_like(total), torch.randn_like(out), None, total, saved)
        for need in ([True] * 13, [False, True] * 6 + [False]):
            arguments = (*upstream, *tensors[2:], seeds, 2, *dropouts, need)
            torch.library.opcheck(autograd.block_backward, arguments)


# ---- the module --------------------------------------------------------------------------------------


def module(dropout: float = 0.0, bias: bool = True) -> fast.Block:
    torch.manual_seed(0)
    made = fast.Block(SimpleNamespace(n_embd=48, n_head=3, dropout=dropout, bias=bias))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


class Calls:
    """Counts how often the op runs within the block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        for name in ("forward", "backward"):
            monkeypatch.setattr(cpu, name, self.counted(name, getattr(cpu, name)))

    def counted(self, name: str, function: Any) -> Any:
        def run(*given: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return function(*given)

        return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def step(block: nn.Module, x: Tensor, branch: Tensor | None = None) -> list[Tensor]:
    """Outputs and all gradients."""
    leaves = [x.detach().clone().requires_grad_()]
    if branch is not None:
        leaves.append(branch.detach().clone().requires_grad_())
    out = block.branches(*leaves)
    upstream = [torch.linspace(-1, 1, o.numel()).view_as(o) for o in out]
    grads = torch.autograd.grad(out, [*leaves, *block.parameters()], upstream)
    return [*(o.detach() for o in out), *grads]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("shape", [(3, 17), (5, 211)])
def test_bits_are_those_of_the_ops_one_by_one(
    isa: str,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    branch: bool,
    bias: bool,
) -> None:
    monkeypatch.setattr(linear_cpu, "WORK", 0)
    made, x = module(bias=bias), torch.randn(*shape, 48)
    other = torch.randn(*shape, 48) if branch else None
    together = step(made, x, other)
    assert (calls.forward, calls.backward) == (1, 1)
    made.ln_2.register_forward_hook(lambda *_: None)
    one_by_one = step(made, x, other)
    assert (calls.forward, calls.backward) == (1, 1)
    for place, (first, second) in enumerate(zip(together, one_by_one, strict=True)):
        if place == 2 and not branch:  # PyTorch adds the residual's gradient, which the norm fuses
            torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(first, second), place


def test_without_gradients(isa: str, calls: Calls) -> None:
    made, x = module(), torch.randn(2, 33, 48)
    expected = [o.detach() for o in made.branches(x)]
    with torch.no_grad():
        for first, second in zip(made.branches(x), expected, strict=True):
            assert torch.equal(first, second)
            assert not first.requires_grad
    made.requires_grad_(False)
    assert torch.equal(made(x), sum(expected))
    assert calls.forward == 3


class Other(fast.MLP):
    pass


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _hook(*_: Any) -> None:
    return None


CHANGES: dict[str, Any] = {
    "forward hook": lambda b: b.attn.c_attn.register_forward_hook(_hook),
    "backward hook": lambda b: b.mlp.register_full_backward_hook(_hook),
    "hook of a dropout": lambda b: b.mlp.dropout.register_forward_pre_hook(_hook),
    "a forward of its own": lambda b: setattr(b.ln_1, "forward", lambda x: 2 * x),
    "a subclass": lambda b: setattr(b.mlp, "__class__", Other),
    "another layer": lambda b: setattr(b.attn, "c_proj", nn.Sequential(b.attn.c_proj)),
    "a parametrized weight": lambda b: parametrize.register_parametrization(
        b.mlp.c_fc, "weight", Doubled()
    ),
    "weights in fp64": lambda b: b.double(),
    "weights in bf16": lambda b: b.bfloat16(),
    "a transposed weight": lambda b: setattr(
        b.mlp.c_fc, "weight", nn.Parameter(b.mlp.c_fc.weight.detach().t().contiguous().t())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_left_to_the_ops(change: str, calls: Calls) -> None:
    made, x = module(), torch.randn(2, 17, 48)
    made.branches(x)
    assert calls.forward == 1
    CHANGES[change](made)
    made.branches(x.to(made.attn.c_attn.weight.dtype))
    assert calls.forward == 1


def test_circumstances_that_are_left_to_the_ops(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x = module(), torch.randn(2, 17, 48)
    with gpt2fast.use_backend("reference"):
        made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(x)
    made(
        x,
    )[:0]
    assert calls.forward == 1
    made.branches(x, cu_seqlens=torch.tensor([0, 17, 34], dtype=torch.int32))
    made.branches(x, attend=lambda q, k, v, p: v)
    made(x[:, :0])
    made(x.transpose(0, 1))
    handle = nn.modules.module.register_module_forward_hook(_hook)
    made(x)
    handle.remove()
    work = 2 * 17 * 48 * 12 * 48  # the layers' multiplications
    for preference, most, runs in (
        (linear_cpu.BLAS, work, 0),
        (linear_cpu.FEW_ROWS, work - 1, 0),
        (linear_cpu.FEW_ROWS, work, 1),
        (linear_cpu.ALL, 0, 1),
    ):
        monkeypatch.setattr(functional, "preference", lambda found=preference: found)
        monkeypatch.setattr(functional, "SMALL", most)
        calls.forward = 0
        made(x)
        assert calls.forward == runs


def test_wrong_shapes_raise_as_one_by_one() -> None:
    made = module()
    with pytest.raises((ValueError, RuntimeError)):
        made(torch.randn(2, 17, 47))
    with pytest.raises((ValueError, RuntimeError)):
        made.branches(torch.randn(2, 17, 48), torch.randn(2, 16, 48))
    made.attn.n_head = 5
    with pytest.raises((ValueError, RuntimeError)):
        made(torch.randn(2, 17, 48))


def test_compiles_as_one_graph(calls: Calls) -> None:
    made, x = module(), torch.randn(2, 17, 48)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))
    assert calls.forward == 1


def test_dropout_of_modules_in_and_out_of_training(calls: Calls) -> None:
    made, x = module(dropout=0.5), torch.randn(2, 17, 48)
    first, second = made(x), made(x)
    assert not torch.equal(first, second)
    made.eval()
    torch.testing.assert_close(made(x), module().eval()(x))
    made.mlp.train()  # only the MLP drops out
    total, branch = made.branches(x)
    assert torch.equal(total, module().branches(x)[0])
    dropped = (branch == 0).float().mean()
    assert 0.4 < dropped < 0.6
    assert calls.forward == 6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_and_a_second_backward(dropout: float) -> None:
    made, x = module(dropout), torch.randn(2, 17, 48, requires_grad=True)
    torch.manual_seed(3)
    plain = made(x)
    wanted = [x, *made.parameters()]
    expected = torch.autograd.grad(plain.square().sum(), wanted, retain_graph=True)
    again = torch.autograd.grad(plain.square().sum(), wanted)
    torch.manual_seed(3)
    recomputed = checkpoint(made, x, use_reentrant=False)
    found = torch.autograd.grad(recomputed.square().sum(), wanted)
    for first, second, third in zip(expected, again, found, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_a_second_derivative_is_refused() -> None:
    made, x = module(), torch.randn(2, 17, 48, requires_grad=True)
    (dx,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    made, x = module(), torch.randn(2, 17, 48)
    loss = made(x).sum()
    with torch.no_grad():
        made.mlp.c_fc.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_have_workspaces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [module(), copy.deepcopy(module())]
    x = torch.randn(2, 67, 48)
    expected = step(blocks[0], x)
    found: list[list[Tensor]] = []

    def run() -> None:
        for _ in range(20):
            found.append(step(blocks[1], x))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for result in found:
        for first, second in zip(result, expected, strict=True):
            torch.testing.assert_close(first, second)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 0)
    cpu._workspace.kept = torch.empty(0)
    for first, second in zip(step(blocks[0], x), expected, strict=True):
        assert torch.equal(first, second)
    assert cpu._workspace.kept.numel() == 0
