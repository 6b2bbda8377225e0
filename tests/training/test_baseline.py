"""The bigram models: counted against counting by hand, trained against the counted."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2fast import GPT, GPTConfig
from gpt2fast.bigram import BIGRAMS
from gpt2fast.cli import main
from gpt2fast.data import TokenDataset
from gpt2fast.training import TrainConfig, resume_run, start_run
from gpt2fast.training.baseline import ALPHAS, Bigram
from gpt2fast.training.trainer import evaluate
from tests.ops.numerics import compare
from tests.training.test_runs import assert_same_bits


def test_probabilities_by_hand() -> None:
    bigram = Bigram([np.array([0, 1, 0, 1, 2]), np.array([1, 1])], vocab_size=4)
    # unigram counts 2, 4, 1, 0 of 7; pairs 01: 2, 10: 1, 12: 1, 11: 1; none over the border
    unigram = np.array([3, 5, 2, 1]) / 11
    for alpha in (0.5, 2.0):
        table = np.array([[0, 2, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], float)
        table = (table + alpha * unigram) / (table.sum(1, keepdims=True) + alpha)
        a, b = np.divmod(np.arange(16), 4)
        np.testing.assert_allclose(bigram.probabilities(a, b, alpha), table.ravel())
        np.testing.assert_allclose(table.sum(1), 1)


def test_loss_is_the_mean_over_all_targets_with_the_best_alpha() -> None:
    draw = np.random.default_rng(0)
    train, val = draw.integers(0, 5, 1000), draw.integers(0, 5, 65)
    bigram = Bigram([train.astype(np.uint16)], 5)
    x, y = torch.from_numpy(val[:-1].copy()), torch.from_numpy(val[1:].copy())
    batches = [(x[:40].view(4, 10), y[:40].view(4, 10)), (x[40:].view(1, 24), y[40:].view(1, 24))]
    losses = [-np.log(bigram.probabilities(val[:-1], val[1:], a)).mean() for a in ALPHAS]
    assert bigram.loss(batches) == pytest.approx(min(losses))
    assert bigram.loss(batches) == pytest.approx(math.log(5), abs=0.05)  # uniform text


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Bigram([], 5)


@pytest.fixture(params=BIGRAMS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_trained_bigrams_by_their_formula(kind: str) -> None:
    """Loss and gradients, by the numerics rule, of the formula on one-hot tokens."""
    torch.manual_seed(4)
    config = GPTConfig(1, 1, 24, vocab_size=50, block_size=16)
    model = BIGRAMS[kind](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    idx, targets = torch.randint(50, (2, 3, 16))

    def by_formula(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weights = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters()}
        own = {name.removeprefix("transformer."): p for name, p in weights.items()}
        x = F.one_hot(idx, config.padded_vocab_size).to(dtype) @ own["input.weight"]
        if "linear.weight" in own:
            x = x @ own["linear.weight"].T
        logits = torch.tanh(x + own["bias"]) @ own["wte.weight"].T
        loss = F.cross_entropy(logits[..., :50].flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in weights.items() if p.grad is not None}

    (truth, true_gradients), (near, near_gradients) = map(
        by_formula, (torch.float64, torch.float32)
    )
    _, loss = model(idx, targets)
    loss.backward()
    compare("loss", loss.detach(), near, truth)
    assert true_gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        compare(name, parameter.grad, near_gradients[name], true_gradients[name])


def test_trained_bigrams_end_where_counting_does(
    kind: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """On their own training text no bigram model is better than the counts, and these come near."""
    shape = {"model": kind, "n_layer": None, "n_head": None, "n_embd": 32, "dropout": 0.0}
    settings = {**tiny, **shape, "max_steps": 300, "lr": 0.02, "eval_interval": 0}
    result = start_run(TrainConfig(**{**settings, "save_interval": 0}), tmp_path / "run")
    model, data = GPT.from_pretrained(result.checkpoint), TokenDataset(settings["data"], "train")
    assert type(model) is BIGRAMS[kind]
    loss = evaluate(model, data, TrainConfig(**settings), batches=10**6)
    tokens = np.concatenate([np.asarray(shard, dtype=np.int64) for shard in data.shards])
    counts = np.zeros((model.config.vocab_size,) * 2)
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    rows = counts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        least = -np.nansum(np.where(counts > 0, counts * np.log(counts / rows), 0)) / rows.sum()
    assert loss is not None
    # The last row may be left out: a thousandth of the text.
    assert least * 0.999 < loss < least * 1.03
    assert result.bigram_loss is not None
    assert result.val_loss == pytest.approx(result.bigram_loss, rel=0.03)


def test_trained_bigrams_in_every_command(
    kind: str, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"model": kind, "n_layer": None, "n_head": None, "n_embd": None, "dropout": 0.0}
    settings = {**tiny, **shape, "eval_interval": 0, "sample_tokens": 5}
    straight = start_run(TrainConfig(**settings), tmp_path / "straight")
    run = start_run(TrainConfig(**settings), tmp_path / "run").run
    resumed = resume_run(run / "checkpoints/step_00000015")
    assert_same_bits(resumed.checkpoint, straight.checkpoint)
    assert json.loads((resumed.checkpoint / "config.json").read_text())["model_type"] == kind
    model = GPT.from_pretrained(run / "checkpoints/step_00000020")
    logits = model(torch.tensor([[3, 5], [4, 5]]))
    assert torch.equal(logits[0, 1], logits[1, 1])
    assert not torch.equal(logits[0, 0], logits[1, 0])
    assert main(["sample", str(run), "--max-new-tokens", "4", "--greedy"]) == 0
    assert main(["eval", "loss", str(run), "--data", settings["data"]]) == 0
    capsys.readouterr()
    for out in ("folder", "file.bin"):
        assert main(["export", str(run), "--out", str(tmp_path / out)]) == 1
        assert f"no {kind}" in capsys.readouterr().err
    assert main(["sample", str(run), "--weights", "int8"]) == 1
    assert "model must be a GPT" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{kind} has n_embd, but no n_layer"):
        start_run(TrainConfig(**{**settings, "n_layer": 2}), tmp_path / "other")
