"""The example scripts: the swapped model's loss curve is the original's, within rounding."""

import importlib
from pathlib import Path

import pytest

from gpt2fast.data import prepare

TINY = ["--batch-size", "2", "--block-size", "48", "--layers", "2", "--heads", "2", "--width", "32"]
NAMES = ("nanogpt_style", "huggingface_style", "plain_pytorch")
KINDS = {"layer_norm": 5, "attention": 2, "mlp": 2, "loss": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text") / "stdlib"
    prepare("stdlib", folder, tokenizer="byte", max_bytes=300_000, progress=False)
    return str(folder)


@pytest.mark.parametrize("name", NAMES)
def test_curves_are_equal(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"gpt2fast.examples.{name}").main
    result = main(["--steps", "30", "--data", text, *TINY])
    tables = {"embedding": 2} if name == "huggingface_style" else {}
    assert result.report.counts() == KINDS | tables
    assert len(result.original) == len(result.swapped) == 30
    # one rounding of a loss is 1.2e-7 of it, half a unit; 30 steps of Adam spread it by a few
    assert result.distance < 5e-6
    assert result.original[-1] < result.original[0] - 0.5  # it learns
    printed = capsys.readouterr().out
    assert "largest distance of the curves" in printed
    assert f"tokens/s: original {result.original_speed:,.0f}" in printed


@pytest.mark.parametrize("name", NAMES)
def test_in_fp64_they_are_the_same_mathematics(name: str, text: str) -> None:
    main = importlib.import_module(f"gpt2fast.examples.{name}").main
    result = main(["--steps", "12", "--data", text, "--dtype", "float64", *TINY])
    # Hugging Face takes its loss of fp32 logits, whatever the model's dtype
    assert result.distance < (5e-7 if name == "huggingface_style" else 1e-11)


def test_python_s_own_source_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    from gpt2fast.examples.nanogpt_style import main

    assert len(main(["--steps", "1", *TINY]).swapped) == 1
    with pytest.raises(ValueError, match="steps must be at least 1"):
        main(["--steps", "0", *TINY])
    with pytest.raises(FileNotFoundError):
        main(["--data", str(Path("nowhere")), *TINY])
