"""GPT against transformers' GPT-2 with the same random weights; files; cache; backends."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt2fast
from gpt2fast import GPT, GPTConfig, KVCache
from gpt2fast.huggingface import ModelUnavailable
from tests.ops.numerics import compare

TINY = GPTConfig(n_layer=2, n_head=5, n_embd=80, vocab_size=211, block_size=48)


def batch(config: GPTConfig, rows: int = 3, length: int = 29) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(config.vocab_size, (rows, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def randomised(config: GPTConfig) -> GPT:
    """A model whose biases and norms are not the trivial ones of the init."""
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model.eval()


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    randomised(TINY).save_pretrained(tmp_path)
    return tmp_path


def test_sizes_have_the_published_parameter_counts() -> None:
    published = {
        "gpt2": 124_475_904,  # V = 50304; 124,439,808 at V = 50257
        "gpt2-medium": 354_823_168 + 47 * 1024,
        "gpt2-large": 774_030_080 + 47 * 1280,
        "gpt2-xl": 1_557_611_200 + 47 * 1600,
    }
    for name, count in published.items():
        with torch.device("meta"):
            assert GPT(GPTConfig.from_name(name)).num_parameters() == count, name


def test_optimizer_groups_of_124m() -> None:
    with torch.device("meta"):
        groups = GPT(GPTConfig.from_name("gpt2")).configure_optimizer().param_groups
    decayed, rest = ([p.numel() for p in group["params"]] for group in groups)
    assert (len(decayed), sum(decayed)) == (50, 124_354_560)
    assert (len(rest), sum(rest)) == (98, 121_344)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_init() -> None:
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=1000, block_size=128))
    state = model.state_dict()
    for name, std in (
        ("transformer.wte.weight", 0.02),
        ("transformer.h.3.attn.c_attn.weight", 0.02),
        ("transformer.h.3.attn.c_proj.weight", 0.02 / 4),
        ("transformer.h.7.mlp.c_proj.weight", 0.02 / 4),
    ):
        values = state[name][:1000]
        assert values.std().item() == pytest.approx(std, rel=0.02), name
    assert not state["transformer.wte.weight"][1000:].any()
    assert not state["transformer.h.0.mlp.c_fc.bias"].any()
    assert (state["transformer.h.0.ln_2.weight"] == 1).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_loss_and_gradients_equal_transformers(pretrained: Path, backend: str) -> None:
    equal_to_transformers(pretrained, TINY, backend)


@pytest.mark.parametrize(("heads", "width"), [(12, 192), (16, 256), (20, 320), (25, 400)])
def test_small_versions_of_the_four_sizes_equal_transformers(
    tmp_path: Path, heads: int, width: int
) -> None:
    """The head counts of gpt2, -medium, -large and -xl, with heads of 16 in the place of 64."""
    config = GPTConfig(n_layer=2, n_head=heads, n_embd=width, vocab_size=307, block_size=64)
    randomised(config).save_pretrained(tmp_path)
    equal_to_transformers(tmp_path, config, "cpu")


def equal_to_transformers(pretrained: Path, config: GPTConfig, backend: str) -> None:
    """The fp64 rule with transformers' own fp32 model in the part of the reference."""
    from transformers import GPT2LMHeadModel

    idx, targets = batch(config)
    measured = {}
    for who, dtype in (("truth", torch.float64), ("theirs", torch.float32)):
        model = GPT2LMHeadModel.from_pretrained(pretrained, attn_implementation="eager")
        model.to(dtype).eval()
        logits = model(idx).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        grads = {
            name: p.grad.t()
            if name.endswith(("attn.weight", "proj.weight", "fc.weight"))
            else p.grad
            for name, p in model.named_parameters()
        }
        measured[who] = {"logits": logits.detach(), "loss": loss.detach(), **grads}
    ours = GPT.from_pretrained(pretrained)
    with gpt2fast.use_backend(backend):
        logits = ours(idx)
        nothing, loss = ours(idx, targets)
        loss.backward()
    assert nothing is None
    assert logits.shape == (*idx.shape, config.vocab_size)
    grads = {n: p.grad for n, p in ours.named_parameters()}
    assert not grads["transformer.wte.weight"][config.vocab_size :].any()
    grads["transformer.wte.weight"] = grads["transformer.wte.weight"][: config.vocab_size]
    found = {"logits": logits.detach(), "loss": loss.detach(), **grads}
    assert found.keys() == measured["truth"].keys()
    for name, value in found.items():
        compare(name, value, measured["theirs"][name], measured["truth"][name])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_loss_is_the_same_with_and_without_logits(backend: str) -> None:
    model, (idx, targets) = randomised(TINY), batch(TINY)
    targets[0, :5] = -100
    with gpt2fast.use_backend(backend):
        _, fused = model(idx, targets)
        logits, whole = model(idx, targets, return_logits=True)
    assert torch.equal(logits, model(idx)) or backend == "reference"
    torch.testing.assert_close(fused, whole)


