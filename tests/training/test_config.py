"""The configuration: files, flags, and what is refused."""

import itertools
import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpt2fast.training.config import DEMONSTRATION, RESUMABLE, TrainConfig, load_config
from gpt2fast.training.schedule import FinalDecay, cosine, learning_rate, plan_final_decay


def test_derived_fields_are_numbers() -> None:
    config = TrainConfig(lr=1e-3, max_steps=200)
    assert config.model == "gpt2"
    assert config.min_lr == pytest.approx(1e-4)
    assert config.warmup_steps == 20
    assert TrainConfig(max_steps=19073).warmup_steps == 715


def test_unknown_field_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("batchsize = 3\n")
    with pytest.raises(ValueError, match=r"run\.toml: unknown field 'batchsize'.*'batch_size'"):
        load_config(path, {})
    with pytest.raises(ValidationError):
        TrainConfig(batchsize=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lr": "fast"}, "lr='fast'"),
        ({"lr": -1}, "lr=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"dropout": 1}, "dropout=1"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"backend": "tpu"}, "backend='tpu'"),
        ({"max_steps": "many"}, "max_steps='many'"),
        ({"warmup_steps": 20, "max_steps": 10}, "warmup_steps=20 is above max_steps=10"),
        ({"min_lr": 1, "lr": 0.1}, "min_lr=1.0 is above lr=0.1"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, object], told: str) -> None:
    for data in ({}, {"data": "somewhere"}):
        with pytest.raises(ValueError, match=told.replace("'", ".")):
            load_config(None, {**settings, **data})


def test_file_then_flags_then_demonstration(tmp_path: Path) -> None:
    toml, other = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text('data = "d"\nlr = 1e-3\nbatch_size = 2\n')
    other.write_text(json.dumps({"max_steps": 7}))
    config = load_config(toml, {"batch_size": "3"})
    assert (config.lr, config.batch_size, config.max_minutes) == (1e-3, 3, None)
    demonstration = load_config(other, {})
    assert demonstration.max_steps == 7
    assert demonstration.max_minutes == DEMONSTRATION["max_minutes"]
    assert load_config(None, {}).lr == DEMONSTRATION["lr"]


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "lr = = 1"), ("a.json", "{"), ("a.json", "[1]"), ("a.yaml", "")]
)
def test_files_that_are_no_configuration(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_config(tmp_path / name, {})


def test_saved_and_loaded(tmp_path: Path) -> None:
    config = TrainConfig(max_minutes=1.5, init_from="x", n_layer=3)
    config.save(tmp_path / "c.json")
    assert TrainConfig.load(tmp_path / "c.json") == config


def test_resume_refuses_what_matters() -> None:
    config = TrainConfig()
    assert config.resumed_with({"max_steps": "2000"}).max_steps == 2000
    assert config.resumed_with({"lr": "6e-4"}) == config
    with pytest.raises(ValueError, match=r"lr is 0\.0006 in the run and 0\.1 now"):
        config.resumed_with({"lr": 0.1})
    assert set(TrainConfig.model_fields) > RESUMABLE


def test_cosine_is_the_recipe() -> None:
    """Against the formula as build-nanogpt states it, at points worked out by hand."""
    shape = (6e-4, 6e-5, 715, 19073)
    assert cosine(0, *shape) == pytest.approx(6e-4 / 715)
    assert cosine(714, *shape) == pytest.approx(6e-4)
    assert cosine(715, *shape) == pytest.approx(6e-4)
    assert cosine((715 + 19073) // 2, *shape) == pytest.approx(3.3e-4)
    assert cosine(19073, *shape) == pytest.approx(6e-5)
    third = 715 + (19073 - 715) / 3
    assert cosine(round(third), *shape) == pytest.approx(6e-5 + 0.75 * 5.4e-4, rel=1e-4)


def test_final_decay_begins_when_the_rest_is_a_fifth() -> None:
    assert plan_final_decay(50, 100, 1.0, 50.0) is None  # all fits
    assert plan_final_decay(50, 100, 1.0, 40.0) is None  # too early
    assert plan_final_decay(60, 100, 1.0, 15.5) == FinalDecay(60, 15)
    assert plan_final_decay(60, 100, 1.0, -3.0) == FinalDecay(60, 1)


def test_final_decay_is_continuous_and_ends_at_min_lr() -> None:
    config = TrainConfig(max_steps=1000, warmup_steps=10, lr=1e-3)
    final = FinalDecay(400, 100)
    rates = [learning_rate(step, config, final) for step in range(390, 500)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert max(a - b for a, b in itertools.pairwise(rates)) < 1e-5
    assert learning_rate(399, config, final) == learning_rate(399, config)
    assert math.isclose(learning_rate(500, config, final), 1e-4)
