"""Two processes against one: the same losses, checkpoints for any number, and how it all ends."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from gpt2fast import GPT, GPTConfig, use_backend
from gpt2fast.cli import main
from gpt2fast.data import BatchLoader, ByteTokenizer, TokenDataset, prepare
from gpt2fast.evaluation import evaluate_hellaswag
from gpt2fast.optim import AdamW
from gpt2fast.training import CheckpointError, TrainConfig, resume_run, start_run
from gpt2fast.training import trainer as trainers
from gpt2fast.training.checkpoint import find_checkpoint
from gpt2fast.training.distributed import Forward, Ranks, environment, gathered, share_rows
from tests.evaluation.test_hellaswag import made_up, write
from tests.ops.numerics import compare
from tests.training.test_runs import (
    ROOT,
    assert_same_bits,
    steps,
    train_losses,
    train_losses_of_killed,
    wait_for,
)
from tests.training.two_processes import Two, free_port
from tests.training.two_processes import environment as environment_of

PARALLEL = ("ddp", "fsdp")
STORED = (("ddp", "whole"), ("fsdp", "whole"), ("ddp", "sharded"), ("fsdp", "sharded"))


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[Two]]:
    """The two processes, last in the list; those before them have died."""
    started: list[Two] = [Two()]
    yield started
    for pair in started:
        pair.close()


def living(pairs: list[Two]) -> Two:
    if not pairs[-1].alive:  # which failed the test before, and shall fail no other
        pairs.append(Two())
    return pairs[-1]


@pytest.fixture
def two(pairs: list[Two]) -> Two:
    return living(pairs)


@pytest.fixture
def settings(tiny: dict[str, Any]) -> dict[str, Any]:
    """Ten steps without dropout, whose noise differs by process."""
    return {**tiny, "max_steps": 10, "dropout": 0.0, "eval_interval": 5, "eval_batches": 3}


# Called in the two processes.


def start(settings: dict[str, Any], run: Path) -> dict[str, Any]:
    result = start_run(TrainConfig(**settings), run)
    return {"step": result.step, "signal": result.signal, "val_loss": result.val_loss}


def resume(run: Path, **changes: Any) -> int:
    return resume_run(run, changes).step


def interrupted(settings: dict[str, Any], run: Path, step: int) -> dict[str, Any]:
    """SIGTERM to the second process alone, in the middle of a step."""
    original = trainers.Trainer._train_step

    def with_signal(self: trainers.Trainer) -> dict[str, Any]:
        if self.step == step - 1 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.Trainer, "_train_step", with_signal)
        return start(settings, run)


# Losses


def val_losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


def distance(run: Path, other: Path) -> float:
    """The largest difference between the two runs' losses of a step."""
    a, b = train_losses(run), train_losses(other)
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Caches runs of one process for this module."""
    return {"folder": tmp_path_factory.mktemp("one")}


@pytest.fixture
def alone(one: dict[str, Any], settings: dict[str, Any]) -> Path:
    """The run of one process."""
    if "run" not in one:
        one["run"] = start_run(TrainConfig(**settings), one["folder"] / "run").run
    return one["run"]  # type: ignore[no-any-return]


@pytest.fixture
def rounding(one: dict[str, Any], alone: Path, settings: dict[str, Any]) -> float:
    """How far the losses of a step may lie apart when the same numbers are summed in another order.

    That is what one process differs from itself when it takes the same 16 rows as 1, 4 or 8
    micro-batches; twice that by the numerics rule, and an ulp of the loss.
    """
    if "rounding" not in one:
        found = []
        for rows in (16, 4, 2):
            config = TrainConfig(**{**settings, "batch_size": rows, "grad_accum": 16 // rows})
            run = start_run(config, one["folder"] / f"rows{rows}").run
            found.append(distance(run, alone))
        assert 0 < max(found) < 1e-4
        largest = max(train_losses(alone).values())
        one["rounding"] = 2 * max(found) + torch.finfo(torch.float32).eps * largest
    return one["rounding"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize(("batch_size", "grad_accum"), [(8, 2), (4, 4), (16, 1)])
def test_the_losses_of_two_are_those_of_one(
    two: Two, settings: dict[str, Any], alone: Path, rounding: float, tmp_path: Path,
    parallel: str, batch_size: int, grad_accum: int,
) -> None:  # fmt: skip
    """16 rows a step: one or two micro-batches for each process, and one that is split."""
    asked = {"parallel": parallel, "batch_size": batch_size, "grad_accum": grad_accum}
    # The same 24 rows of validation as alone.
    asked["eval_batches"] = 24 // batch_size if batch_size < 24 else 1
    if batch_size == 16:
        asked["eval_interval"] = 0
    first, second = two(start, {**settings, **asked}, tmp_path / "run")
    assert first == second
    assert first["step"] == 10
    assert distance(tmp_path / "run", alone) <= rounding
    if batch_size < 16:
        for ours, theirs in zip(val_losses(tmp_path / "run"), val_losses(alone), strict=True):
            assert abs(ours - theirs) <= rounding
    kept = load_file(tmp_path / "run/checkpoints/step_00000010/training.safetensors")
    expected = load_file(alone / "checkpoints/step_00000010/training.safetensors")
    assert {k: v.shape for k, v in kept.items() if k.startswith("optimizer")} == {
        k: v.shape for k, v in expected.items() if k.startswith("optimizer")
    }


@pytest.mark.parametrize("parallel", PARALLEL)
def test_responses_weigh_the_same_in_every_process(
    two: Two, settings: dict[str, Any], tmp_path: Path, parallel: str
) -> None:
    """Rows with one target or thirty: the mean is over all targets of a step, wherever they are."""
    source = tmp_path / "pairs.jsonl"
    with source.open("w") as lines:
        for i in range(200):
            short, long = "x" * (1 + i % 3), "abcd" * (1 + i % 7)
            pair = (long, short) if i % 2 else (short, long)
            lines.write(json.dumps(dict(zip(("prompt", "response"), pair, strict=True))) + "\n")
    prepare(str(source), tmp_path / "data", tokenizer="byte", supervised=True, progress=False)
    settings = {**settings, "data": str(tmp_path / "data"), "max_steps": 5, "eval_interval": 0}
    runs = []
    for rows in (8, 4, 2):
        config = TrainConfig(**{**settings, "batch_size": rows, "grad_accum": 8 // rows})
        runs.append(start_run(config, tmp_path / f"rows{rows}").run)
    found = max(distance(runs[0], run) for run in runs[1:])
    bound = 2 * found + torch.finfo(torch.float32).eps * max(train_losses(runs[0]).values())
    asked = {"parallel": parallel, "batch_size": 2, "grad_accum": 4}
    two(start, {**settings, **asked}, tmp_path / "both")
    assert distance(tmp_path / "both", runs[0]) <= bound
    assert bound < 1e-4


def ranks_here() -> Ranks:
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def gradients(settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of two accumulated micro-batches of each process, or of the same rows by one."""
    config, ranks = TrainConfig(**{**settings, "batch_size": 4, "grad_accum": 4}), ranks_here()
    torch.manual_seed(3)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=24, vocab_size=50, block_size=32)).to(dtype)
    model = ranks.shard(model, config)
    size, count = share_rows(config, ranks.world_size)
    data = TokenDataset(config.data or "", "train")
    loader = BatchLoader(
        data, size, config.block_size, rank=ranks.rank, world_size=ranks.world_size
    )
    forward = Forward(model, config, ranks)
    for left in reversed(range(count)):
        (forward(*next(loader), sync=left == 0) / count).backward()
    return {n: gathered(p.grad).detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("parallel", PARALLEL)
def test_gradients_by_the_numerics_rule(two: Two, settings: dict[str, Any], parallel: str) -> None:
    with use_backend("reference"):
        truth = gradients(settings, torch.float64)
    expected = gradients(settings, torch.float32)
    for measured in two(gradients, {**settings, "parallel": parallel}, torch.float32):
        assert measured.keys() == truth.keys()
        for name in truth:
            compare(name, measured[name], expected[name], truth[name])


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "world_size", "share"),
    [(8, 4, 1, (8, 4)), (8, 4, 2, (8, 2)), (8, 4, 8, (4, 1)), (6, 3, 2, (3, 3)), (5, 3, 3, (5, 1))],
)
def test_rows_are_shared_out(
    batch_size: int, grad_accum: int, world_size: int, share: tuple[int, int]
) -> None:
    config = TrainConfig(batch_size=batch_size, grad_accum=grad_accum)
    assert share_rows(config, world_size) == share