def test_head_of_25_and_width_1600() -> None:
    """The shape of gpt2-xl, which is no power of two, with fewer layers."""
    config = GPTConfig(n_layer=1, n_head=25, n_embd=1600, vocab_size=50257, block_size=32)
    model, (idx, targets) = randomised(config), batch(config, 1, 17)
    losses = []
    for backend in ("cpu", "reference"):
        with gpt2fast.use_backend(backend):
            losses.append(model(idx, targets)[1])
    torch.testing.assert_close(*losses)


def test_prefix_of_the_input_gives_a_prefix_of_the_logits() -> None:
    model, (idx, _) = randomised(TINY), batch(TINY)
    with torch.no_grad():
        whole = model(idx)
        for length in (1, 7, 28):
            torch.testing.assert_close(model(idx[:, :length]), whole[:, :length])


@pytest.mark.parametrize("steps", [(29,), (1,) * 29, (5, 1, 1, 20, 2)])
def test_cached_logits_equal_uncached(steps: tuple[int, ...]) -> None:
    model, (idx, _) = randomised(TINY), batch(TINY)
    cache = KVCache(TINY, batch_size=3)
    end = 0
    with torch.no_grad():
        whole = model(idx)
    for step in steps:
        logits = model.forward_cached(idx[:, end : end + step], cache)
        end += step
        torch.testing.assert_close(logits, whole[:, end - 1])


def test_cache_refuses_more_than_it_holds() -> None:
    model, cache = randomised(TINY), KVCache(TINY, batch_size=1, capacity=4)
    with pytest.raises(ValueError, match="more than 4"):
        model.forward_cached(torch.zeros(1, 5, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="capacity must be between 1 and block_size=48"):
        KVCache(TINY, batch_size=1, capacity=49)


def test_save_and_load_keep_every_bit(pretrained: Path) -> None:
    model = GPT.from_pretrained(pretrained)
    again = pretrained / "again"
    model.save_pretrained(again)
    state = GPT.from_pretrained(again).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_loads_old_files_without_prefix_and_with_masks(pretrained: Path) -> None:
    path = pretrained / "model.safetensors"
    model = GPT.from_pretrained(pretrained)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path)
    assert torch.equal(
        GPT.from_pretrained(pretrained).transformer.wte.weight, model.transformer.wte.weight
    )


def cached(hub: Path, repository: str, commit: str = "c0ffee" * 6 + "abcd") -> Path:
    """A folder in which huggingface_hub finds the files of a repository that it has fetched."""
    top = hub / f"models--{repository.replace('/', '--')}"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(commit)
    snapshot = top / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no network."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "someone/their.model-2"])
def test_names_on_the_hub_are_read_from_the_cache(hub: Path, name: str) -> None:
    model = randomised(TINY)
    repository = name if "/" in name else f"openai-community/{name}"
    model.save_pretrained(cached(hub, repository))
    loaded = GPT.from_pretrained(name).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_a_model_in_several_files(hub: Path) -> None:
    model = randomised(TINY)
    snapshot = cached(hub, "someone/model")
    model.save_pretrained(snapshot)
    tensors = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, snapshot / file)
    index = {name: file for file, held in files.items() for name in held}
    path = snapshot / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    loaded = GPT.from_pretrained("someone/model").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    for wrong in ("../a.safetensors", "pytorch_model.bin"):
        path.write_text(json.dumps({"weight_map": {"x": wrong}}))
        with pytest.raises(ValueError, match="which is no safetensors file beside it"):
            GPT.from_pretrained(snapshot)


