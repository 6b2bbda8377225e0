"""Lazy logits are the plain head's logits, whatever is done with them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt2fast
from gpt2fast.swap import LazyLogits
from gpt2fast.swap.lazy_logits import lazy_head
from gpt2fast.swap.report import bind
from tests.ops.numerics import compare

V, C = 37, 16


def heads() -> tuple[nn.Linear, nn.Linear]:
    plain = nn.Linear(C, V, bias=False)
    fast = copy.deepcopy(plain)
    bind(fast, lazy_head)
    return plain, fast


def hidden(requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 7, C, generator=generator).requires_grad_(requires_grad)


def targets(*shape: int) -> Tensor:
    return torch.randint(V, shape or (3, 7), generator=torch.Generator().manual_seed(3))


FUSED: dict[str, Callable[[Any], Tensor]] = {
    "view": lambda z: F.cross_entropy(z.view(-1, z.size(-1)), targets().view(-1)),
    "reshape": lambda z: F.cross_entropy(z.reshape(21, V), targets().view(-1)),
    "torch.reshape": lambda z: F.cross_entropy(torch.reshape(z, (-1, V)), targets().view(-1)),
    "inferred columns": lambda z: F.cross_entropy(z.view(21, -1), targets().view(-1)),
    "flatten": lambda z: F.cross_entropy(z.flatten(0, 1), targets().flatten()),
    "torch.flatten": lambda z: F.cross_entropy(
        torch.flatten(z, end_dim=1), targets().flatten(), reduction="sum", label_smoothing=0.1
    ),
    "shifted": lambda z: F.cross_entropy(
        z[:, :-1].contiguous().view(-1, V), targets()[:, 1:].reshape(-1)
    ),
    "shifted with dots": lambda z: F.cross_entropy(
        z[..., :-1, :].reshape(-1, V), targets()[..., 1:].reshape(-1)
    ),
    "fewer classes": lambda z: F.cross_entropy(
        z[:, :, :30].reshape(-1, 30), targets().flatten() % 30
    ),
    "rows": lambda z: F.cross_entropy(z[1], targets()[1]),
    "last": lambda z: F.cross_entropy(z[:, -1, :], targets()[:, -1]),
    "masked": lambda z: F.cross_entropy(z[targets() > 9], targets()[targets() > 9]),
    "float": lambda z: F.cross_entropy(z.float().view(-1, V), targets().view(-1)),
    "to": lambda z: F.cross_entropy(z.to(torch.float32).view(-1, V), targets().view(-1)),
    "ignored": lambda z: F.cross_entropy(
        z.view(-1, V), targets().view(-1).clamp(max=5), ignore_index=5
    ),
    "none": lambda z: F.cross_entropy(z.view(-1, V), targets().view(-1), reduction="none").sum(),
    "module": lambda z: nn.CrossEntropyLoss()(z.view(-1, V), targets().view(-1)),
}

PLAIN: dict[str, Callable[[Any], Tensor]] = {
    "sum": lambda z: z.sum(),
    "log_softmax": lambda z: z.log_softmax(-1)[..., 3].mean(),
    "class weights": lambda z: F.cross_entropy(
        z.view(-1, V), targets().view(-1), weight=torch.arange(1.0, V + 1)
    ),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, V), torch.full((21, V), 1 / V)),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), targets()),
    "one row": lambda z: F.cross_entropy(z[0, 0], targets()[0, 0]),
    "nll": lambda z: F.nll_loss(F.log_softmax(z.view(-1, V), 1), targets().view(-1)),
    "some classes": lambda z: z[:, :, 3:9].square().mean(),
    "a class": lambda z: z[..., 5].square().mean(),
    "new axis": lambda z: z[None].square().mean(),
    "other rows": lambda z: z.view(7, 3 * V).square().mean(),
    "index": lambda z: z[torch.tensor([2, 0])].square().mean(),
    "mask of all": lambda z: z[z > 0].square().mean(),
    "second argument": lambda z: (torch.ones(V) * z).square().mean(),
    "inplace": lambda z: z.mul_(2.0).square().mean(),
    "einsum": lambda z: torch.einsum("btv,v->bt", z, torch.ones(V)).square().mean(),
    "cat": lambda z: torch.cat([z, z]).square().mean(),
    "double": lambda z: z.double().square().mean().float(),
    "fewer and more": lambda z: z[..., :20].reshape(-1, 20).exp().mean(),
}


@pytest.mark.parametrize("name", [*FUSED, *PLAIN])
def test_any_use_gives_what_the_plain_head_gives(name: str) -> None:
    use = (FUSED | PLAIN)[name]
    results = []
    for head in heads_of_one():
        x = hidden()
        logits = head(x)
        loss = use(logits)
        loss.backward()
        results.append((loss.detach(), x.grad, head.weight.grad))
    assert isinstance(logits, LazyLogits)
    if name in FUSED:
        assert not logits.is_computed()
    for theirs, ours in zip(*results, strict=True):
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, theirs)


def heads_of_one() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(6)
    return heads()


@pytest.mark.parametrize("name", ["view", "shifted", "none", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    measured: list[dict[str, Tensor]] = []
    start = hidden().detach().to(dtype)
    plain, fast = (h.to(dtype) for h in heads_of_one())
    for head in (copy.deepcopy(plain).double(), plain, fast):
        x = start.to(head.weight.dtype).requires_grad_()
        loss = FUSED[name](head(x))
        loss.backward()
        measured.append({"loss": loss.detach(), "dx": x.grad, "dw": head.weight.grad})
    truth, theirs, ours = measured
    for key, true in truth.items():
        assert ours[key].dtype == theirs[key].dtype, key
        compare(key, ours[key], theirs[key], true.double())


def test_description_without_computing() -> None:
    plain, fast = heads()
    expected, logits = plain(hidden()), fast(hidden())
    assert isinstance(logits, LazyLogits)
    assert isinstance(logits, Tensor)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout"):
        assert getattr(logits, name) == getattr(expected, name), name
    assert (logits.size(), logits.dim(), logits.numel(), len(logits)) == (
        expected.size(),
        expected.dim(),
        expected.numel(),
        len(expected),
    )
    assert logits.grad_fn is not None
    assert not logits.is_computed()
    assert repr(logits.detach()) == repr(expected.detach())
    torch.testing.assert_close(logits.tolist(), expected.tolist())
    torch.testing.assert_close(torch.from_numpy(logits.detach().numpy()), expected.detach())


def test_loss_and_logits_together() -> None:
    """Both a fused loss and a use of the values: gradients of both arrive."""
    results = []
    for head in heads():
        x = hidden()
        logits = head(x)
        (FUSED["view"](logits) + 0.1 * logits.square().mean()).backward()
        results.append((x.grad, head.weight.grad))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_looking_without_gradients_first_does_not_lose_them() -> None:
    _, head = heads()
    logits = head(hidden())
    with torch.no_grad():
        logits.argmax(-1)
    assert not logits.is_computed()
    logits.sum().backward()
    assert head.weight.grad is not None


def test_after_the_weights_changed_it_says_so() -> None:
    _, head = heads()
    logits = head(hidden())
    FUSED["view"](logits).backward()
    with torch.no_grad():
        logits.argmax()  # before the step: all right
        head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="never computed"):
        logits.argmax()
    with pytest.raises(RuntimeError, match="never computed"):
        FUSED["view"](logits)


def test_plain_where_laziness_has_no_place() -> None:
    _, head = heads()
    x = hidden()
    assert type(head.eval()(x)) is Tensor
    head.train()
    with torch.no_grad():
        assert type(head(x)) is Tensor
    with torch.inference_mode():
        assert type(head(x)) is Tensor
    assert type(head(x[0, 0])) is Tensor
    assert type(torch.func.vmap(head)(x)) is Tensor
    with torch.device("meta"):
        frozen = nn.Linear(C, V, bias=False).requires_grad_(False)
    bind(frozen, lazy_head)
    assert type(frozen(hidden(False).to("meta"))) is Tensor
    functional = torch.func.functional_call(head, {"weight": head.weight.detach().clone()}, (x,))
    assert type(functional) is Tensor
    with pytest.raises(RuntimeError):
        head(torch.randn(3, C + 1))


def test_autocast_outside_of_which_the_loss_is_taken() -> None:
    results = []
    for head in heads_of_one():
        x = hidden()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(x)
        assert logits.dtype == torch.bfloat16
        loss = F.cross_entropy(logits.float().view(-1, V), targets().view(-1))
        loss.backward()
        results.append((loss.detach(), x.grad, head.weight.grad))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_distributed_data_parallel(find_unused: bool, inside: bool, tmp_path: Any) -> None:
    """DDP walks the graph of what forward returns; lazy logits are part of it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, C)
            self.head = nn.Linear(C, V, bias=False)
            self.unused = nn.Linear(2, 2) if find_unused else None

        def forward(self, x: Tensor) -> Any:
            logits = self.head(self.embed(x))
            loss = F.cross_entropy(logits.view(-1, V), x.view(-1)) if inside else None
            return logits, loss

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        plain = Model()
        fast = copy.deepcopy(plain)
        assert gpt2fast.optimize(fast).counts() == {"loss": 1}
        for model in (plain, fast):
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
            for _ in range(3):  # DDP complains in the step after one that went wrong
                wrapped.zero_grad()
                logits, loss = wrapped(targets())
                if loss is None:
                    loss = F.cross_entropy(logits.view(-1, V), targets().view(-1))
                loss.backward()
        # where it looks for unused parameters, DDP copies what forward returns
        assert isinstance(logits, LazyLogits) is not find_unused
        for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_fully_sharded(tmp_path: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, C)
            self.mlp = nn.Sequential(
                nn.Linear(C, 2 * C), nn.GELU(approximate="tanh"), nn.Linear(2 * C, C)
            )
            self.norm = nn.LayerNorm(C)
            self.head = nn.Linear(C, V, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.mlp(self.embed(x))))

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for alone in (False, True):  # the head in the root's group, or in one of its own
            plain = Model()
            fast = copy.deepcopy(plain)
            assert gpt2fast.optimize(fast).counts() == {"mlp": 1, "layer_norm": 1, "loss": 1}
            if alone:
                fully_shard(fast.head, mesh=mesh)
            fully_shard(fast.mlp, mesh=mesh)
            fully_shard(fast, mesh=mesh)
            for model in (plain, fast):
                for _ in range(2):
                    model.zero_grad()
                    F.cross_entropy(model(targets()).view(-1, V), targets().view(-1)).backward()
            for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    finally:
        torch.distributed.destroy_process_group()