def test_rows_that_cannot_be_shared(two: Two, settings: dict[str, Any], tmp_path: Path) -> None:
    asked = {**settings, "batch_size": 5, "grad_accum": 1}
    for error in two.outcomes(start, asked, tmp_path / "run"):
        assert isinstance(error, ValueError)
        assert "5 rows a step (batch_size=5 x grad_accum=1)" in str(error)
    assert not (tmp_path / "run").exists()


# Going on


@pytest.mark.parametrize(("parallel", "checkpoint"), STORED)
def test_from_two_to_one(
    two: Two, settings: dict[str, Any], alone: Path, rounding: float, tmp_path: Path, parallel: str,
    checkpoint: str,
) -> None:  # fmt: skip
    """Stopped at step 6 by a signal to one of two, and ended by one."""
    run = tmp_path / "run"
    asked = {**settings, "parallel": parallel, "checkpoint": checkpoint}
    found = two(interrupted, asked, run, 6)
    assert [(end["step"], end["signal"]) for end in found] == [(6, signal.SIGTERM)] * 2
    assert resume(run) == 10
    assert distance(run, alone) <= rounding
    states = [
        json.loads((folder / "checkpoints/step_00000010/training.json").read_text())["trainer"]
        for folder in (run, alone)
    ]
    assert states[0]["loader"] == states[1]["loader"]


