"""Which backend an op gets. On a GPU: the measured one, else Triton, else CUDA, else the reference.
On a CPU: the C++ kernels, but for inputs so small that PyTorch's own op is done sooner."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.select import choices
from gpt2fast import backends, use_backend
from gpt2fast.backends import Status, choose
from gpt2fast.functional import layer_norm

GPU = "NVIDIA H200"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Callable[..., str]]:
    """on_gpu(available, measured): the choice on a GPU with these backends and measurements."""

    uncached = backends.selected.__wrapped__

    def make(available: tuple[str, ...], measured: dict[str, dict[str, str]]) -> Callable[..., str]:
        table = {
            op: {size: {"backend": name} for size, name in sizes.items()}
            for op, sizes in measured.items()
        }
        (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: GPU)
        monkeypatch.setattr(backends, "SELECTED", tmp_path)
        monkeypatch.setattr(backends, "selected", uncached)
        monkeypatch.setattr(backends, "status", lambda name: Status(name in available, "gone"))
        return lambda op, size=None: backends._choose_for("cuda", op, size)

    return make


def test_the_measured_backend_is_chosen(on_gpu: Callable[..., Callable[..., str]]) -> None:
    choose = on_gpu(("triton", "cuda"), {"layer_norm": {"4": "cuda"}})
    assert choose("layer_norm") == "cuda"
    assert choose("gelu") == "triton"


def test_the_nearest_size_counts(on_gpu: Callable[..., Callable[..., str]]) -> None:
    choose = on_gpu(("triton", "cuda"), {"gelu": {"4": "cuda", "10": "triton"}})
    found = [choose("gelu", size) for size in (0, 4, 6, 8, 10, 12, None)]
    assert found == ["cuda"] * 3 + ["triton"] * 4
    classes = {0: 0, 1: 0, 7: 0, 8: 1, 127: 1, 128: 2, 1 << 23: 6}
    assert {n: backends.size_class(n) for n in classes} == classes


def test_what_cannot_run_is_passed_over(on_gpu: Callable[..., Callable[..., str]]) -> None:
    assert on_gpu(("triton",), {"layer_norm": {"4": "cuda"}})("layer_norm") == "triton"
    assert on_gpu(("cuda",), {})("layer_norm") == "cuda"
    with pytest.warns(UserWarning, match="slow PyTorch reference: gone; gone"):
        assert on_gpu((), {})("layer_norm") == "reference"


@pytest.mark.skipif(not backends.status("cpu").available, reason=backends.status("cpu").detail)
def test_small_inputs_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SMALL", {"layer_norm": 24})
    few, enough = torch.randn(1, 23), torch.randn(1, 24)
    assert choose(few, "layer_norm") == "reference"
    assert torch.equal(layer_norm(few), F.layer_norm(few, (23,)))
    for tensor, op in ((enough, "layer_norm"), (few, "gelu"), (few.bfloat16(), "layer_norm")):
        assert choose(tensor, op) == "cpu"
    assert choose(few, "layer_norm", native=False) == "cpu"
    with use_backend("cpu"):
        assert choose(few, "layer_norm") == "cpu"
    graph = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(few), layer_norm(few))


def test_choices_from_a_run() -> None:
    def row(
        op: str, label: str, direction: str, variant: str, median: float, elements: int = 1 << 20
    ) -> dict[str, object]:
        return dict(
            op=op,
            label=label,
            direction=direction,
            variant=variant,
            median=median,
            elements=elements,
        )

    rows = [
        row("layer_norm", "d", "both", "gpt2fast triton", 1.0, 1 << 12),
        row("layer_norm", "d", "both", "gpt2fast cuda", 2.0, 1 << 12),
        row("layer_norm", "a", "both", "gpt2fast triton", 2.0),
        row("layer_norm", "a", "both", "gpt2fast cuda", 1.0),
        row("add_layer_norm", "a", "both", "gpt2fast triton", 2.0),
        row("add_layer_norm", "a", "both", "gpt2fast cuda", 3.0),
        row("layer_norm", "a", "forward", "gpt2fast cuda", 99.0),
        row("layer_norm", "a", "both", "torch eager", 0.1),
        row("adamw with clipping", "b", "forward", "gpt2fast triton", 1.0, 0),
        row("adamw with clipping", "b", "forward", "gpt2fast cuda", 1.5, 0),
        row("gelu", "c", "both", "gpt2fast triton", 1.0),
    ]
    found = choices(rows, "run.json")
    assert found["layer_norm"] == {
        "3": {"backend": "triton", "why": "2.00x cuda over 1 shape", "measured": "run.json"},
        "5": {"backend": "cuda", "why": "1.15x triton over 2 shapes", "measured": "run.json"},
    }
    assert found["adamw"]["0"]["backend"] == "triton"
    assert set(found) == {"layer_norm", "adamw"}


def test_every_op_has_a_room() -> None:
    rooms = {
        p.parent.name for p in (Path(backends.__file__).parent / "ops").glob("*/functional.py")
    }
    # These have kernels for CPUs only, so nothing is chosen on a GPU.
    assert rooms == {*backends.OPS, "linear", "block"}
