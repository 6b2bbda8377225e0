"""What a run does beside its steps: HellaSwag, documents, determinism, trackers, recipes, MFU."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT, GPTConfig
from gpt2fast.cli import main
from gpt2fast.data import TokenDataset, prepare
from gpt2fast.data.batches import batches_in_order, make_loader
from gpt2fast.huggingface import ModelUnavailable
from gpt2fast.recipes import find_recipe, recipes
from gpt2fast.training import TrainConfig, load_config, resume_run, start_run
from gpt2fast.training.metrics import PEAK_TFLOPS, mfu, peak_flops
from gpt2fast.training.trainer import evaluate
from tests.evaluation.test_hellaswag import made_up, write
from tests.training.test_health import records
from tests.training.test_runs import assert_same_bits, stop_after


@pytest.fixture(scope="module")
def byte_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, of bytes, each after end-of-text."""
    folder = tmp_path_factory.mktemp("documents")
    lines = [json.dumps({"text": f"document {i} " + "tell me more " * (i % 4)}) for i in range(300)]
    (folder / "d.jsonl").write_text("\n".join(lines))
    prepare(str(folder / "d.jsonl"), folder / "data", tokenizer="byte", progress=False)
    return folder / "data"


@pytest.fixture
def short(tiny: dict[str, Any], byte_data: Path) -> dict[str, Any]:
    return {**tiny, "data": str(byte_data), "max_steps": 8, "warmup_steps": 2, "eval_interval": 4}


def test_hellaswag_is_scored_at_intervals_and_changes_nothing(
    short: dict[str, Any], tmp_path: Path
) -> None:
    examples = write(tmp_path / "h.jsonl", made_up(9, longest=3))
    config = TrainConfig(
        **short, hellaswag=str(examples), hellaswag_interval=3, hellaswag_examples=7
    )
    result = start_run(config, tmp_path / "run")
    found = [r for r in records(result.run) if "hellaswag_acc" in r]
    assert [r["step"] for r in found] == [3, 6, 8]
    for record in found:
        assert record["hellaswag_examples"] == 7
        for name in ("hellaswag_acc", "hellaswag_acc_norm"):
            assert record[name] * 7 == pytest.approx(round(record[name] * 7))
    plain = start_run(TrainConfig(**short), tmp_path / "plain")
    assert_same_bits(result.checkpoint, plain.checkpoint)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        start_run(TrainConfig(**short, hellaswag="nowhere.jsonl"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


class TestDocumentMask:
    def test_borders_are_at_end_of_text(self, byte_data: Path) -> None:
        data = TokenDataset(byte_data, "train")
        x, _, borders = next(make_loader(data, 4, 50, document_mask=True))
        flat = x.flatten().tolist()
        expected = [i for i, token in enumerate(flat) if token == 256 or i % 50 == 0]
        assert borders is not None
        assert borders.tolist() == [*expected, 200]
        assert borders.dtype == torch.int32
        assert next(make_loader(data, 4, 50)).cu_seqlens is None

    def test_validation_sees_one_document_at_a_time(
        self, short: dict[str, Any], byte_data: Path
    ) -> None:
        data = TokenDataset(byte_data, "val")
        model = GPT(GPTConfig(2, 2, 32, vocab_size=257, block_size=32))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        losses = [
            evaluate(model, data, TrainConfig(**short, document_mask=masked), 2)
            for masked in (False, True)
        ]
        total = count = 0.0
        for x, y, _ in batches_in_order(data, 8, 32, 2):
            for row, targets in zip(x, y, strict=True):
                starts = sorted({0, *(row == 256).nonzero()[:, 0].tolist()})
                for a, b in zip(starts, [*starts[1:], 32], strict=True):
                    with torch.no_grad():
                        loss = model(row[None, a:b].contiguous(), targets[None, a:b].contiguous())[
                            1
                        ]
                    total += float(loss) * (b - a)
                    count += b - a
        assert losses[1] == pytest.approx(total / count, rel=1e-5)
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)

    def test_runs_and_refuses_text_without_end_of_text(
        self, short: dict[str, Any], text_data: Path, tmp_path: Path
    ) -> None:
        result = start_run(TrainConfig(**short, document_mask=True), tmp_path / "run")
        assert result.val_loss is not None
        config = TrainConfig(**{**short, "data": str(text_data)}, document_mask=True)
        with pytest.raises(ValueError, match="document_mask: the char tokenizer"):
            start_run(config, tmp_path / "char")


class TestDeterministic:
    def test_checkpoints_are_equal_byte_for_byte(
        self, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = TrainConfig(**short, deterministic=True)
        first = start_run(config, tmp_path / "first")
        second = start_run(config, tmp_path / "second")
        stop_after(monkeypatch, 5)
        start_run(config, tmp_path / "third")
        monkeypatch.undo()
        third = resume_run(tmp_path / "third")
        assert not torch.are_deterministic_algorithms_enabled()
        names = sorted(path.name for path in first.checkpoint.iterdir())
        assert len(names) >= 6
        for other in (second, third):
            assert sorted(path.name for path in other.checkpoint.iterdir()) == names
            for name in names:
                same = (first.checkpoint / name).read_bytes() == (
                    other.checkpoint / name
                ).read_bytes()
                assert same, name
        elapsed = [r["elapsed"] for r in records(third.run) if "elapsed" in r]
        assert elapsed == sorted(elapsed)  # the clock goes on, by the metrics

    def test_a_time_limit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="deterministic and max_minutes"):
            TrainConfig(deterministic=True, max_minutes=1)
        assert load_config(None, {"deterministic": True}).max_minutes is None


class TestRecipes:
    def test_all_are_valid_and_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--help"]) == 0
        told = "".join(capsys.readouterr().out.split())
        assert len(recipes()) >= 3
        for name in recipes():
            assert name in told
            config = load_config(name, {})
            assert config.data is not None
            assert load_config(name, {"lr": 1e-5, "min_lr": 0}).lr == 1e-5

    def test_124m_is_build_nanogpts(self) -> None:
        config = load_config("gpt2-124m-fineweb-edu", {})
        assert config.batch_size * config.block_size * config.grad_accum == 524_288
        assert (config.max_steps, config.warmup_steps) == (19_073, 715)
        assert (config.lr, config.min_lr, config.clip, config.seed) == (6e-4, 6e-5, 1.0, 1337)
        assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.95, 0.1)
        assert (config.model, config.eval_interval, config.eval_batches) == ("gpt2", 250, 20)

    def test_a_file_goes_first_and_others_are_named(self, tmp_path: Path) -> None:
        assert find_recipe(tmp_path) == tmp_path
        with pytest.raises(FileNotFoundError, match="no recipe: those are gpt2-124m-fineweb-edu"):
            load_config("gpt2-125m", {})


