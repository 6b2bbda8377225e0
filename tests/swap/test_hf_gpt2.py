"""Hugging Face's GPT-2 on our kernels: the same results, and nothing else about it changes."""

import copy
import io
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpt2fast
from gpt2fast.swap import LazyLogits, SwapReport, apply_gpt2fast_to_gpt2, hf_gpt2, revert
from tests.ops.numerics import compare

transformers = pytest.importorskip("transformers")
VOCAB = 101


def make(**changes: Any) -> Any:
    model = changes.pop("model", "GPT2LMHeadModel")
    settings = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 48,
        "vocab_size": VOCAB,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        **changes,
    }
    torch.manual_seed(3)
    made = getattr(transformers, model)(transformers.GPT2Config(**settings))
    with torch.no_grad():  # fresh norms and biases, ones and zeros, would hide mistakes
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def pair(**changes: Any) -> tuple[Any, Any, SwapReport]:
    """A model, its swapped copy, and the report."""
    plain = make(**changes)
    fast = copy.deepcopy(plain)
    return plain, fast, apply_gpt2fast_to_gpt2(fast)


class Spy(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the names of our ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace == "gpt2fast":
            self.seen.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def ids(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def padded(kind: str, like: Tensor) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones_like(like)
    if kind in ("left", "both"):
        mask[0, :5] = 0
    if kind in ("right", "both"):
        mask[1, 11:] = 0
    if kind == "both":
        mask[2, :2] = mask[2, -1:] = 0
    if kind == "hole":
        mask[1, 4:6] = 0
    if kind == "nothing":
        mask[1] = 0
    return mask


def run(model: Any, x: Tensor, mask: Tensor | None, **more: Any) -> dict[str, Tensor]:
    labels = x if mask is None else x.masked_fill(mask == 0, -100)
    labels = labels.clone()
    labels[2, 3] = -100
    model.zero_grad()
    output = model(x, attention_mask=mask, labels=labels, **more)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}  # of padding, too
    return found | {f"gradient of {n}": p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *itertools.product(
            ["none", "full", "left", "right", "both", "nothing"], [torch.float32, torch.bfloat16]
        ),
        ("hole", torch.float32),  # attention is theirs: nothing new to round in bf16
    ],
)
def test_training_is_as_accurate_as_theirs(kind: str, dtype: torch.dtype) -> None:
    plain, fast, _ = pair()
    plain, fast = plain.to(dtype).train(), fast.to(dtype).train()
    x = ids()
    mask = padded(kind, x)
    truth = run(copy.deepcopy(plain).double(), x, mask)
    expected, measured = run(plain, x, mask), run(fast, x, mask)
    assert measured.keys() == truth.keys()
    for name, true in truth.items():
        assert measured[name].dtype == expected[name].dtype, name
        # their loss in fp64 is taken of fp32 logits: truth to 1e-7
        compare(name, measured[name], expected[name], true.double())


@pytest.mark.parametrize(
    ("kind", "op"),
    [
        ("none", "attention_forward"),
        ("full", "attention_forward"),
        ("left", "attention_varlen_forward"),
        ("right", "attention_varlen_forward"),
        ("both", "attention_varlen_forward"),
        ("hole", None),
    ],
)
def test_padding_is_ours_and_other_masks_go_to_theirs(kind: str, op: str | None) -> None:
    _, fast, _ = pair()
    x = ids()
    with Spy() as spy:
        run(fast.train(), x, padded(kind, x))
    assert {name for name in spy.seen if "attention" in name and "forward" in name} == (
        {op} if op else set()
    )
    assert {"layer_norm_forward", "gelu_forward", "linear_cross_entropy_forward"} <= spy.seen
    assert {"layer_norm_backward", "gelu_backward", "embedding_backward"} <= spy.seen


def test_packed_sequences_do_not_see_each_other() -> None:
    plain, fast, _ = pair()
    x = ids(1, 16)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    results = [m.eval()(x, position_ids=positions, use_cache=False).logits for m in (plain, fast)]
    torch.testing.assert_close(*results)
    alone = fast(x[:, 9:]).logits
    torch.testing.assert_close(results[1][:, 9:], alone)


