"""Shards and prepared folders: the exact format, every damage, and whose files are deleted."""

import builtins
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2fast.data import shards
from gpt2fast.data.shards import (
    DatasetWriter,
    Manifest,
    ShardError,
    ShardWriter,
    SourceInfo,
    read_shard,
    write_shard,
)
from gpt2fast.data.tokenizers import ByteTokenizer

SOURCE = SourceInfo(kind="test", location="here", documents=1, characters=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def write_dataset(folder: Path, *, name: str = "x", overwrite: bool = False) -> Manifest:
    with DatasetWriter(
        folder, name, tokenizer=ByteTokenizer(), shard_tokens=4, overwrite=overwrite
    ) as writer:
        writer.write("train", np.arange(10))
        writer.write("val", [1, 2])
        return writer.finish(SOURCE)


def test_format_is_llm_c(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    digest = write_shard(path, [50256, 1, 65535])
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header.tolist() == [20240520, 1, 3] + [0] * 253
    assert data[1024:] == bytes([0x50, 0xC4, 1, 0, 255, 255])
    assert digest == hashlib.sha256(data).hexdigest()
    tokens = read_shard(path)
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [50256, 1, 65535]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    assert os.listdir(tmp_path) == ["s.bin"]


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([], ShardError),
        ([[1]], ValueError),
        ([1.5], TypeError),
        ([-1], ValueError),
        ([65536], ValueError),
    ],
)
def test_write_refuses(tmp_path: Path, tokens: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        write_shard(tmp_path / "s.bin", tokens)
    assert not os.listdir(tmp_path)


def damaged(tmp_path: Path, *, header: tuple[int, ...] = (), size: int | None = None) -> Path:
    path = tmp_path / "s.bin"
    write_shard(path, np.arange(100))
    data = bytearray(path.read_bytes())
    data[: 4 * len(header)] = np.array(header, "<i4").tobytes()
    path.write_bytes((data + bytes(8))[: len(data) if size is None else size])
    return path


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ((), 1223, "truncated: 100 tokens need 1224 bytes, the file has 1223"),
        ((), 1024, "truncated: 100 tokens need 1224 bytes, the file has 1024"),
        ((), 1226, "too long: 100 tokens need 1224 bytes, the file has 1226"),
        ((), 1023, "1023 bytes, too short for the 1024-byte header"),
        ((), 0, "0 bytes, too short"),
        ((20240801,), None, "magic number 20240801, a GPT-2 token shard has 20240520"),
        ((20240520, 7), None, "version 7, only version 1"),
        ((20240520, 1, 0), 1024, "an empty shard"),
        ((20240520, 1, -5), None, "an empty shard"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, header: tuple[int, ...], size: int | None, message: str
) -> None:
    path = damaged(tmp_path, header=header, size=size)
    with pytest.raises(ShardError, match=message) as error:
        read_shard(path)
    assert str(path) in str(error.value)


def test_writer_cuts_exact_shards(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "x", "train", shard_tokens=7)
    stream = np.arange(40, dtype=np.uint16)
    for part in (stream[:3], stream[3:3], stream[3:7], stream[7:30], stream[30:]):
        buffer = part.copy()
        writer.write(buffer)
        buffer[:] = 9999  # the writer holds a copy
    infos = writer.close()
    assert [info.file for info in infos] == [f"x_train_{i:06d}.bin" for i in range(6)]
    assert [info.tokens for info in infos] == [7, 7, 7, 7, 7, 5]
    read = [read_shard(tmp_path / info.file) for info in infos]
    np.testing.assert_array_equal(np.concatenate(read), stream)


def test_writer_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard_tokens"):
        ShardWriter(tmp_path, "x", "train", shard_tokens=0)
    with pytest.raises(ValueError, match="file name"):
        ShardWriter(tmp_path, "../x", "train")


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "d")
    assert Manifest.load(tmp_path / "d") == manifest
    assert manifest.tokens == {"train": 10, "val": 2}
    assert sorted(os.listdir(tmp_path / "d")) == [
        "manifest.json", "x_train_000000.bin", "x_train_000001.bin", "x_train_000002.bin",
        "x_val_000000.bin",
    ]  # fmt: skip
    for info in manifest.shards:
        data = (tmp_path / "d" / info.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == info.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "more"),
        ({"version": 2}, "version"),
        ({"tokens": {"train": 10, "val": 3}}, "do not agree"),
        ({"tokenizer": {"name": "bpe"}}, "not the description of a tokenizer"),
        ({"shards": [{"file": "../x_val_000000.bin", "split": "val", "tokens": 2,
                      "sha256": "0" * 64}]}, "file"),
    ],
)  # fmt: skip
def test_manifest_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_dataset(tmp_path / "d")
    path = tmp_path / "d" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShardError, match=message) as error:
        Manifest.load(tmp_path / "d")
    assert str(path) in str(error.value)


