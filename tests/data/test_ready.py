"""Ready-made shards from a Hub that is not one: whole, cut short, damaged, interrupted, away."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from gpt2fast.cli import main
from gpt2fast.data import DownloadError, Manifest, ShardError, TokenDataset, write_shard
from gpt2fast.data.ready import fetch_shards
from gpt2fast.data.shards import MARKER


class Hub:
    """Four training shards and one for validation; what was asked for; what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.damage: dict[str, bytes] = {}
        self.away_after: int | None = None
        folder.mkdir()
        for i, split in enumerate(("val", *["train"] * 4)):
            write_shard(folder / f"fineweb_{split}_{i:06d}.bin", list(range(i, i + 100)))
        (folder / "README.md").write_text("not a shard")

    def list_repo_tree(self, _: Any, repository: str, **options: Any) -> list[Any]:
        if self.away_after == 0:
            raise OSError("Name or service not known")
        assert repository == "kjj0/fineweb10B-gpt2"
        assert options["repo_type"] == "dataset"
        return [
            SimpleNamespace(
                path=path.name,
                size=path.stat().st_size,
                lfs=SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
                if path.suffix == ".bin"
                else None,
            )
            for path in sorted(self.folder.iterdir(), reverse=True)
        ]

    def hf_hub_download(self, repository: str, name: str, **options: Any) -> str:
        if self.away_after is not None and len(self.asked) >= self.away_after:
            raise OSError("Connection reset by peer")
        self.asked.append(name)
        target = Path(options["local_dir"]) / name
        (target.parent / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / name, target)
        if name in self.damage:
            target.write_bytes(self.damage[name])
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_tree", lambda *a, **k: made.list_repo_tree(*a, **k)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
    return made


def test_fetched_checked_and_extended(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["fetch", "fineweb10B-gpt2", "--out", str(out), "--shards", "2"]) == 0
    assert "200 tokens in 2 shards" in capsys.readouterr().out
    manifest = Manifest.load(out)
    assert manifest.tokens == {"train": 200, "val": 100}
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["manifest.json", *(shard.file for shard in manifest.shards)]
    )
    data = TokenDataset(out, "train")
    data.verify()
    assert data.shards[1][:3].tolist() == [2, 3, 4]
    hub.asked.clear()
    assert fetch_shards("kjj0/fineweb10B-gpt2", out).tokens["train"] == 400
    assert hub.asked == ["fineweb_train_000003.bin", "fineweb_train_000004.bin"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_what_is_not_as_promised_is_refused_and_fetched_again(
    hub: Hub, tmp_path: Path, damage: str
) -> None:
    name, out = "fineweb_train_000002.bin", tmp_path / "out"
    whole = (hub.folder / name).read_bytes()
    wrong = whole[:-7] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1])
    hub.damage[name] = wrong
    with pytest.raises(DownloadError, match=rf"{name}: [0-9,]+ bytes came.*expected 1,224 with"):
        fetch_shards("fineweb10B-gpt2", out)
    assert not (out / name).exists()
    with pytest.raises(ShardError, match="interrupted"):
        TokenDataset(out, "train")
    hub.damage.clear()
    (out / "fineweb_train_000001.bin").write_bytes(wrong)  # and a crash of the machine
    hub.asked.clear()
    fetch_shards("fineweb10B-gpt2", out)
    assert hub.asked == [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3, 4)]
    TokenDataset(out, "train").verify()
    assert not (out / MARKER).exists()


def test_no_network(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    hub.away_after = 0
    assert main(["fetch", "fineweb10B-gpt2", "--out", str(out)]) == 1
    told = capsys.readouterr().err
    for part in (
        "the list of shards of https://huggingface.co/datasets/kjj0/fineweb10B-gpt2",
        "Name or service not known",
        "gpt2fast train --data FOLDER",
    ):
        assert part in told
    assert not out.exists()
    hub.away_after = 3
    with pytest.raises(DownloadError, match=r"train_000003.bin of .*Connection reset"):
        fetch_shards("fineweb10B-gpt2", out)
    hub.away_after = None
    fetch_shards("fineweb10B-gpt2", out)
    assert len(hub.asked) == len(set(hub.asked)) == 5


def test_refusals(hub: Hub, tmp_path: Path) -> None:
    for name, options, told in (
        ("fineweb", {}, "unknown shards 'fineweb': choose"),
        ("fineweb10B-gpt2", {"shards": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            fetch_shards(name, tmp_path / "out", **options)  # type: ignore[arg-type]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="holds other files"):
        fetch_shards("fineweb10B-gpt2", tmp_path / "mine")
    (hub.folder / "fineweb_val_000000.bin").unlink()
    with pytest.raises(ValueError, match=r"no \*_val_\*\.bin shards"):
        fetch_shards("fineweb10B-gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