class TestTrackers:
    @pytest.mark.parametrize("name", ["tensorboard", "wandb"])
    def test_a_missing_package_is_told_before_the_run(
        self, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        asked = {"tensorboard": True} if name == "tensorboard" else {"wandb": "project"}
        with pytest.raises(RuntimeError, match=rf"{name}.*pip install .*\[tracking\]"):
            start_run(TrainConfig(**short, **asked), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_numbers_arrive(
        self, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[str, list[Any]] = {"board": [], "wandb": [], "init": []}

        class SummaryWriter:
            def __init__(self, folder: str, purge_step: int) -> None:
                self.folder = folder

            def add_scalar(self, name: str, value: float, step: int) -> None:
                seen["board"].append((step, name, value))

            def close(self) -> None:
                pass

        class Run:
            def log(self, numbers: dict[str, float], step: int) -> None:
                seen["wandb"] += [(step, name, value) for name, value in numbers.items()]

            def finish(self) -> None:
                pass

        def init(**options: Any) -> Run:
            seen["init"].append(options)
            return Run()

        board = types.ModuleType("torch.utils.tensorboard")
        board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        wandb = types.ModuleType("wandb")
        wandb.init = init  # type: ignore[attr-defined]
        for module in (board, wandb, types.ModuleType("tensorboard")):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        config = TrainConfig(**short, tensorboard=True, wandb="mine", peak_tflops=0.5)
        result = start_run(config, tmp_path / "run")
        expected = [
            (r["step"], name, value)
            for r in records(result.run)
            for name, value in r.items()
            if name != "step"
        ]
        assert seen["board"] == seen["wandb"] == expected
        assert {name for _, name, _ in expected} >= {"loss", "val_loss", "lr", "grad_norm", "mfu"}
        assert [o["project"] for o in seen["init"]] == ["mine", "mine"]
        assert len({o["id"] for o in seen["init"]}) == 1
        assert resume_run(result.run, {"max_steps": 9}).step == 9
        start_run(TrainConfig(**short), result.run, overwrite=True)  # it is known as a run


def test_mfu_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_name("gpt2"))
    # 6 (12 * 12 * 768^2 + 50304 * 768) + 6 * 12 * 1024 * 768
    flops = 6 * (84_934_656 + 38_633_472) + 56_623_104
    assert mfu(model, 1024, 100_000, 312e12) == pytest.approx(100_000 * flops / 312e12)
    config = TrainConfig(dtype="bfloat16")
    assert peak_flops(config, torch.device("cpu")) is None
    assert peak_flops(TrainConfig(peak_tflops=0.25), torch.device("cpu")) == 0.25e12
    assert peak_flops(TrainConfig(peak_tflops=0.25), torch.device("cpu"), world_size=4) == 1e12
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(config, torch.device("cuda")) == peak
        assert peak_flops(TrainConfig(), torch.device("cuda")) is None
    parts = [part for part, _ in PEAK_TFLOPS]
    for i, part in enumerate(parts):  # a longer name is never hidden behind a shorter one
        assert not any(earlier in part for earlier in parts[:i]), part


class TestInitFrom:
    def test_a_name_that_cannot_be_had(
        self, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        settings = {k: v for k, v in short.items() if not k.startswith(("n_", "model"))}
        with pytest.raises(ModelUnavailable, match="openai-community/gpt2 are neither"):
            start_run(TrainConfig(**settings, init_from="gpt2"), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_an_llmc_file(self, short: dict[str, Any], tmp_path: Path) -> None:
        from gpt2fast import llmc

        model = GPT(GPTConfig(2, 2, 32, vocab_size=257, block_size=32, pad_vocab_to=128))
        llmc.save(model, tmp_path / "m.bin")
        settings = {k: v for k, v in short.items() if not k.startswith(("n_", "model"))}
        result = start_run(
            TrainConfig(**settings, init_from=str(tmp_path / "m.bin")), tmp_path / "r"
        )
        assert result.step == 8
