"""Whole runs: learning, resuming, interruptions, and what is refused."""

import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt2fast import GPT, huggingface
from gpt2fast.training import CheckpointError, Diverged, TrainConfig, job, resume_run, start_run
from gpt2fast.training import checkpoint as checkpoints
from gpt2fast.training import trainer as trainers
from gpt2fast.training.checkpoint import find_checkpoint, find_model, list_checkpoints
from gpt2fast.training.compare import compare_with_reference

ROOT = Path(__file__).resolve().parents[2]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different
    states = [json.loads((folder / "training.json").read_text()) for folder in (a, b)]
    assert states[0]["trainer"]["loader"] == states[1]["trainer"]["loader"]


def steps(run: Path) -> list[int]:
    return [c.step for c in list_checkpoints(run / "checkpoints")]


def train_losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(found) == len(dict(found)), "a step is there twice"
    return dict(found)


@pytest.fixture(scope="module")
def straight(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Caches the uninterrupted run of the `tiny` settings for this module."""
    return {"folder": tmp_path_factory.mktemp("straight"), "checkpoint": None}


@pytest.fixture
def uninterrupted(straight: dict[str, Any], tiny_config: TrainConfig) -> Path:
    if straight["checkpoint"] is None:
        straight["checkpoint"] = start_run(tiny_config, straight["folder"] / "run").checkpoint
    return straight["checkpoint"]  # type: ignore[no-any-return]


def test_learns_more_than_the_bigram_model(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = functools.partial(compare_with_reference, seconds=0.5)
    monkeypatch.setattr(job, "compare_with_reference", short)
    settings = {**tiny, "max_steps": 300, "warmup_steps": 20, "dropout": 0, "grad_accum": 1}
    settings |= {"sample_tokens": 40, "eval_interval": 100, "compare_reference": True}
    result = start_run(TrainConfig(**settings), tmp_path / "run")
    assert result.val_loss is not None
    assert result.bigram_loss is not None
    assert result.val_loss < result.bigram_loss - 0.4
    for name in ("loss.png", "report.json", "sample.txt", "metrics.jsonl", "train_config.json"):
        assert (result.run / name).stat().st_size > 0, name
    assert len((result.run / "sample.txt").read_text()) == 41  # and the newline or first character
    report = json.loads((result.run / "report.json").read_text())
    assert report["tokens"] == 300 * 8 * 32
    assert "validation" in result.report
    assert "bigram" in result.report
    if result.comparison is not None:
        assert result.comparison.rounds >= 3
        assert "plain PyTorch" in result.report


def test_transformers_opens_the_checkpoint(uninterrupted: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(uninterrupted).eval()
    ours = GPT.from_pretrained(uninterrupted)
    idx = torch.randint(0, ours.config.vocab_size, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4)


def test_runs_repeat_to_the_bit(
    tiny_config: TrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    assert_same_bits(start_run(tiny_config, tmp_path / "run").checkpoint, uninterrupted)


def test_validation_does_not_change_the_run(
    tiny: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    config = TrainConfig(**{**tiny, "eval_interval": 0, "save_interval": 0})
    assert_same_bits(start_run(config, tmp_path / "run").checkpoint, uninterrupted)


def test_resume_is_exact(
    tiny_config: TrainConfig, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 steps, an interruption, and the other 10 in fresh objects."""
    stop_after(monkeypatch, 10)
    stopped = start_run(tiny_config, tmp_path / "run")
    assert (stopped.step, stopped.signal) == (10, signal.SIGINT)
    monkeypatch.undo()
    torch.manual_seed(99)
    random.seed(99)
    result = resume_run(tmp_path / "run")
    assert result.step == 20
    assert_same_bits(result.checkpoint, uninterrupted)
    assert sorted(train_losses(tmp_path / "run")) == list(range(1, 21))
    assert train_losses(tmp_path / "run") == train_losses(uninterrupted.parents[1])


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGINT, as Ctrl-C sends it, in the middle of the given step."""
    original = trainers.Trainer._train_step

    def step_with_signal(self: trainers.Trainer) -> dict[str, Any]:
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(trainers.Trainer, "_train_step", step_with_signal)


def test_resume_from_an_older_checkpoint(
    tiny_config: TrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    run = start_run(tiny_config, tmp_path / "run").run
    assert steps(run) == [15, 20]  # keep_checkpoints is 2
    result = resume_run(run / "checkpoints" / "step_00000015")
    assert_same_bits(result.checkpoint, uninterrupted)


def test_a_finished_run_goes_on_only_when_asked(tiny: dict[str, Any], tmp_path: Path) -> None:
    run = start_run(TrainConfig(**{**tiny, "max_steps": 6}), tmp_path / "run").run
    with pytest.raises(ValueError, match=r"is finished: step 6 of 6.*--max-steps"):
        resume_run(run)
    with pytest.raises(ValueError, match=r"seed is 1337 in the run and 3 now"):
        resume_run(run, {"seed": 3, "max_steps": 8})
    assert resume_run(run, {"max_steps": 8}).step == 8


def test_kills_at_any_point_lose_nothing_but_the_last_steps(
    tiny: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    """kill -9 at random moments, also while saving: each step is followed by a checkpoint."""
    run, draw = tmp_path / "run", random.Random(7)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny))
    every = ["--save-interval", "1"]
    last = 0
    for kill in range(3):
        where = ["--resume", str(run)] if kill else ["--config", str(config), "--out", str(run)]
        with spawn("train", *where, *every) as process:
            wait_for(run, process, last + draw.randint(2, 5))
            time.sleep(draw.uniform(0, 0.03))
            process.kill()
        lines = train_losses_of_killed(run)
        last = steps(run)[-1]
        assert last >= lines - 1  # save_interval is 1
    result = resume_run(run, {"save_interval": 5})
    assert_same_bits(result.checkpoint, uninterrupted)
    assert sorted(train_losses(run)) == list(range(1, 21))
    assert not list((run / "checkpoints").glob(".*"))


def spawn(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2fast", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train_losses_of_killed(run: Path) -> int:
    """The last step in the metrics; 0 if there is none."""
    path = run / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in whole if line.endswith("\n")]
    return max((record["step"] for record in records if "loss" in record), default=0)


def wait_for(run: Path, process: "subprocess.Popen[str]", step: int) -> None:
    deadline = time.monotonic() + 120
    while train_losses_of_killed(run) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(
    tiny: dict[str, Any], tmp_path: Path, number: int, code: int
) -> None:
    run, config = tmp_path / "run", tmp_path / "config.json"
    config.write_text(json.dumps({**tiny, "max_steps": 100_000, "save_interval": 0}))
    with spawn("train", "--config", str(config), "--out", str(run)) as process:
        wait_for(run, process, 3)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"gpt2fast train --resume {run}" in told
    assert "Traceback" not in told
    assert steps(run)[-1] == train_losses_of_killed(run)


def test_training_outside_the_main_thread(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Python delivers signals to the main thread only: then there is nothing to install."""
    done: list[int] = []
    config = TrainConfig(**{**tiny, "max_steps": 2, "warmup_steps": 1})
    thread = threading.Thread(target=lambda: done.append(start_run(config, tmp_path / "r").step))
    thread.start()
    thread.join()
    assert done == [2]


def test_the_time_limit_shortens_the_schedule(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny, "max_steps": 100_000, "warmup_steps": 5, "max_minutes": 3 / 60}
    result = start_run(TrainConfig(**{**settings, "save_interval": 0}), tmp_path / "run")
    assert 5 < result.step < 100_000
    report = json.loads((result.run / "report.json").read_text())
    assert report["seconds"] < 4.5
    lines = [json.loads(x) for x in (result.run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[-1] < 0.5 * max(rates)  # the final decay was taken
    with pytest.raises(ValueError, match=r"finished.*--max-minutes"):
        resume_run(result.run)


def test_a_loss_that_is_no_number_stops_the_run(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GPT.forward
    calls = 0

    def forward(self: GPT, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        logits, loss = original(self, *args, **kwargs)  # type: ignore[misc]
        calls += self.training
        return logits, loss * float("nan") if calls == 24 else loss

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(Diverged, match=r"loss is nan at step 12 .*step_00000010"):
        start_run(tiny_config, tmp_path / "run")
    assert steps(tmp_path / "run")[-1] == 10
    good = load_file(tmp_path / "run/checkpoints/step_00000010/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in good.values())


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoints.save_file
    saved = 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"the disk is full; .*step_00000010") as caught:
        start_run(tiny_config, tmp_path / "run")
    assert caught.value.errno == errno.ENOSPC
    assert steps(tmp_path / "run") == [5, 10]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert resume_run(tmp_path / "run").step == 20


def test_safetensors_own_words_for_a_full_disk(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(OSError, match="the disk is full; there is no earlier checkpoint"):
        start_run(tiny_config, tmp_path / "run")


class TestDamage:
    """What a user finds after a crash of the machine, or his own editing."""

    @pytest.fixture
    def run(self, uninterrupted: Path, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(uninterrupted.parents[1], tmp_path / "run"))

    @pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
    def test_truncated_file(self, run: Path, uninterrupted: Path, name: str) -> None:
        newest = run / "checkpoints" / "step_00000020"
        with open(newest / name, "r+b") as file:
            file.truncate(100)
        with pytest.raises(CheckpointError, match=rf"{name}: 100 bytes.*Whole is .*step_00000015"):
            find_checkpoint(newest)
        damaged: list[str] = []
        assert find_checkpoint(run, damaged).step == 15
        assert name in damaged[0]
        result = resume_run(run)
        assert_same_bits(result.checkpoint, uninterrupted)
        assert steps(run) == [15, 20]

    @pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "training.json"])
    def test_missing_file(self, run: Path, name: str) -> None:
        (run / "checkpoints" / "step_00000020" / name).unlink()
        assert find_checkpoint(run).step == 15

    def test_same_size_but_garbage(self, run: Path) -> None:
        path = run / "checkpoints" / "step_00000015" / "training.safetensors"
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(CheckpointError, match=r"training\.safetensors"):
            resume_run(run / "checkpoints" / "step_00000015")

    def test_of_another_version(self, run: Path) -> None:
        """Its weights can be had still."""
        folder = run / "checkpoints" / "step_00000015"
        manifest = folder / "checkpoint.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 1}))
        with pytest.raises(CheckpointError, match=r"version 1 and not 2.*--init-from"):
            resume_run(folder)
        assert find_model(folder) == folder

    def test_leftovers_of_a_kill_are_ignored_and_removed(self, run: Path) -> None:
        folder = run / "checkpoints"
        (folder / ".writing-step_00000025").mkdir()
        (folder / ".writing-step_00000025" / "model.safetensors").write_bytes(b"half")
        (folder / ".deleting-step_00000005").mkdir()
        (folder / "notes").mkdir()
        assert find_checkpoint(run).step == 20
        resume_run(run, {"max_steps": 21})
        assert sorted(p.name for p in folder.iterdir()) == [
            "notes", "step_00000020", "step_00000021",
        ]  # fmt: skip

    def test_nothing_whole(self, run: Path) -> None:
        for path in (run / "checkpoints").glob("step_*"):
            (path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            resume_run(run)

    def test_other_folders(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            resume_run(tmp_path / "nowhere")
        (tmp_path / "x").mkdir()
        with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
            resume_run(tmp_path / "x")

    def test_other_data_is_refused(self, run: Path, text_data: Path, tmp_path: Path) -> None:
        from gpt2fast.data import prepare

        path = run / "checkpoints" / "step_00000020" / "train_config.json"
        config = json.loads(path.read_text())
        (tmp_path / "other.txt").write_text("abc " * 2000)
        prepare(
            "text", tmp_path / "d", input=tmp_path / "other.txt", tokenizer="char", progress=False
        )
        config["data"] = str(tmp_path / "d")
        text = json.dumps(config)
        path.write_text(text)
        manifest = path.with_name("checkpoint.json")
        told = json.loads(manifest.read_text())
        told["files"][path.name] = len(text)
        manifest.write_text(json.dumps(told))
        with pytest.raises(ValueError, match="char vocabulary of"):
            resume_run(run, {"max_steps": 30})


class TestWeightsOfAnotherRun:
    """--init-from"""

    def test_starts_from_the_weights(
        self, tiny: dict[str, Any], uninterrupted: Path, tmp_path: Path
    ) -> None:
        settings = {k: v for k, v in tiny.items() if not k.startswith(("n_", "model"))}
        config = TrainConfig(**{**settings, "init_from": str(uninterrupted), "max_steps": 5})
        result = start_run(config, tmp_path / "run")
        first = train_losses(result.run)[1]
        assert first < train_losses(uninterrupted.parents[1])[1] - 0.5

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"n_layer": 3}, "n_layer=2, not 3"),
            ({"model": "gpt2"}, "n_embd=32, not 768"),
            ({"block_size": 64}, "block_size=64 is more than the 32 positions"),
        ],
    )
    def test_another_shape(
        self, tiny: dict[str, Any], uninterrupted: Path, tmp_path: Path,
        settings: dict[str, Any], told: str,
    ) -> None:  # fmt: skip
        base = {k: v for k, v in tiny.items() if not k.startswith(("n_", "model"))}
        config = TrainConfig(**{**base, "init_from": str(uninterrupted), **settings})
        with pytest.raises(ValueError, match=told):
            start_run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_another_vocabulary(
        self, tiny: dict[str, Any], uninterrupted: Path, tmp_path: Path
    ) -> None:
        from gpt2fast.data import prepare

        (tmp_path / "other.txt").write_text("hello world " * 2000)
        prepare(
            "text", tmp_path / "d", input=tmp_path / "other.txt", tokenizer="byte", progress=False
        )
        base = {k: v for k, v in tiny.items() if not k.startswith(("n_", "model"))}
        config = TrainConfig(
            **{**base, "init_from": str(uninterrupted), "data": str(tmp_path / "d")}
        )
        with pytest.raises(ValueError, match=r"char vocabulary of \d+.*byte vocabulary of 257"):
            start_run(config, tmp_path / "run")


class TestFolders:
    def test_a_run_is_not_overwritten_unasked(self, tiny: dict[str, Any], tmp_path: Path) -> None:
        config = TrainConfig(**{**tiny, "max_steps": 2, "warmup_steps": 1})
        start_run(config, tmp_path / "run")
        before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
        with pytest.raises(FileExistsError, match="--overwrite"):
            start_run(config, tmp_path / "run")
        assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
        assert start_run(config, tmp_path / "run", overwrite=True).step == 2

    def test_other_files_are_never_deleted(self, tiny_config: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years")
        with pytest.raises(FileExistsError, match="not a run"):
            start_run(tiny_config, tmp_path, overwrite=True)
        assert (tmp_path / "thesis.tex").read_text() == "years"

    def test_data_in_the_run_folder(self, tiny: dict[str, Any], tmp_path: Path) -> None:
        config = TrainConfig(**{**tiny, "data": str(tmp_path / "run" / "data")})
        with pytest.raises(ValueError, match="lies in the run folder"):
            start_run(config, tmp_path / "run", overwrite=True)

    def test_the_default_name_is_the_next_number(
        self, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "007").mkdir(parents=True)
        config = TrainConfig(**{**tiny, "max_steps": 1, "warmup_steps": 0})
        assert start_run(config).run == Path("runs/008")

    def test_a_folder_that_cannot_be_made(self, tiny_config: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError):
            start_run(tiny_config, tmp_path / "file" / "run")


def test_bfloat16_and_reference_backend(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny, "max_steps": 30, "dropout": 0.0}
    losses = {
        name: start_run(TrainConfig(**settings, **more), tmp_path / name).val_loss
        for name, more in {
            "float32": {},
            "bfloat16": {"dtype": "bfloat16"},
            "reference": {"backend": "reference"},
        }.items()
    }
    assert losses["reference"] == pytest.approx(losses["float32"], rel=1e-3)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert load_file(tmp_path / "bfloat16/checkpoints/step_00000030/model.safetensors")[
        "transformer.ln_f.weight"
    ].dtype == torch.float32  # fmt: skip


def test_data_too_short_leaves_an_earlier_run_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    start_run(TrainConfig(**{**tiny, "max_steps": 2, "warmup_steps": 1}), out)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ValueError, match="block_size 100000 needs"):
        start_run(TrainConfig(**{**tiny, "block_size": 100_000}), out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before
    with pytest.raises(ValueError, match="block_size 100000 needs"):
        start_run(TrainConfig(**{**tiny, "block_size": 100_000}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
