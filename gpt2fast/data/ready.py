"""Shards that someone has tokenised: fetched from the Hugging Face Hub, checked, with a manifest.

The Hub keeps large files under their sha256 and tells it before the download: a file is taken only
if it has that hash, that size and a valid header. What is whole stays: the same call goes on after
any end of the process, and one with more shards fetches the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gpt2fast.data.download import DownloadError, sha256_of
from gpt2fast.data.shards import (
    MANIFEST,
    MARKER,
    Manifest,
    ShardError,
    ShardInfo,
    SourceInfo,
    Split,
    read_shard,
)
from gpt2fast.data.tokenizers import Gpt2Tokenizer

__all__ = ["READY", "fetch_shards"]

#: Short names of data sets of llm.c shards in GPT-2's tokens.
READY: Final = {
    "fineweb10B-gpt2": "kjj0/fineweb10B-gpt2",
    "fineweb100B-gpt2": "kjj0/fineweb100B-gpt2",
    "finewebedu10B-gpt2": "kjj0/finewebedu10B-gpt2",
}

_SHARD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*_(train|val)_[0-9]{6,}\.bin")
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class _Remote:
    name: str
    split: Split
    size: int
    sha256: str


def fetch_shards(
    name: str, out: str | Path, *, shards: int | None = None, revision: str | None = None
) -> Manifest:
    """Fetch the validation shards and the first ``shards`` training shards into ``out``.

    Args:
        name: one of `READY`, or owner/name of a data set whose top folder holds llm.c's
            ``*_train_*.bin`` and ``*_val_*.bin`` in GPT-2's tokens.
        out: made if missing; empty, or of an earlier call for the same data set.
        shards: training shards; None: all.
        revision: branch, tag or commit.

    Raises:
        DownloadError: the Hub was not reached, or what came is not what it promised. Whole shards
            are kept.
        ValueError: no such name, no shards in it, or shards below 1.
        ShardError: a file has the right hash and is no llm.c shard.
        FileExistsError, OSError: ``out`` holds something else; no space.
    """
    repository = READY.get(name, name)
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"unknown shards {name!r}: choose {', '.join(READY)}, or owner/name")
    if shards is not None and shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    folder = Path(out)
    location = f"https://huggingface.co/datasets/{repository}"
    _check_folder(folder, location)
    found = _list(repository, revision, location)
    train = [remote for remote in found if remote.split == "train"][:shards]
    wanted = [remote for remote in found if remote.split == "val"] + train
    for split in ("train", "val"):
        if not any(remote.split == split for remote in wanted):
            raise ValueError(f"{location}: no *_{split}_*.bin shards with a sha256")
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(remote.size for remote in wanted if not (folder / remote.name).exists())
    if missing > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{folder}: {missing:,} bytes are wanted, {free:,} are free")
    marker = json.dumps({"format": "gpt2fast-fetch", "location": location})
    (folder / MARKER).write_text(marker)
    (folder / MANIFEST).unlink(missing_ok=True)
    infos = [_fetch(folder, repository, revision, remote, location) for remote in wanted]
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the Hub's notes on what it fetched
    manifest = Manifest(
        tokenizer=Gpt2Tokenizer().to_json(),
        source=SourceInfo(kind="shards", location=location, documents=0, characters=0),
        tokens={
            split: sum(info.tokens for info in infos if info.split == split)
            for split in ("train", "val")
        },
        shards=infos,
    )
    manifest.save(folder)
    (folder / MARKER).unlink()
    return manifest


def _check_folder(folder: Path, location: str) -> None:
    """Raises FileExistsError unless the folder is missing, empty or of the same data set."""
    present = os.listdir(folder) if folder.exists() else []
    theirs: Any = None
    if MANIFEST in present:
        with contextlib.suppress(ShardError):
            theirs = Manifest.load(folder).source.location
    elif MARKER in present:
        with contextlib.suppress(ValueError):
            theirs = json.loads((folder / MARKER).read_bytes()).get("location")
    if present and theirs != location:
        raise FileExistsError(f"{folder}: the folder holds other files: choose another")


def _list(repository: str, revision: str | None, location: str) -> list[_Remote]:
    """The shards in the top folder, by name."""
    from huggingface_hub import HfApi

    try:
        entries: Sequence[Any] = list(
            HfApi().list_repo_tree(repository, repo_type="dataset", revision=revision)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DownloadError(_told(location, "the list of shards", error)) from error
    found = []
    for entry in entries:
        match = _SHARD.fullmatch(entry.path)
        lfs = getattr(entry, "lfs", None)
        if match and lfs is not None:
            split: Split = "train" if match[1] == "train" else "val"
            found.append(_Remote(entry.path, split, entry.size, lfs.sha256))
    return sorted(found, key=lambda remote: remote.name)


def _fetch(
    folder: Path, repository: str, revision: str | None, remote: _Remote, location: str
) -> ShardInfo:
    """A shard in the folder, from there if it is whole."""
    from huggingface_hub import hf_hub_download

    path = folder / remote.name
    if not _is_whole(path, remote):
        path.unlink(missing_ok=True)
        try:
            hf_hub_download(
                repository, remote.name, repo_type="dataset", revision=revision, local_dir=folder
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DownloadError(_told(location, remote.name, error)) from error
        if not _is_whole(path, remote):
            size = path.stat().st_size if path.exists() else 0
            found = sha256_of(path) if path.exists() else "no file"
            path.unlink(missing_ok=True)
            raise DownloadError(
                f"{location}/{remote.name}: {size:,} bytes came with sha256 {found}, expected "
                f"{remote.size:,} with {remote.sha256}. It was deleted: the same command goes on"
            )
    tokens = read_shard(path).size
    return ShardInfo(file=remote.name, split=remote.split, tokens=tokens, sha256=remote.sha256)


def _is_whole(path: Path, remote: _Remote) -> bool:
    return (
        path.is_file() and path.stat().st_size == remote.size and sha256_of(path) == remote.sha256
    )


def _told(location: str, what: str, error: Exception) -> str:
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return (
        f"{what} of {location} could not be fetched: {reason}. Whole shards are kept: the same "
        "command goes on. Or put the .bin files of that address into a folder by hand and pass it: "
        "gpt2fast train --data FOLDER reads them without a manifest"
    )
