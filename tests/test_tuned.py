"""Which configuration a Triton kernel gets: the shipped table, what was tuned here, or the rule."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from gpt2fast.ops import triton_common


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int
    warps: int = 4


RULE, FAST, BROKEN = Config(1), Config(2), Config(3)
TIMES = {RULE: 2.0, FAST: 1.0, BROKEN: float("inf")}


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(the shipped table, the cache of this user) of a GPU that is not there."""
    cache, shipped = tmp_path / "cache", tmp_path / "tuned"
    shipped.mkdir()
    monkeypatch.setenv("GPT2FAST_CACHE_DIR", str(cache))
    monkeypatch.delenv("GPT2FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    monkeypatch.setattr(triton_common, "SHIPPED", shipped)
    monkeypatch.setattr(triton_common, "gpu_file", lambda index: f"gpu-{index}.json")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    triton_common._table.cache_clear()
    yield shipped / "gpu-0.json", cache / "gpu-0.json"
    triton_common._table.cache_clear()


@pytest.fixture
def choose(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Config, list[Config]]]:
    """choose(key): the configuration, and those that were timed for it, in a new process."""
    timed: list[Config] = []

    def milliseconds(run: Callable[[Config], None], config: Config) -> float:
        run(config)
        return TIMES[config]

    monkeypatch.setattr(triton_common, "_milliseconds", milliseconds)

    def call(*key: Any, restart: bool = True) -> tuple[Config, list[Config]]:
        if restart:
            triton_common._table.cache_clear()
        timed.clear()
        tensor: Any = SimpleNamespace(device=SimpleNamespace(index=0))
        found = triton_common.tuned("op", key, tensor, RULE, [FAST, BROKEN], timed.append)
        return found, list(timed)

    return call


Choose = Callable[..., tuple[Config, list[Config]]]


def test_nothing_is_timed_unless_asked_for(choose: Choose, folders: tuple[Path, Path]) -> None:
    assert choose(8, torch.bfloat16) == (RULE, [])
    assert not folders[1].exists()


def test_tuning_is_kept_on_disk(
    choose: Choose, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2FAST_AUTOTUNE", "1")
    assert choose(8, torch.bfloat16) == (FAST, [RULE, FAST, BROKEN])
    assert choose(8, torch.bfloat16, restart=False) == (FAST, [])
    assert choose(8, torch.bfloat16) == (FAST, [])  # from the disk
    assert choose(9, torch.bfloat16)[1]  # another shape
    monkeypatch.delenv("GPT2FAST_AUTOTUNE")
    assert choose(8, torch.bfloat16) == (FAST, [])
    assert choose(10, torch.bfloat16) == (RULE, [])
    table = json.loads(folders[1].read_text())
    assert table["op 8 torch.bfloat16"] == {
        "config": {"rows": 2, "warps": 4},
        "milliseconds": 1.0,
        "by the rule": 2.0,
    }
    assert len(table) == 2


def test_what_is_tuned_here_comes_before_what_is_shipped(
    choose: Choose, folders: tuple[Path, Path]
) -> None:
    shipped, cache = folders
    shipped.write_text(
        json.dumps({"op 8": {"config": {"rows": 5}}, "op 9": {"config": {"rows": 6}}})
    )
    cache.parent.mkdir()
    cache.write_text(json.dumps({"op 9": {"config": {"rows": 7, "warps": 8}}}))
    assert choose(8) == (Config(5), [])  # what a table leaves out is the rule's
    assert choose(9) == (Config(7, 8), [])
    assert choose(10) == (RULE, [])


def test_nothing_is_timed_while_a_graph_is_captured(
    choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2FAST_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(8) == (RULE, [])


def test_a_table_of_another_version_or_damaged_counts_as_none(
    choose: Choose, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, cache = folders
    cache.parent.mkdir()
    cache.write_text(json.dumps({"op 8": {"config": {"rows": 5, "columns": 3}}, "op 9": {}}))
    assert choose(8) == choose(9) == (RULE, [])
    cache.write_text('{"op 8": {"config"')
    shipped.write_text(json.dumps({"op 9": {"config": {"rows": 6}}}))
    with pytest.warns(UserWarning, match=r"gpu-0\.json is left out, it is damaged"):
        assert choose(9) == (Config(6), [])
    monkeypatch.setenv("GPT2FAST_AUTOTUNE", "1")
    with pytest.warns(UserWarning, match="damaged"):
        assert choose(8)[0] == FAST
    assert choose(8) == (FAST, [])  # written anew


def test_a_full_disk_does_not_end_a_run(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, table: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("GPT2FAST_AUTOTUNE", "1")
    monkeypatch.setattr(triton_common, "_save", full)
    with pytest.warns(UserWarning, match="not kept for the next run.*No space left"):
        assert choose(8)[0] == FAST
    assert choose(8, restart=False) == (FAST, [])
