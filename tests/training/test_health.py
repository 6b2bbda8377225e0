"""Steps that are not sound: found, reported, and skipped without a trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT, GPTConfig
from gpt2fast.training import Diverged, TrainConfig, resume_run, start_run
from gpt2fast.training.health import PATIENCE, Health
from gpt2fast.training.trainer import Trainer
from tests.training.test_runs import assert_same_bits, stop_after, tensors


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_z_score_by_hand() -> None:
    health = Health(TrainConfig(spike_window=4, spike_threshold=3, on_spike="skip"))
    for loss in (1.0, 3.0, 1.0, 3.0):  # mean 2, deviation 1
        assert health.judge(loss, 1.0).action == "go"
    assert health.judge(5.0, 1.0).action == "go"  # 3 deviations, not more; the norm is as before
    verdict = health.judge(2.0, 1.001)  # the norms' deviation is 0
    assert verdict.action == "skip"
    assert "the gradient norm 1.001 is inf standard deviations" in verdict.reason
    again = Health(health.config)
    again.load_state_dict(json.loads(json.dumps(health.state_dict())))
    # 3, 3, 5, 2 of 1, 3, 5, 2 are seen now: mean 2.75, deviation 1.479
    for one in (health, again):
        told = one.judge(7.5, 1.0)
        assert told.action == "skip"
        assert "the loss 7.5 is 3.2 standard deviations above the mean 2.75 of 4" in told.reason


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_not_finite(policy: str) -> None:
    health = Health(TrainConfig(on_nonfinite=policy))
    assert health.judge(float("nan"), 1.0).action == policy
    assert health.judge(1.0, float("inf")).action == policy
    assert "gradient norm is inf" in health.judge(1.0, float("inf")).reason
    if policy == "skip":
        for _ in range(PATIENCE - 3):
            assert health.judge(1.0, float("nan")).action == "skip"
        assert health.judge(1.0, float("nan")).action == "stop"
        assert health.judge(1.0, 1.0).action == "go"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """NaN in one gradient of step 12; what weights and optimizer were before and after it."""
    seen: dict[str, Any] = {}
    original, measure = Trainer._train_step, "measure"

    def snapshot(trainer: Trainer) -> list[torch.Tensor]:
        states = trainer.optimizer.state_dict()["state"].values()
        found = [*trainer.model.state_dict().values(), *(t for s in states for t in s.values())]
        return [tensor.clone() for tensor in found]

    def step(self: Trainer) -> dict[str, Any]:
        if self.step != 11:
            return original(self)
        seen["before"] = snapshot(self)
        real = getattr(self.optimizer, measure)

        def with_nan() -> Any:
            grad = self.model.transformer.h[1].mlp.c_fc.bias.grad  # type: ignore[union-attr]
            grad[3] = float("nan")  # type: ignore[index]
            return real()

        monkeypatch.setattr(self.optimizer, measure, with_nan)
        try:
            return original(self)
        finally:
            monkeypatch.setattr(self.optimizer, measure, real)
            seen["after"] = snapshot(self)

    monkeypatch.setattr(Trainer, "_train_step", step)
    return seen


def unchanged(seen: dict[str, Any]) -> bool:
    pairs = zip(seen["before"], seen["after"], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_skipped_step_leaves_everything_untouched(
    tiny: dict[str, Any], tmp_path: Path, poisoned: dict[str, Any]
) -> None:
    result = start_run(TrainConfig(**tiny, on_nonfinite="skip"), tmp_path / "run")
    assert result.step == 20
    assert unchanged(poisoned)
    skipped = [r for r in records(tmp_path / "run") if "skip" in r]
    assert [r["step"] for r in skipped] == [12]
    assert skipped[0]["skip"] == "the gradient norm is nan"
    assert "grad_norm" not in skipped[0]
    assert all(t.isfinite().all() for n, t in tensors(result.checkpoint).items() if "." in n)


def test_stopping_leaves_the_weights_good(
    tiny_config: TrainConfig, tmp_path: Path, poisoned: dict[str, Any]
) -> None:
    with pytest.raises(Diverged, match=r"the gradient norm is nan at step 12 .*step_00000010"):
        start_run(tiny_config, tmp_path / "run")
    assert unchanged(poisoned)


def test_a_resumed_run_has_the_same_verdicts(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A low threshold: many steps are skipped, before the interruption and after it."""
    config = TrainConfig(**tiny, on_spike="skip", spike_threshold=0.3, spike_window=4)
    straight = start_run(config, tmp_path / "straight")
    stop_after(monkeypatch, 14)
    start_run(config, tmp_path / "run")
    monkeypatch.undo()
    assert_same_bits(resume_run(tmp_path / "run").checkpoint, straight.checkpoint)
    skipped = [
        [r["step"] for r in records(tmp_path / n) if "skip" in r] for n in ("straight", "run")
    ]
    assert skipped[0] == skipped[1]
    assert any(step <= 14 for step in skipped[0])
    assert any(step > 14 for step in skipped[0])


def test_the_norm_is_measured_once_and_anew_after_zero_grad() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=11, block_size=8))
    optimizer = model.configure_optimizer(max_norm=1.0)
    ones = torch.ones(1, 8, dtype=torch.int64)
    norms = []
    for scale in (1.0, 100.0):
        (scale * model(ones, ones)[1]).backward()
        norms.append(float(optimizer.measure()))  # type: ignore[arg-type]
        optimizer.zero_grad()
    model(ones, ones)[1].backward()
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(norms[0])  # type: ignore[arg-type]
    assert norms[1] == pytest.approx(100 * norms[0], rel=1e-4)