@pytest.mark.parametrize("name", ["gpt2-medium", "someone/model"])
def test_without_network_and_cache_it_says_what_to_do(hub: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable) as error:
        GPT.from_pretrained(name)
    repository = "openai-community/gpt2-medium" if name == "gpt2-medium" else name
    for part in (
        f"{name}: no such folder here",
        f"https://huggingface.co/{repository}",
        "config.json and model.safetensors",
        str(hub),
        "put them into a folder",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_repository_of_pickles_is_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    randomised(TINY).save_pretrained(hub)
    asked = []

    def serve(repository: str, file: str, **_: object) -> str:
        asked.append(file)
        if file == "config.json":
            return str(hub / file)
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", serve)
    with pytest.raises(ValueError, match="Pickled weights are not read"):
        GPT.from_pretrained("someone/pickles")
    assert asked == ["config.json", "model.safetensors", "model.safetensors.index.json"]


def test_a_folder_of_the_name_goes_first(hub: Path) -> None:
    model = randomised(TINY)
    model.save_pretrained("gpt2")
    assert torch.equal(
        GPT.from_pretrained("gpt2").transformer.wpe.weight, model.transformer.wpe.weight
    )


def test_broken_folders_are_named(pretrained: Path) -> None:
    path = pretrained / "model.safetensors"
    whole = path.read_bytes()
    config = json.loads((pretrained / "config.json").read_text())

    def broken(match: str, error: type[Exception] = ValueError, **changes: object) -> None:
        (pretrained / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=match):
            GPT.from_pretrained(pretrained)

    broken("model_type is 'llama'", model_type="llama")
    broken("activation_function 'gelu'", activation_function="gelu")
    broken("n_inner=7", n_inner=7)
    broken("tie_word_embeddings", tie_word_embeddings=False)
    broken(r"tensors are missing, the first transformer\.h\.2", n_layer=3)
    broken("unknown tensors", n_layer=1)
    broken("has shape", vocab_size=100)
    (pretrained / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, not an object"):
        GPT.from_pretrained(pretrained)
    path.write_bytes(whole[: len(whole) // 2])
    broken("may be cut short")
    path.unlink()
    broken("model.safetensors is missing", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="not a Hugging Face GPT-2 folder"):
        GPT.from_pretrained(pretrained / "nowhere")


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, (idx, targets) = randomised(TINY), batch(TINY)
    _, eager = model(idx, targets)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, loss = compiled(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, eager)


def test_dropout_trains_and_is_off_in_eval() -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=40, block_size=16, dropout=0.5)
    model, (idx, targets) = GPT(config), batch(config, 2, 16)
    torch.manual_seed(1)
    first = model(idx, targets)[1]
    torch.manual_seed(1)
    assert torch.equal(model(idx, targets)[1], first)
    assert not torch.equal(model(idx, targets)[1], first)
    model.eval()
    assert torch.equal(model(idx, targets)[1], model(idx, targets)[1])


def test_bfloat16_autocast_and_parameters() -> None:
    model, (idx, targets) = randomised(TINY), batch(TINY)
    expected = model(idx, targets)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-2)
    assert model.to(torch.bfloat16)(idx, targets)[1].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m([1, 2]), ValueError, r"idx must be a tensor of shape \(B, T\), got list"),
        (lambda m: m(torch.zeros(3)), ValueError, r"got \(3,\)"),
        (lambda m: m(torch.zeros(1, 3)), TypeError, "idx"),
        (lambda m: m(torch.zeros(1, 49, dtype=torch.int64)), ValueError, "more than 48"),
        (lambda m: m(torch.full((1, 3), 999)), IndexError, "999"),
        (
            lambda m: m(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "targets must have the shape of idx",
        ),
        (
            lambda m: m(torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), 211)),
            IndexError,
            "211",
        ),
    ],
)
def test_wrong_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(randomised(TINY))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 7}, "n_embd=768 is not divisible by n_head=7"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_config_is_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)  # type: ignore[arg-type]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown model 'gpt3'; known are gpt2, gpt2-medium"):
        GPTConfig.from_name("gpt3")


