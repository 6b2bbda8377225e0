"""Which backend an op gets on a GPU: the measured one, else Triton, else CUDA, else the reference."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.select import choices
from gpt2fast import backends
from gpt2fast.backends import Status

GPU = "NVIDIA H200"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Callable[[str], str]]:
    """on_gpu(available, measured): the choice on a GPU with these backends and measurements."""

    uncached = backends.selected.__wrapped__

    def make(available: tuple[str, ...], measured: dict[str, str]) -> Callable[[str], str]:
        table = {op: {"backend": name} for op, name in measured.items()}
        (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: GPU)
        monkeypatch.setattr(backends, "SELECTED", tmp_path)
        monkeypatch.setattr(backends, "selected", uncached)
        monkeypatch.setattr(backends, "status", lambda name: Status(name in available, "gone"))
        return lambda op: backends._choose_for("cuda", op)

    return make


def test_the_measured_backend_is_chosen(on_gpu: Callable[..., Callable[[str], str]]) -> None:
    choose = on_gpu(("triton", "cuda"), {"layer_norm": "cuda"})
    assert choose("layer_norm") == "cuda"
    assert choose("gelu") == "triton"


def test_what_cannot_run_is_passed_over(on_gpu: Callable[..., Callable[[str], str]]) -> None:
    assert on_gpu(("triton",), {"layer_norm": "cuda"})("layer_norm") == "triton"
    assert on_gpu(("cuda",), {})("layer_norm") == "cuda"
    with pytest.warns(UserWarning, match="slow PyTorch reference: gone; gone"):
        assert on_gpu((), {})("layer_norm") == "reference"


def test_choices_from_a_run() -> None:
    def row(op: str, label: str, direction: str, variant: str, median: float) -> dict[str, object]:
        return dict(op=op, label=label, direction=direction, variant=variant, median=median)

    rows = [
        row("layer_norm", "a", "both", "gpt2fast triton", 2.0),
        row("layer_norm", "a", "both", "gpt2fast cuda", 1.0),
        row("add_layer_norm", "a", "both", "gpt2fast triton", 2.0),
        row("add_layer_norm", "a", "both", "gpt2fast cuda", 3.0),
        row("layer_norm", "a", "forward", "gpt2fast cuda", 99.0),
        row("layer_norm", "a", "both", "torch eager", 0.1),
        row("adamw", "b", "forward", "gpt2fast triton", 1.0),
        row("adamw", "b", "forward", "gpt2fast cuda", 1.5),
        row("gelu", "c", "both", "gpt2fast triton", 1.0),
    ]
    found = choices(rows, "run.json")
    assert found["layer_norm"] == {
        "backend": "cuda",
        "why": "1.15x triton over 2 shapes",
        "measured": "run.json",
    }
    assert found["adamw"]["backend"] == "triton"
    assert set(found) == {"layer_norm", "adamw"}


def test_every_op_has_a_room() -> None:
    rooms = {
        p.parent.name for p in (Path(backends.__file__).parent / "ops").glob("*/functional.py")
    }
    # linear has kernels for CPUs only, so nothing is chosen on a GPU.
    assert rooms == {*backends.OPS, "linear"}
