"""optimize: finds what it can prove, keeps results and gradients, leaves the rest alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt2fast
from gpt2fast.swap import LazyLogits, optimize
from gpt2fast.swap.structure import DROPOUT, ERF
from tests.ops.numerics import compare
from tests.swap.models import (
    BuildGpt,
    MinGpt,
    NanoAttention,
    NanoGpt,
    NanoMlp,
    NanoNorm,
    PlainAttention,
)

FULL = {"layer_norm": 5, "attention": 2, "mlp": 2, "loss": 1}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "nanogpt": (lambda: NanoGpt(approximate="tanh"), FULL),
    "nanogpt with biases": (lambda: NanoGpt(approximate="tanh", bias=True), FULL),
    "nanogpt with erf": (NanoGpt, {"layer_norm": 5, "attention": 2, "loss": 1}),
    "build-nanogpt": (BuildGpt, FULL),
    "mingpt": (MinGpt, {"layer_norm": 5, "attention": 2, "gelu": 2, "loss": 1}),
}


def scrambled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def twin(model: nn.Module, name: str) -> Any:
    """A copy; deepcopy would leave minGPT's lambdas with the original."""
    made = MODELS[name][0]()
    made.load_state_dict(model.state_dict())
    return made


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randint(101, (2, 3, 19), generator=generator))  # type: ignore[return-value]