@pytest.mark.parametrize(("parallel", "checkpoint"), STORED)
def test_from_one_to_two(
    two: Two, settings: dict[str, Any], alone: Path, rounding: float, tmp_path: Path, parallel: str,
    checkpoint: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = trainers.Trainer._train_step

        def with_signal(self: trainers.Trainer) -> dict[str, Any]:
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self)

        patch.setattr(trainers.Trainer, "_train_step", with_signal)
        assert start({**settings, "checkpoint": checkpoint}, run)["step"] == 6
    assert two(resume, run, parallel=parallel) == [10, 10]
    assert distance(run, alone) <= rounding


@pytest.mark.parametrize(("parallel", "checkpoint"), STORED)
def test_two_go_on_bit_for_bit(
    two: Two, settings: dict[str, Any], tmp_path: Path, parallel: str, checkpoint: str
) -> None:
    """With dropout, and so with the random generators of both."""
    asked = {**settings, "dropout": 0.1, "parallel": parallel, "checkpoint": checkpoint}
    two(start, asked, tmp_path / "straight")
    two(interrupted, asked, tmp_path / "broken", 6)
    assert two(resume, tmp_path / "broken") == [10, 10]
    end = "checkpoints/step_00000010"
    assert_same_bits(tmp_path / "broken" / end, tmp_path / "straight" / end)
    kept = load_file(tmp_path / "straight" / end / "training.safetensors")
    assert not torch.equal(kept["random.0.torch"], kept["random.1.torch"])


def test_checkpointing_activations_changes_no_bit(
    two: Two, settings: dict[str, Any], tmp_path: Path
) -> None:
    asked = {**settings, "dropout": 0.1, "parallel": "fsdp", "max_steps": 3, "warmup_steps": 1}
    two(start, asked, tmp_path / "kept")
    two(start, {**asked, "gradient_checkpointing": True}, tmp_path / "again")
    end = "checkpoints/step_00000003"
    assert_same_bits(tmp_path / "again" / end, tmp_path / "kept" / end)


# Checkpoints in parts


