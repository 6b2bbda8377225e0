"""The command line: what is printed, exit codes, and errors in one line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2fast import cli
from gpt2fast.cli import main
from gpt2fast.data import prepare

ROOT = Path(__file__).resolve().parents[1]

FLAGS = [
    *("--model", "nano", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"),
    *("--block-size", "16", "--batch-size", "4", "--max-steps", "4", "--warmup-steps", "1"),
    *("--eval-batches", "2", "--sample-tokens", "20", "--threads", "1"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps in runs/001 of a folder of its own."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("ein kleines Mädchen läuft. " * 300, encoding="utf-8")
    prepare("text", folder / "data", input=folder / "text.txt", tokenizer="byte", progress=False)
    out = folder / "runs" / "001"
    assert main(["train", "--data", str(folder / "data"), "--out", str(out), *FLAGS]) == 0
    return out


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ")
    assert not any("Traceback" in line for line in told)
    return told[-1]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gpt2fast 0.")
    for command in cli.COMMANDS:
        assert main([command, "--help"]) == 0
        assert len(capsys.readouterr().out) > 100


def test_help_does_not_load_pytorch() -> None:
    code = (
        "import sys; from gpt2fast.cli import main; main(['--help']); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "machine", "backends", "reference", "cpu", "build", "tokenizers"):
        assert word in text


def test_info_tells_how_to_get_the_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2fast import backends

    monkeypatch.setattr(
        backends, "status", lambda name: backends.Status(name == "reference", "no C++ compiler")
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "pip install -e ." in text
    assert "g++" in text or "xcode-select" in text


@pytest.mark.parametrize(
    "words",
    [[], ["fly"], ["train", "--lrr", "3"], ["train", "--batch", "3"], ["sample", "a", "b"],
     ["prepare"], ["eval"], ["eval", "loss"], ["export"], ["--fast"]],
)  # fmt: skip
def test_usage_errors_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--lr", "x"], "lr='x'"),
        (["train", "--max-steps", "0", "--dropout", "2"], "max_steps='0'"),
        (["train", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "--model", "gpt5"], "gpt5"),
        (["train", "--n-head", "3"], "n_head=3"),
        (["train", "--device", "abacus"], "abacus"),
        (["train", "--device", "meta"], "meta"),
        (["train", "--init-from", "nowhere"], "nowhere"),
        (["train", "--out", "/dev/null/run"], "/dev/null"),
        (["train", "--resume"], "runs: no runs here"),
        (["train", "--resume", "nowhere"], "nowhere: no such folder"),
        (["train", "--resume", "x", "--out", "y"], "--out"),
        (["sample"], "runs: no runs here"),
        (["sample", "nowhere"], "nowhere: no such folder"),
        (["sample", "--num-samples", "0"], "--num-samples"),
        (["prepare", "text", "--out", "x"], "--input"),
        (["eval", "loss", "--data", "nowhere"], "nowhere: no such folder"),
        (["eval", "hellaswag", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "hellaswag", "--limit", "0"], "--limit"),
        (["export", "nowhere", "--out", "x"], "nowhere: no such folder"),
        (["export", "--out", "x"], "runs: no runs here"),
    ],
)
def test_errors_are_one_line_with_exit_code_1(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    assert told in one_error_line(capsys)
    assert not Path("runs").exists()


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2fast.cli import info

    def broken(args: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(info, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_train_prints_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), "--max-steps", "6"]) == 0
    text = capsys.readouterr().out
    for word in ("trained", "validation", "bigram", "sample:", "loss.png", "step_00000006", "next"):
        assert word in text


def test_a_setting_that_a_resumed_run_keeps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), "--lr", "1", "--max-steps", "9"]) == 1
    assert "lr is 0.0006 in the run and 1.0 now" in one_error_line(capsys)


def test_overwrite_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run.parents[1] / "data"
    assert main(["train", "--data", str(data), "--out", str(run), *FLAGS]) == 1
    assert "--overwrite" in one_error_line(capsys)


def test_sample(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    words = ["--prompt", "ein M\u00e4", "--max-new-tokens", "12", "--seed", "1", "--threads", "1"]
    assert main(["sample", str(run), *words]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("ein M\u00e4")
    assert "12 tokens" in first.err
    assert main(["sample", str(run), *words, "--no-cache"]) == 0
    assert capsys.readouterr().out == first.out
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert main(["sample", str(newest), *words]) == 0
    assert capsys.readouterr().out == first.out
    monkeypatch.chdir(run.parents[1])
    assert main(["sample", *words]) == 0
    assert capsys.readouterr().out == first.out


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_sample_with_weights(run: Path, capsys: pytest.CaptureFixture[str], weights: str) -> None:
    words = ["sample", str(run), "--max-new-tokens", "5", "--weights", weights]
    assert main(words) == 0
    assert "5 tokens" in capsys.readouterr().err
    assert main([*words, "--no-cache"]) == 1


def test_several_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-samples", "3", "--max-new-tokens", "5", "--top-k", "40", "--top-p", "0.9"]
    assert main(["sample", str(run), "--prompt", "ein", *words]) == 0
    text = capsys.readouterr().out
    assert text.count("--- sample ") == 3
    assert main(["sample", str(run), "--prompt", "ein", *words, "--greedy"]) == 0
    parts = capsys.readouterr().out.split("--- sample ")[1:]
    assert len({part.partition("---")[2] for part in parts}) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "0"], "top_k"),
        (["--top-p", "2"], "top_p"),
        (["--device", "abacus"], "abacus"),
        (["--max-new-tokens", "-1"], "max_new_tokens"),
    ],
)
def test_wrong_sampling_settings(
    run: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run), *words]) == 1
    assert told in one_error_line(capsys)


def test_a_checkpoint_without_its_tokenizer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((newest / name).read_bytes())
    assert main(["sample", str(tmp_path / "model")]) == 1
    assert "gpt2fast_tokenizer.json is missing" in one_error_line(capsys)


def test_a_reader_that_stops_early() -> None:
    """`gpt2fast info | head -1` ends without a complaint."""
    command = f"{sys.executable} -m gpt2fast info | head -1"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=dict(os.environ), capture_output=True, check=False
    )
    assert done.stdout.startswith(b"versions")
    assert done.stderr == b""