def test_prepared_folder_is_protected(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_dataset(folder)
    before = contents(folder)
    with pytest.raises(FileExistsError, match="--overwrite") as error:
        write_dataset(folder)
    assert str(folder) in str(error.value)
    assert contents(folder) == before


def test_foreign_folder_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    # llm.c's own shards have names like ours: without manifest or marker they are not ours.
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 2])
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="gpt2fast did not write it"):
            write_dataset(tmp_path, name="fineweb", overwrite=overwrite)
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3}')  # a browser extension's
    with pytest.raises(FileExistsError, match="gpt2fast did not write it"):
        write_dataset(tmp_path, overwrite=True)
    (tmp_path / "manifest.json").unlink()
    assert contents(tmp_path) == before


def test_overwrite_deletes_ours_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path, name="old")
    theirs = ["notes.txt", "old_train_000009.bin", "new_val_000007.bin"]
    for name in theirs:
        (tmp_path / name).write_bytes(b"mine")
    write_dataset(tmp_path, name="new", overwrite=True)
    after = contents(tmp_path)
    assert all(after.pop(name) == b"mine" for name in theirs)
    write_dataset(tmp_path / "fresh", name="new")
    assert after == contents(tmp_path / "fresh")


def test_overwrite_never_replaces_a_users_shard(tmp_path: Path) -> None:
    write_dataset(tmp_path, name="old")
    (tmp_path / "new_train_000001.bin").write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="did not write this file"):
        write_dataset(tmp_path, name="new", overwrite=True)
    assert contents(tmp_path) == before


def test_interrupted_run_is_recognised(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, "x", tokenizer=ByteTokenizer(), shard_tokens=4)
    writer.write("train", np.arange(9))  # and the power fails
    (tmp_path / ".x_train_000002.bin.4711.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"interrupted preparation.*--overwrite"):
        write_dataset(tmp_path, name="y")
    write_dataset(tmp_path, name="y", overwrite=True)
    assert {name.split("_")[0] for name in os.listdir(tmp_path)} == {
        "manifest.json",
        "notes.txt",
        "y",
    }


def interrupted(folder: Path) -> None:
    with DatasetWriter(folder, "x", tokenizer=ByteTokenizer(), shard_tokens=4) as writer:
        writer.write("train", np.arange(9))
        assert len(os.listdir(folder)) == 3  # two shards and the marker
        raise KeyboardInterrupt


def test_failure_takes_everything_back(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, left in ((tmp_path / "a" / "new", False), (tmp_path / "empty", True)):
        with pytest.raises(KeyboardInterrupt):
            interrupted(folder)
        assert folder.exists() == left
        assert not left or not os.listdir(folder)


def test_a_split_without_tokens_is_an_error(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d", "x", tokenizer=ByteTokenizer()) as writer:
        writer.write("train", [1])
        with pytest.raises(ValueError, match="the val split has no tokens"):
            writer.finish(SOURCE)
    assert not (tmp_path / "d").exists()


class FullDisk:
    """A file on a disk that takes 1100 bytes more."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.left = 1100

    def write(self, data: Any) -> int:
        self.left -= len(memoryview(data).cast("B"))
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_open(path: Any, mode: str = "r") -> Any:
        return FullDisk(builtins.open(path, mode)) if "w" in mode else builtins.open(path, mode)

    monkeypatch.setattr(shards, "open", full_open, raising=False)
    with pytest.raises(OSError, match=r"the disk is full \(1,224 bytes wanted") as error:
        write_shard(tmp_path / "s.bin", np.arange(100))
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "s.bin")
    assert not os.listdir(tmp_path)
    with DatasetWriter(tmp_path / "d", "x", tokenizer=ByteTokenizer(), shard_tokens=50) as writer:
        with pytest.raises(OSError, match="the disk is full"):
            writer.write("train", np.arange(50))
        assert os.listdir(tmp_path / "d") == ["manifest.partial.json"]
    assert not (tmp_path / "d").exists()


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "d"):
        with pytest.raises(OSError, match=r"Not a directory|File exists"):
            write_dataset(folder)
    with pytest.raises(NotADirectoryError):
        write_shard(tmp_path / "file" / "s.bin", [1])