def room(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.fixture(scope="module")
def parts(
    pairs: list[Two], text_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The last checkpoint of a run of four steps, whole and sharded."""
    two, found = living(pairs), {}
    for checkpoint in ("whole", "sharded"):
        found[checkpoint] = tmp_path_factory.mktemp(checkpoint) / "run"
        asked = {
            "n_layer": 2, "n_head": 2, "n_embd": 33 * 2, "block_size": 32, "batch_size": 4,
            "data": str(text_data), "max_steps": 4, "warmup_steps": 1, "save_interval": 3,
            "eval_interval": 0, "eval_batches": 1, "sample_tokens": 0, "threads": 1,
            "parallel": "fsdp", "checkpoint": checkpoint, "deterministic": True,
        }  # fmt: skip
        two(start, asked, found[checkpoint])
    return found


def test_parts_are_the_whole(parts: dict[str, Path]) -> None:
    whole, sharded = (run / "checkpoints/step_00000004" for run in parts.values())
    assert (sharded / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    shards = sorted((sharded / "optimizer").iterdir())
    assert len(shards) == 2
    expected = load_file(whole / "training.safetensors")
    found = Ranks().read_parts(sharded / "optimizer", room)
    found |= load_file(sharded / "training.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Each process wrote about half, and nobody a pickle.
    sizes = [path.stat().st_size for path in shards]
    assert max(sizes) < 0.6 * sum(sizes)
    endings = {path.suffix for path in sharded.rglob("*") if path.is_file()}
    assert endings == {".json", ".safetensors"}


def test_a_sharded_checkpoint_is_a_model(parts: dict[str, Path], tmp_path: Path) -> None:
    assert main(["sample", str(parts["sharded"]), "--max-new-tokens", "3"]) == 0
    for kind, run in parts.items():
        assert main(["export", str(run), "--out", str(tmp_path / kind)]) == 0
    written = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in parts]
    assert written[0] == written[1]


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_a_damaged_part(parts: dict[str, Path], tmp_path: Path, damage: str) -> None:
    run = Path(shutil.copytree(parts["sharded"], tmp_path / "run"))
    newest = run / "checkpoints/step_00000004"
    path = sorted((newest / "optimizer").iterdir())[1]
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, 100)
    else:
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(CheckpointError, match=f"{newest}/optimizer: "):
            resume_run(run, {"max_steps": 5})
        return
    with pytest.raises(CheckpointError, match=f"{path.name}: .*Whole is .*step_00000003"):
        find_checkpoint(newest)
    assert find_checkpoint(run).step == 3


def both_ways(folder: Path) -> dict[str, Tensor]:
    """Tensors of which a process holds little or nothing, written and read again."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

    def parted(tensor: Tensor) -> Tensor:
        return dist.tensor.distribute_tensor(tensor, mesh, [dist.tensor.Shard(0)])

    torch.manual_seed(5)
    tensors = {f"optimizer.{i}.x": torch.randn(3 - i, 4).bfloat16() for i in range(3)}
    tensors["optimizer.3.x"] = torch.randn(5)
    ranks, alike = ranks_here(), {"optimizer.0.step": torch.tensor(7.0)}
    written = {name: parted(tensor) for name, tensor in tensors.items()}
    ranks.write_parts(folder, {**written, **alike})
    found = ranks.read_parts(folder, lambda *what: parted(room(*what)) if what[1] else room(*what))
    for name, tensor in found.items():
        assert torch.equal(gathered(tensor), {**tensors, **alike}[name])
    return {**tensors, **alike}


def test_parts_of_nothing(two: Two, tmp_path: Path) -> None:
    expected, _ = two(both_ways, tmp_path / "parts")
    found = Ranks().read_parts(tmp_path / "parts", room)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def with_a_full_disk_on_the_second(settings: dict[str, Any], run: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter as Writer

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.MonkeyPatch.context() as patch:
        start({**settings, "max_steps": 5}, run)
        if dist.get_rank() == 1:
            patch.setattr(Writer, "write_data", full)
        resume(run, max_steps=6)


def test_a_part_that_cannot_be_written(two: Two, settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = {**settings, "parallel": "fsdp", "checkpoint": "sharded"}
    for error in two.outcomes(with_a_full_disk_on_the_second, asked, run):
        assert isinstance(error, OSError)
        assert "the disk is full; the last good checkpoint is step_00000005" in str(error)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_hellaswag_is_scored_by_many(
    two: Two, settings: dict[str, Any], tmp_path: Path, parallel: str
) -> None:
    """As the last checkpoint scores by itself; and training goes on after it."""
    (tmp_path / "text.txt").write_text("".join(map(chr, range(32, 127))) * 50)
    prepare(
        "text", tmp_path / "data", input=tmp_path / "text.txt", tokenizer="byte", progress=False
    )
    examples = write(tmp_path / "h.jsonl", made_up(9))
    asked = {"data": str(tmp_path / "data"), "hellaswag": str(examples), "hellaswag_interval": 2}
    two(start, {**settings, **asked, "parallel": parallel, "max_steps": 5}, tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if "hellaswag_acc" in line]
    assert [line["step"] for line in found] == [2, 4, 5]
    model = GPT.from_pretrained(tmp_path / "run/checkpoints/step_00000005")
    expected = evaluate_hellaswag(model, ByteTokenizer(), made_up(9))
    assert found[-1]["hellaswag_acc"] == expected.acc
    assert found[-1]["hellaswag_acc_norm"] == expected.acc_norm


# What all agree on


def fails_on_first() -> None:
    ranks_here().on_first(lambda: {}["only here"])


def test_what_fails_on_the_first_fails_on_all(
    two: Two, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert [type(error) for error in two.outcomes(fails_on_first)] == [KeyError, KeyError]
    (tmp_path / "thesis.tex").write_text("years")
    for error in two.outcomes(start, settings, tmp_path):
        assert isinstance(error, FileExistsError)


def with_a_full_disk(settings: dict[str, Any], run: Path) -> None:
    from gpt2fast.training import checkpoint

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        start(settings, run)


def test_a_full_disk_ends_all(two: Two, settings: dict[str, Any], tmp_path: Path) -> None:
    for error in two.outcomes(with_a_full_disk, settings, tmp_path / "run"):
        assert isinstance(error, OSError)
        assert "the disk is full" in str(error)


def with_a_bad_loss(settings: dict[str, Any], run: Path) -> None:
    original = GPT.forward

    def forward(self: GPT, *args: Any, **kwargs: Any) -> Any:
        logits, loss = original(self, *args, **kwargs)  # type: ignore[misc]
        bad = self.training and dist.get_rank() == 1
        return logits, loss * float("nan") if bad else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", forward)
        start(settings, run)


def test_a_loss_that_is_no_number_on_one_stops_all(
    two: Two, settings: dict[str, Any], tmp_path: Path
) -> None:
    for error in two.outcomes(with_a_bad_loss, settings, tmp_path / "run"):
        assert isinstance(error, trainers.Diverged)
        assert "loss is nan at step 1 " in str(error)


def with_another_clock(settings: dict[str, Any], run: Path) -> dict[str, Any]:
    """The clock of the second process runs three times as fast."""
    clock, speed = time.perf_counter, 1 + 2 * dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.time, "perf_counter", lambda: speed * clock())
        return start(settings, run)


def test_the_time_is_up_for_all_at_one_step(
    two: Two, settings: dict[str, Any], tmp_path: Path
) -> None:
    asked = {**settings, "max_steps": 100_000, "max_minutes": 2 / 60, "save_interval": 0}
    first, second = two(with_another_clock, {**asked, "eval_interval": 0}, tmp_path / "run")
    assert first == second
    assert 1 < first["step"] < 100_000


# The optimizer


def sharded_step(max_norm: float | None, dtype: torch.dtype) -> dict[str, Any]:
    """Steps on a module in parts, of which some hold nothing, and on the same as a whole."""
    from torch.distributed.fsdp import fully_shard

    def build() -> torch.nn.Sequential:
        torch.manual_seed(8)
        layers = (torch.nn.Linear(7, 5), torch.nn.Linear(5, 1), torch.nn.Linear(1, 3, bias=False))
        return torch.nn.Sequential(*layers).to(dtype)

    whole, parts = build(), build()
    for layer in parts:
        fully_shard(layer)
    fully_shard(parts)
    master = dtype != torch.float32
    optimizers = [
        AdamW(m.parameters(), lr=0.1, max_norm=max_norm, master_weights=master)
        for m in (whole, parts)
    ]
    x = torch.linspace(-3, 3, 28).view(4, 7).to(dtype)  # the same for both: so is the mean
    norms = []
    for _ in range(3):
        for module in (whole, parts):
            module(x).float().square().sum().backward()
        # What both begin with is the same to the bit; backward may sum in another order.
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            p.grad = q.grad.full_tensor()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        norms.append([optimizer.grad_norm for optimizer in optimizers])
    pairs = zip(whole.parameters(), parts.parameters(), strict=True)
    return {
        "norms": norms,
        "pairs": [(p.detach(), gathered(q.detach())) for p, q in pairs],
        "state": [
            {name: gathered(value) for name, value in optimizers[1].state[p].items()}
            for p in parts.parameters()
        ],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_on_parts(two: Two, dtype: torch.dtype) -> None:
    first, second = two(sharded_step, None, dtype)
    for found in (first, second):
        assert all(torch.equal(p, q) for p, q in found["pairs"])
    for a, b in zip(first["state"], second["state"], strict=True):
        assert a.keys() >= {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_norm_of_parts(two: Two) -> None:
    """Each of the two norms is within an ulp of the truth, so they are within two of each other."""
    first, second = two(sharded_step, 0.5, torch.float32)
    for (whole, parts), (_, elsewhere) in zip(first["norms"], second["norms"], strict=True):
        assert parts > 0.5  # it clips
        assert torch.equal(parts, elsewhere)
        assert abs(parts - whole) <= 2 * torch.finfo(torch.float32).eps * whole
    # Three updates by lr 0.1 at most differ by the clipping coefficient's rounding.
    for p, q in first["pairs"]:
        assert (p - q).abs().max() <= 3 * 0.1 * 32 * torch.finfo(torch.float32).eps


# Processes that end


def spawn(rank: int, port: int, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2fast", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment_of(rank, port)},
    )


def start_both(run: Path, settings: dict[str, Any]) -> list["subprocess.Popen[str]"]:
    config, port = run.with_suffix(".json"), free_port()
    config.write_text(json.dumps(settings))
    words = ("train", "--config", str(config), "--out", str(run))
    return [spawn(rank, port, *words) for rank in range(2)]


def test_kill_9_of_one_ends_the_other(settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = start_both(run, {**settings, "max_steps": 100_000})
    with first, second:
        wait_for(run, first, 3)
        second.kill()
        began = time.monotonic()
        _, told = first.communicate(timeout=60)
        assert time.monotonic() - began < 30
    assert first.returncode == 1
    assert "another process of this run has ended" in told
    assert "--resume" in told
    assert "Traceback" not in told


def test_kill_9_of_all_loses_nothing_but_the_last_steps(
    two: Two, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = {**settings, "dropout": 0.1, "save_interval": 3, "eval_interval": 0, "max_steps": 25}
    both = start_both(run, asked)
    with both[0], both[1]:
        wait_for(run, both[0], 4)
        for process in both:
            process.kill()
    assert 3 <= steps(run)[-1] < 25
    two(resume, run, save_interval=0)
    two(start, {**asked, "save_interval": 0}, tmp_path / "straight")
    end = "checkpoints/step_00000025"
    assert_same_bits(run / end, tmp_path / "straight" / end)
    assert sorted(train_losses(run)) == list(range(1, 26))


def test_torchrun_and_sigterm_to_one(settings: dict[str, Any], tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "config.json"
    config.write_text(json.dumps({**settings, "max_steps": 100_000, "save_interval": 0}))
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_port()), "-m", "gpt2fast", "train"),
            *("--config", str(config), "--out", str(run)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(run, process, 3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert told.count(f"gpt2fast train --resume {run}") == 1
    assert steps(run)[-1] == train_losses_of_killed(run)
    assert "another process of this run" not in told


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert environment() == (0, 1, 0)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment() == (9, 16, 1)
    assert math.isclose(sum(Ranks().all(2.0, 3.0)[0]), 5.0)