def test_tied_gradient(backend: str) -> None:
    """One dense gradient of embedding and head, also of either alone and over a retained graph."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=30, block_size=16)
    model = GPT(config)
    weight = model.transformer.wte.weight
    idx = torch.randint(30, (2, 9))
    with gpt2fast.use_backend(backend):
        # As PyTorch sums the parts of a parameter that is used twice.
        hidden = model.hidden(idx)
        loss = gpt2fast.functional.linear_cross_entropy(hidden, weight, idx, vocab_size=30)
        loss.backward()
        expected, weight.grad = weight.grad, None

        loss = model(idx, idx)[1]
        loss.backward(retain_graph=True)
        assert not weight.grad.is_sparse
        assert torch.equal(weight.grad, expected)
        loss.backward()
        assert torch.equal(weight.grad, 2 * expected)

        weight.grad = None
        logits = model(idx)
        gpt2fast.functional.cross_entropy(logits, idx).backward()
        torch.testing.assert_close(weight.grad, expected)

        # The embedding alone: a loss that the head is no part of.
        weight.grad = None
        rows, _ = model._tables()
        model.transformer(idx, None, None, rows).sum().backward()
        assert not weight.grad.is_sparse
        found, weight.grad = weight.grad, None
        model.hidden(idx).sum().backward()
        assert torch.equal(found, weight.grad)

        weight.requires_grad_(False).grad = None
        model(idx, idx)[1].backward()
        assert weight.grad is None
        assert model.transformer.wpe.weight.grad is not None


def test_second_derivatives_on_the_reference() -> None:
    """It is plain PyTorch throughout."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=30, block_size=16))
    idx = torch.randint(30, (2, 9))
    weight = model.transformer.wte.weight
    with gpt2fast.use_backend("reference"):
        (gradient,) = torch.autograd.grad(model(idx, idx)[1], weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.isfinite().all()
    assert second.any()


def test_gradient_checkpointing_changes_no_bit() -> None:
    """Blocks are computed twice, with the same dropout."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=30, block_size=8, dropout=0.2))
    idx = torch.randint(30, (3, 8))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.transformer.h[0].register_forward_pre_hook(count)
    found = []
    for again in (False, True):
        model.transformer.gradient_checkpointing = again
        torch.manual_seed(4)
        model.zero_grad()
        _, loss = model(idx, idx)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        assert calls == (3 if again else 1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestDocuments:
    """Packed documents: each is computed as if it were alone."""

    BORDERS = (0, 5, 20, 21, 30, 44, 60)  # rows of 30: one border falls on a row's

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_each_is_as_it_is_alone(self, backend: str) -> None:
        model = randomised(TINY)
        idx, targets = batch(TINY, 2, 30)
        targets[0, 3:9] = -100
        borders = torch.tensor(self.BORDERS, dtype=torch.int32)
        with gpt2fast.use_backend(backend):
            logits, loss = model(idx, targets, return_logits=True, cu_seqlens=borders)
            loss.backward()
        fused = model(idx, targets, cu_seqlens=borders)[1]
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        parts, summed = [], torch.zeros(())
        for start, end in itertools.pairwise(self.BORDERS):
            one = idx.flatten()[None, start:end]
            parts.append(model(one))
            summed = summed + torch.nn.functional.cross_entropy(
                parts[-1][0], targets.flatten()[start:end], reduction="sum"
            )
        expected = summed / (targets >= 0).sum()
        expected.backward()
        torch.testing.assert_close(logits.flatten(0, 1), torch.cat(parts, 1)[0])
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(fused, expected)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, msg=name)

    def test_a_cache_is_refused(self) -> None:
        model = randomised(TINY)
        with pytest.raises(ValueError, match="cu_seqlens cannot be given"):
            model.hidden(
                batch(TINY)[0], KVCache(TINY, 3), torch.tensor([0, 29, 58, 87], dtype=torch.int32)
            )