def run(model: nn.Module) -> dict[str, Tensor]:
    x, y = batch()
    model.zero_grad()
    logits, loss = model(x, y)
    loss.backward()
    found = {"loss": loss.detach(), "logits": logits.detach() + 0}
    return found | {f"gradient of {n}": p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models(name: str, dtype: torch.dtype) -> None:
    make, counts = MODELS[name]
    plain = scrambled(make()).to(dtype)
    fast = twin(plain, name).to(dtype)
    keys = list(fast.state_dict())
    report = optimize(fast)
    assert report.counts() == counts, str(report)
    truth = run(twin(plain, name).double())
    expected, measured = run(plain), run(fast)
    for key, true in truth.items():
        assert measured[key].dtype == expected[key].dtype, key
        compare(key, measured[key], expected[key], true.double())
    assert list(fast.state_dict()) == keys
    x, _ = batch()
    torch.testing.assert_close(
        fast.eval()(x)[0].float(), plain.eval()(x)[0].float(), rtol=0.1, atol=0.1
    )
    assert report.revert() == sum(counts.values())
    reverted = run(fast.train())
    assert all(torch.equal(reverted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", MODELS)
def test_torch_compile_in_one_graph(name: str) -> None:
    make, _ = MODELS[name]
    plain = scrambled(make())
    fast = twin(plain, name)
    optimize(fast)
    torch._dynamo.reset()
    expected, measured = (
        run(plain),
        run(torch.compile(fast, backend="aot_eager", fullgraph=True)),  # type: ignore[arg-type]
    )
    for key, theirs in expected.items():
        ours = measured[key if key in measured else key.replace("of ", "of _orig_mod.")]
        torch.testing.assert_close(ours, theirs, msg=key)


def test_erf_gelu_is_left_alone_with_a_reason() -> None:
    model = scrambled(NanoGpt())
    before = model.eval()(batch()[0])[0]
    report = optimize(model, attention=False, layer_norm=False, loss=False)
    assert [(e.kind, e.reason) for e in report.entries] == [("mlp", ERF)] * 2
    assert torch.equal(model(batch()[0])[0], before)
    report = optimize(nn.Sequential(nn.GELU(), nn.GELU(approximate="tanh")))
    assert [(e.replaced, e.reason) for e in report.entries] == [
        (False, "not the tanh form of GELU"),
        (True, ""),
    ]


class Changed(NanoAttention):
    """Attention that differs in one thing."""

    def __init__(self, what: str) -> None:
        super().__init__(32, 4, 0.0, True)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        b, t, c = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        if self.what == "order":
            q, k, v = k, q, v
        if self.what == "interleaved":
            q, k, v = self.c_attn(x).view(b, t, 4, 3, 8).unbind(3)
        q, k, v = (z.reshape(b, t, self.n_head, -1).transpose(1, 2) for z in (q, k, v))
        if self.what == "norm":
            q = F.layer_norm(q, q.shape[-1:])
        scale = 0.125 if self.what == "scale" else None
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        if self.what == "window":
            mask &= torch.ones(t, t, dtype=torch.bool).triu(-3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        if self.what == "attribute":
            self.seen = y
        if self.what == "training" and self.training:
            y = y * 1.5
        if self.what == "gate":
            y = y * x.sigmoid()
        return (y, None) if self.what == "tuple" else y


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("order", "differs by"),
        ("interleaved", "differs by"),
        ("norm", "differs by"),
        ("scale", "differs by"),
        ("window", "differs by"),
        ("gate", "differs by"),
        ("training", "in training"),
        ("attribute", "stores attributes"),
        ("tuple", "returns a tuple"),
    ],
)
def test_attention_that_is_something_else(what: str, reason: str) -> None:
    module = Changed(what)
    for linear in (module.c_attn, module.c_proj):  # zeros must not hide the difference
        nn.init.normal_(linear.weight, std=0.2)
    report = optimize(module)
    (entry,) = (e for e in report.entries if e.kind == "attention")
    assert not entry.replaced
    assert reason in entry.reason
    assert "forward" not in vars(module)
    assert "seen" not in vars(module)
    assert optimize(Changed("nothing")).counts() == {"attention": 1}


class Dropping(PlainAttention):
    """Attention with a probability of dropout that stands in its forward."""

    def __init__(self, what: str, causal: bool) -> None:
        super().__init__(32, 4, causal, True)
        self.what = what
        self.rate = 0.1  # under no name that anybody looks for

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, c = x.shape
        if self.what == "input":
            x = F.dropout(x, 0.1, self.training)
        q, k, v = (
            f(x).view(b, t, self.num_heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        causal, p = self.causal, 0.1 if self.training else 0.0
        if self.what == "probabilities":
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if causal:
                hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(hidden, -torch.inf)
            y = F.dropout(scores.softmax(-1), 0.1, self.training) @ v
        elif self.what == "place":
            y = F.scaled_dot_product_attention(q, k, v, None, p, causal)
        else:
            p = {"attribute": self.rate * self.training, "input": 0.0}.get(self.what, p)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
        y = self.proj(y.transpose(1, 2).reshape(b, t, c))
        return y * 1.5 if self.what == "more" and self.training else y


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "what", ["keyword", "place", "probabilities", "attribute", "input", "more"]
)
def test_dropout_that_stands_in_a_forward_is_named(what: str, causal: bool) -> None:
    module = Dropping(what, causal)
    (entry,) = optimize(module).entries
    assert not entry.replaced
    assert (entry.reason == DROPOUT) is (what != "more")
    assert "forward" not in vars(module)


class OddNorm(NanoNorm):
    def __init__(self, what: str) -> None:
        super().__init__(24, True)
        self.what = what
        nn.init.zeros_(self.weight)  # as some scripts start: it must not hide the difference

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if self.what == "rms":
            return F.rms_norm(x, shape, self.weight, 1e-5) + self.bias
        if self.what == "zero centred":
            return F.layer_norm(x, shape, self.weight + 1, self.bias, 1e-5)
        if self.what == "no bias":
            return F.layer_norm(x, shape, self.weight, None, 1e-5)
        if self.what == "unbiased":
            scale = x.std(-1, keepdim=True)
            return (x - x.mean(-1, keepdim=True)) / (scale + 1e-5) * self.weight + self.bias
        eps = {"epsilon": 1e-12, "kept": 1e-6}[self.what]
        return F.layer_norm(x, shape, self.weight, self.bias, eps)


@pytest.mark.parametrize("what", ["rms", "zero centred", "no bias", "unbiased"])
def test_norms_that_are_something_else(what: str) -> None:
    report = optimize(OddNorm(what))
    assert not report.replaced
    assert "not a layer norm" in report.left_alone[0].reason


@pytest.mark.parametrize("what", ["epsilon", "kept"])
def test_epsilon_is_found(what: str) -> None:
    module = OddNorm(what)
    nn.init.normal_(module.weight)
    x = 1e-3 * torch.randn(5, 24)
    before = module(x)
    assert optimize(module).counts() == {"layer_norm": 1}
    torch.testing.assert_close(module(x), before)


class OddMlp(NanoMlp):
    def __init__(self, what: str) -> None:
        super().__init__(24, 0.5 if "dropout" in what else 0.0, True, "tanh")
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        h = {"relu": F.relu, "quick": lambda z: z * torch.sigmoid(1.702 * z)}.get(
            self.what, self.gelu
        )(h)
        if self.what == "dropout inside":
            return self.c_proj(self.dropout(h))
        y = self.dropout(self.c_proj(h))
        return y + x if self.what == "residual" else y


@pytest.mark.parametrize("what", ["relu", "quick", "residual", "dropout inside"])
def test_mlps_that_are_something_else(what: str) -> None:
    module = OddMlp(what)
    report = optimize(module)
    assert [e.kind for e in report.left_alone] == ["mlp"]
    assert "forward" not in vars(module)
    assert optimize(OddMlp("dropout at the end")).counts() == {"mlp": 1}


def test_dropout_of_an_mlp_draws_the_same_numbers() -> None:
    plain = OddMlp("dropout at the end").train()
    fast = copy.deepcopy(plain)
    optimize(fast)
    x = torch.randn(4, 24)
    results = []
    for module in (plain, fast):
        torch.manual_seed(4)
        results.append(module(x))
    torch.testing.assert_close(*results)
    assert (results[0] == 0).any()


def test_sequential_and_functional_mlps() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(40, 24)
            self.up = nn.Linear(24, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x), approximate="tanh"))

    chain = nn.Sequential(
        nn.Linear(24, 96), nn.GELU(approximate="tanh"), nn.Linear(96, 24), nn.Dropout(0.0)
    )
    for module in (Inline(), chain):
        x = torch.randn(2, 3, 24)
        before = module(x)
        assert optimize(module).counts() == {"mlp": 1}
        torch.testing.assert_close(module(x), before)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_three_projections(causal: bool, bias: bool) -> None:
    module = PlainAttention(32, 4, causal, bias)
    x = torch.randn(2, 9, 32)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().flip(0) | torch.eye(9, dtype=torch.bool)
    before, masked = module(x), module(x, mask)
    assert optimize(module).counts() == {"attention": 1}
    torch.testing.assert_close(module(x), before)
    torch.testing.assert_close(module(x, mask), masked)  # a mask goes to the original
    torch.testing.assert_close(module(x, mask=mask), masked)


def test_attention_dropout_acts_in_training_only() -> None:
    module = NanoAttention(32, 4, 0.3, True)
    x = torch.randn(2, 9, 32)
    before = module.eval()(x)
    report = optimize(module)
    assert report.entries[0].reason == "dropout drawn by our kernel"
    assert (module.dropout, module.attn_dropout.p) == (0.3, 0.3)
    torch.testing.assert_close(module(x), before)
    module.resid_dropout.p = 0.0
    assert not torch.allclose(module.train()(x), before)


def test_what_comes_later_is_seen() -> None:
    """Adapters and hooks on the projections: the module goes back to its own forward."""
    mlp = NanoMlp(24, 0.0, True, "tanh")
    optimize(mlp)

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(3, 24)
    before = mlp(x)
    proj = mlp.c_proj
    mlp.c_proj = Twice(96, 24)
    mlp.c_proj.load_state_dict(proj.state_dict())
    torch.testing.assert_close(mlp(x), 2 * before)
    mlp.c_proj = proj
    calls: list[int] = []
    handle = mlp.c_fc.register_forward_pre_hook(lambda *_: calls.append(1))
    mlp(x)
    handle.remove()
    mlp(x)
    assert calls == [1]


def test_structures_without_a_kernel_are_named() -> None:
    class Free(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    tree = nn.ModuleList(
        [
            Free(),
            nn.MultiheadAttention(8, 2),
            nn.LayerNorm((2, 8)),
            nn.RMSNorm(8),
            nn.CrossEntropyLoss(weight=torch.ones(3)),
        ]
    )
    report = optimize(tree)
    assert not report.replaced
    assert {e.name: e.kind for e in report.left_alone} == {
        "0": "attention",
        "1": "attention",
        "2": "layer_norm",
        "3": "layer_norm",
        "4": "loss",
    }


def test_meta_devices_integers_and_wrong_arguments() -> None:
    with torch.device("meta"):
        report = optimize(BuildGpt())
    assert report.counts() == {"gelu": 2}  # which has no parameters to wait for
    assert "meta device" in report.left_alone[0].reason
    assert str(optimize(nn.Flatten())) == "gpt2fast: nothing here that it could replace"
    with pytest.raises(TypeError, match="module must be"):
        optimize(torch.zeros(1))  # type: ignore[arg-type]


def test_nothing_is_left_behind_by_the_probe() -> None:
    model = NanoGpt(dropout=0.2, approximate="tanh").eval()
    model.transformer["h"][0].train()
    modes = [m.training for m in model.modules()]
    values = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    optimize(model).revert()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for before, parameter in zip(values, model.parameters(), strict=True):
        assert torch.equal(before, parameter)
        assert parameter.grad is None
    assert not any(k in vars(m) for m in model.modules() for k in ("forward", "_gpt2fast_plan"))


def test_a_loss_outside_the_model() -> None:
    x, y = batch()

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(101, 24)
            self.norm = nn.LayerNorm(24)
            self.head = nn.Linear(24, 101, bias=False)
            self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.embed(x)))

    plain = Language()
    fast = copy.deepcopy(plain)
    assert optimize(fast).counts() == {"layer_norm": 1, "loss": 2}
    for model in (plain, fast):
        logits = model(x)
        assert isinstance(logits, LazyLogits) is (model is fast)
        model.criterion(logits.flatten(0, 1), y.flatten()).backward()
        if model is fast:
            assert not logits.is_computed()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    logits = plain(x)
    for reduce in ("mean", "sum", "none"):
        fast.criterion.reduction = plain.criterion.reduction = reduce
        losses = [m.criterion(logits.flatten(0, 1), y.flatten()) for m in (plain, fast)]
        torch.testing.assert_close(*losses)
    probabilities = torch.rand(4, 101)
    losses = [m.criterion(torch.ones(4, 101), probabilities) for m in (plain, fast)]
    torch.testing.assert_close(*losses)  # class probabilities: torch's


def test_untied_head_of_the_size_of_the_positions() -> None:
    """An MLP that has the shape of the table of positions is not taken for the head."""
    model = NanoGpt(vocab=128, width=16, approximate="tanh")
    model.transformer["wpe"] = nn.Embedding(64, 16)  # the shape of c_fc.weight
    report = optimize(model)
    assert [e.name for e in report.replaced if e.kind == "loss"] == ["lm_head"]
    model = BuildGpt(vocab=128, width=16)
    model.lm_head = nn.Linear(16, 128, bias=False)
    report = optimize(model)
    assert [e.name for e in report.replaced if e.kind == "loss"] == ["lm_head"]


def test_fp64_models_and_a_forced_backend() -> None:
    model = BuildGpt().double()
    assert optimize(model).counts() == FULL
    with gpt2fast.use_backend("reference"):
        assert optimize(BuildGpt()).counts() == FULL