def test_a_mask_of_four_dimensions_is_obeyed() -> None:
    plain, fast, _ = pair()
    x = ids(2, 6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[:, :, 4, 1] = False
    masked = [m.eval()(x, attention_mask=mask).logits for m in (plain, fast)]
    torch.testing.assert_close(*masked)
    assert not torch.allclose(masked[1], fast(x).logits)


def test_a_mask_that_changes_in_place_is_looked_at_again() -> None:
    plain, fast, _ = pair()
    x = ids(2, 6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    for column in (0, 4, 2):  # padding before the tokens, behind them, a hole
        mask[0, :, :, column] = False
        results = [m.eval()(x, attention_mask=mask).logits for m in (plain, fast)]
        torch.testing.assert_close(*results)


def test_padding_of_a_compiled_model_is_obeyed() -> None:
    plain, fast, _ = pair()
    fast.loss_type = "ForCausalLM"
    x = ids()
    torch._dynamo.reset()
    compiled = torch.compile(fast.eval(), backend="eager", fullgraph=True)
    results = [m(x, attention_mask=padded("both", x)).logits for m in (plain.eval(), compiled)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("kind", ["none", "full", "left"])
def test_generation_is_the_same(cache: str, kind: str) -> None:
    plain, fast, _ = pair()
    x = ids()
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    if cache == "none":
        settings["use_cache"] = False
    results = [
        m.eval().generate(x, attention_mask=padded(kind, x), **settings) for m in (plain, fast)
    ]
    assert torch.equal(*results)


def test_beams_and_a_continued_cache() -> None:
    plain, fast, _ = pair()
    x = ids()
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(m.eval().generate(x, **settings) for m in (plain, fast)))
    whole = plain(x).logits
    cached = fast(x[:, :9], use_cache=True)
    rest = fast(x[:, 9:], past_key_values=cached.past_key_values)  # several tokens at once
    torch.testing.assert_close(torch.cat([cached.logits, rest.logits], 1), whole)


def test_decoding_runs_our_attention() -> None:
    _, fast, _ = pair()
    x = ids()
    with torch.no_grad(), Spy() as spy:
        cached = fast.eval()(x, use_cache=True)
        spy.seen.clear()
        fast(x[:, :1], past_key_values=cached.past_key_values)
    assert "attention_forward" in spy.seen


def test_an_argument_of_a_later_version_is_told_once() -> None:
    plain, fast, _ = pair()
    x = torch.randn(2, 5, plain.config.n_embd)
    attention = [model.eval().transformer.h[0].attn for model in (plain, fast)]
    hf_gpt2._warn_of_unknown.cache_clear()
    with pytest.warns(
        UserWarning, match=r"gives GPT2Attention.forward novelty, which this version"
    ):
        found = attention[1](x, novelty=True)[0]
    torch.testing.assert_close(found, attention[0](x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention[1](x, novelty=True)
        attention[1](x, output_attentions=True)  # known, and theirs


@pytest.mark.parametrize("items", [7, torch.tensor(7), None])
def test_loss_over_the_items_of_a_whole_batch(items: Any) -> None:
    plain, fast, _ = pair()
    x = ids()
    losses = [m.train()(x, labels=x, num_items_in_batch=items).loss for m in (plain, fast)]
    torch.testing.assert_close(*losses)
    shifted = torch.roll(x, -1, 1)
    losses = [
        m(x, labels=x, shift_labels=shifted, num_items_in_batch=items).loss for m in (plain, fast)
    ]
    torch.testing.assert_close(*losses)


def test_the_loss_never_makes_the_logits_and_they_are_right_when_asked_for() -> None:
    plain, fast, _ = pair()
    x = ids()
    output = fast.train()(x, labels=x)
    assert isinstance(output.logits, LazyLogits)
    output.loss.backward()
    assert not output.logits.is_computed()
    assert output.logits.shape == (3, 17, VOCAB)
    expected = plain.train()(x, labels=x)
    torch.testing.assert_close(output.logits, expected.logits)
    as_tuple = fast(x, labels=x, return_dict=False)
    torch.testing.assert_close(as_tuple[1].detach(), expected.logits.detach())
    assert type(fast.eval()(x, labels=x).logits) is Tensor
    torch.testing.assert_close(fast(x, labels=x).loss, expected.loss)


def test_a_loss_function_of_the_users_own() -> None:
    plain, fast, _ = pair()

    def focal(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        rows = logits.view(-1, vocab_size).log_softmax(-1).gather(1, labels.view(-1, 1))
        return -(1 - rows.exp()).mul(rows).mean()

    x = ids()
    grads = []
    for model in (plain, fast):
        model.loss_function = focal
        loss = model.train()(x, labels=x).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain, fast, _ = pair()
    for model in (plain, fast):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    x = ids()
    results = [run(m.train(), x, None) for m in (plain, fast)]
    for name, theirs in results[0].items():
        torch.testing.assert_close(results[1][name], theirs, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_in_one_graph(training: bool) -> None:
    plain, fast, _ = pair()
    fast.loss_type = "ForCausalLM"  # without it transformers logs a warning: no graph holds that
    x = ids()
    torch._dynamo.reset()
    compiled = torch.compile(fast.train(training), backend="aot_eager", fullgraph=True)
    expected = plain.train(training)(x, labels=x)
    output = compiled(x, labels=x)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits, expected.logits)
    expected.loss.backward()
    output.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, ours in fast.named_parameters():
        torch.testing.assert_close(ours.grad, theirs[name].grad, msg=name)


def test_torch_compile_fuses_head_and_loss_where_the_graph_may_end() -> None:
    plain, fast, _ = pair()
    plain.loss_type = fast.loss_type = "ForCausalLM"
    x = ids()
    torch._dynamo.reset()
    compiled = torch.compile(fast.train(), backend="aot_eager")
    output, expected = compiled(x, labels=x), plain.train()(x, labels=x)
    for result in (output, expected):
        result.loss.backward()
    assert isinstance(output.logits, LazyLogits)
    assert not output.logits.is_computed()
    torch.testing.assert_close(output.loss, expected.loss)
    theirs = dict(plain.named_parameters())
    for name, ours in fast.named_parameters():
        torch.testing.assert_close(ours.grad, theirs[name].grad, msg=name)
    torch.testing.assert_close(output.logits, expected.logits)


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_if_wanted(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("gpt2fast.swap.hf_gpt2.keep_freed_memory", lambda: calls.append(1))
    apply_gpt2fast_to_gpt2(make(), keep_memory=keep)
    assert calls == [1] * keep


def test_autocast() -> None:
    plain, fast, _ = pair()
    x = ids()
    results = []
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            output = model.train()(x, labels=x)
        output.loss.backward()
        results.append((output.loss.detach(), model.transformer.h[0].mlp.c_fc.weight.grad))
        assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.1, atol=1e-3)
    truth = run(plain.double(), x, None)["loss"]
    assert abs(results[1][0] - truth) < 5e-3


def test_weights_and_files_stay(tmp_path: Path) -> None:
    plain, fast, _ = pair()
    assert list(plain.state_dict()) == list(fast.state_dict())
    for folder, model in (("plain", plain), ("fast", fast)):
        model.save_pretrained(tmp_path / folder)
    for file in sorted((tmp_path / "plain").iterdir()):
        assert file.read_bytes() == (tmp_path / "fast" / file.name).read_bytes(), file.name
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "fast")
    torch.testing.assert_close(again(ids()).logits, plain.eval()(ids()).logits)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert repr(fast) == repr(plain)


def test_revert_gives_their_bits_back() -> None:
    plain, fast, report = pair()
    x = ids()
    assert report.revert() == 12
    assert report.revert() == 0
    assert all("forward" not in m.__dict__ for m in fast.modules())
    assert [vars(m).keys() for m in fast.modules()] == [vars(m).keys() for m in plain.modules()]
    ours, theirs = run(fast, x, None), run(plain, x, None)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_wrapped_forward_is_not_torn_out() -> None:
    _, fast, report = pair()
    inner = fast.transformer.ln_f.forward
    fast.transformer.ln_f.forward = lambda x: inner(x)
    with pytest.raises(RuntimeError, match=r"transformer\.ln_f was wrapped"):
        revert(fast)
    fast.transformer.ln_f.forward = inner
    report._models.append(__import__("weakref").ref(fast))
    assert report.revert() == 12


def test_copies_and_pickles_work() -> None:
    plain, fast, _ = pair()
    x = ids()
    expected = plain.eval()(x).logits
    twin = copy.deepcopy(fast).eval()
    with torch.no_grad():
        fast.transformer.wte.weight.zero_()  # a copy has weights of its own
    torch.testing.assert_close(twin(x).logits, expected)
    stream = io.BytesIO()
    torch.save(twin, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(x).logits, expected)


def test_applying_twice_is_applying_once() -> None:
    _, fast, first = pair()
    second = apply_gpt2fast_to_gpt2(fast)
    assert second.counts() == first.counts()
    assert first.revert() == 12


class Lora(nn.Module):
    """A stand-in for an adapter of peft: wraps a projection and adds a low-rank term."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Parameter(0.1 * torch.randn(base.nx, 2))
        self.b = nn.Parameter(0.1 * torch.randn(2, base.nf))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a @ self.b


def with_lora(model: Any) -> Any:
    torch.manual_seed(8)
    for block in model.transformer.h:
        block.mlp.c_fc = Lora(block.mlp.c_fc)
        block.attn.c_attn = Lora(block.attn.c_attn)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_keep_their_say(when: str) -> None:
    plain = make()
    fast = copy.deepcopy(plain)
    with_lora(plain)
    if when == "before":
        report = apply_gpt2fast_to_gpt2(with_lora(fast))
        reasons = {entry.name: entry.reason for entry in report.left_alone}
        assert reasons["transformer.h.0.mlp"] == "c_fc is a Lora, not a plain Conv1D"
        assert "attention" in report.counts()  # it calls c_attn, whatever that is
    else:
        apply_gpt2fast_to_gpt2(fast)
        with_lora(fast)
    x = ids()
    results = []
    for model in (plain, fast):
        output = model.train()(x, labels=x)
        output.loss.backward()
        mlp = model.transformer.h[1].mlp.c_fc
        results.append((output.loss, mlp.a.grad, model.transformer.h[0].attn.c_attn.b.grad))
        assert mlp.base_layer.weight.grad is None
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_hook_on_a_projection_still_fires() -> None:
    _, fast, _ = pair()
    calls = []
    fast.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    fast(ids())
    assert calls == [1]


@pytest.fixture
def everywhere() -> Iterator[SwapReport]:
    report = apply_gpt2fast_to_gpt2()
    yield report
    report.revert()


def test_all_models_built_from_now_on(everywhere: SwapReport, tmp_path: Path) -> None:
    x = ids()
    first = make()
    assert len(everywhere.replaced) == 12
    first.save_pretrained(tmp_path)
    second = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad(), Spy() as spy:
        ours = second.eval()(x).logits
    assert {"layer_norm_forward", "attention_forward", "gelu_forward"} <= spy.seen
    everywhere.revert()
    with torch.no_grad(), Spy() as spy:
        theirs = second(x).logits
        make()(x)
    assert not spy.seen
    torch.testing.assert_close(ours, theirs)
    assert "post_init" not in vars(transformers.models.gpt2.modeling_gpt2.GPT2PreTrainedModel)


def test_what_is_left_alone_has_a_reason() -> None:
    _, _, report = pair(activation_function="gelu")
    assert {(e.kind, e.reason) for e in report.left_alone} == {
        ("mlp", "its activation GELUActivation is not the tanh-GELU")
    }
    model = make(attn_implementation="eager")
    report = apply_gpt2fast_to_gpt2(model)
    assert "attn_implementation='eager' was chosen" in report.left_alone[0].reason
    weights = model(ids(), output_attentions=True).attentions
    assert weights[0].shape == (3, 4, 17, 17)
    report = apply_gpt2fast_to_gpt2(make(model="GPT2DoubleHeadsModel"))
    assert [e.reason for e in report.left_alone] == ["the head of GPT2DoubleHeadsModel"]
    assert "left alone: loss: Linear (lm_head): the head of" in str(report)


def test_a_head_with_a_bias_keeps_it() -> None:
    plain = make()
    plain.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    fast = copy.deepcopy(plain)
    report = apply_gpt2fast_to_gpt2(fast)
    assert [(e.kind, e.reason) for e in report.left_alone] == [("loss", "it has a bias")]
    torch.testing.assert_close(
        fast.eval()(ids(), labels=ids()).loss, plain.eval()(ids(), labels=ids()).loss
    )


@pytest.mark.parametrize("part", ["ln_1", "mlp", "attn", "mlp.c_fc", "attn.c_proj"])
def test_a_forward_that_somebody_replaced_is_kept(part: str) -> None:
    fast = make().eval()
    module = fast.transformer.h[1].get_submodule(part)
    theirs, seen = module.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(True)
        return theirs(*args, **kwargs)

    module.forward = forward
    apply_gpt2fast_to_gpt2(fast)
    fast(ids())
    assert seen == [True]
    assert module.forward is forward


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_every_tanh_gelu_of_theirs_is_known(activation: str) -> None:
    plain, fast, report = pair(activation_function=activation)
    assert report.counts()["mlp"] == 2
    torch.testing.assert_close(fast.eval()(ids()).logits, plain.eval()(ids()).logits)


def test_eager_chosen_later_is_obeyed() -> None:
    plain, fast, _ = pair()
    fast.set_attn_implementation("eager")
    output = fast.eval()(ids(), output_attentions=True)
    assert output.attentions[0].shape == (3, 4, 17, 17)
    torch.testing.assert_close(output.logits, plain.eval()(ids()).logits)


@pytest.mark.parametrize("scale", [{"scale_attn_weights": False}, {}])
@pytest.mark.parametrize("by_layer", [False, True])
def test_attention_scales(scale: dict[str, Any], by_layer: bool) -> None:
    plain, fast, _ = pair(scale_attn_by_inverse_layer_idx=by_layer, **scale)
    torch.testing.assert_close(fast.eval()(ids()).logits, plain.eval()(ids()).logits)


def test_cross_attention() -> None:
    plain, fast, report = pair(add_cross_attention=True)
    assert {e.reason for e in report.left_alone} == {"cross-attention"}
    x = ids()
    other = torch.randn(3, 5, 48)
    results = [m.eval()(x, encoder_hidden_states=other).logits for m in (plain, fast)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["GPT2Model", "GPT2ForSequenceClassification"])
def test_models_without_a_language_head(name: str) -> None:
    plain, fast, report = pair(model=name, pad_token_id=0, num_labels=3)
    assert report.counts() == {"embedding": 2, "layer_norm": 5, "attention": 2, "mlp": 2}
    x = ids()
    theirs, ours = (m.eval()(x, output_hidden_states=True) for m in (plain, fast))
    torch.testing.assert_close(ours[0], theirs[0])
    assert len(ours.hidden_states) == 3
    for first, second in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"padding_idx": 3}, "padding_idx=3"),
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
        ({"sparse": True}, "sparse=True"),
        ({}, ""),
    ],
)
def test_an_embedding_with_options_is_left_alone(options: dict[str, Any], reason: str) -> None:
    model = make(tie_word_embeddings=False)
    rows, columns = model.transformer.wte.weight.shape
    model.transformer.wte = nn.Embedding(rows, columns, **options)
    report = apply_gpt2fast_to_gpt2(model)
    entry = next(e for e in report.entries if e.name == "transformer.wte")
    assert (entry.replaced, entry.reason) == (not reason, reason)


def test_a_frozen_embedding_and_evaluation_are_theirs() -> None:
    _, fast, _ = pair()
    x = ids()
    with Spy() as spy:
        fast.eval()
        with torch.no_grad():
            fast(x)
        fast.transformer.wte.weight.requires_grad_(False)
        fast.transformer.wpe.weight.requires_grad_(False)
        fast.train()(x, labels=x).loss.backward()
    assert "layer_norm_backward" in spy.seen
    assert "embedding_forward" not in spy.seen


def test_dropout_is_drawn_in_training_only() -> None:
    plain, fast, report = pair(attn_pdrop=0.5)
    assert any("dropout drawn by our kernel" in e.reason for e in report.replaced)
    x = ids()
    torch.testing.assert_close(fast.eval()(x).logits, plain.eval()(x).logits)
    fast.train()
    assert not torch.equal(fast(x).logits.detach(), fast(x).logits.detach())
    # the mean over many draws is that of theirs
    with torch.no_grad():
        means = [
            torch.stack([m.transformer.h[0].attn(m.transformer.wte(x))[0] for _ in range(400)])
            for m in (plain.train(), fast)
        ]
    error = (means[0].mean(0) - means[1].mean(0)).abs() / (means[0].std(0) / 20 + 1e-9)
    assert error.mean() < 2


def test_dropout_of_residuals_draws_the_same_numbers() -> None:
    plain, fast, _ = pair(resid_pdrop=0.3, embd_pdrop=0.2)
    results = []
    for model in (plain, fast):
        torch.manual_seed(4)
        results.append(run(model.train(), ids(), None))
    for name, theirs in results[0].items():
        torch.testing.assert_close(results[1][name], theirs, msg=name)
    assert not torch.allclose(results[0]["loss"], run(plain.eval(), ids(), None)["loss"])


def test_another_epsilon() -> None:
    plain, fast, _ = pair(layer_norm_epsilon=0.1)
    torch.testing.assert_close(fast.eval()(ids()).logits, plain.eval()(ids()).logits)


def test_only_what_is_wanted() -> None:
    model = make()
    report = apply_gpt2fast_to_gpt2(model, attention=False, loss=False, embedding=False)
    assert report.counts() == {"layer_norm": 5, "mlp": 2}
    assert type(model.train()(ids(), labels=ids()).logits) is Tensor


def test_inside_a_wrapper_and_wrong_arguments() -> None:
    report = apply_gpt2fast_to_gpt2(nn.ModuleDict({"inner": make()}))
    assert report.entries[0].name == "inner.lm_head"
    with pytest.raises(ValueError, match="holds no Hugging Face GPT-2"):
        apply_gpt2fast_to_gpt2(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be"):
        apply_gpt2fast_to_gpt2("gpt2")  # type: ignore[arg-type]


def test_optimize_hands_it_over() -> None:
    model = make()
    report = gpt2fast.optimize(model)
    assert report.counts() == {
        "loss": 1,
        "embedding": 2,
        "layer_norm": 5,
        "attention": 2,
        "mlp": 2,
    }
    assert report.revert() == 12
