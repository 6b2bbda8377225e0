"""Token shards in llm.c's format, and a folder of them with its manifest.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros)
followed by that many little-endian uint16 tokens: 1024 + 2 n bytes
(llm.c, dev/data/data_common.py).
A prepared folder holds ``{name}_{split}_{index:06d}.bin`` and ``manifest.json``, written last:
where the manifest is, the folder is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gpt2fast.data.tokenizers import Tokenizer, Tokens, tokenizer_from_json

__all__ = [
    "DatasetWriter",
    "Manifest",
    "ShardError",
    "ShardInfo",
    "ShardWriter",
    "SourceInfo",
    "Split",
    "read_shard",
    "write_shard",
]

Split = Literal["train", "val"]

MANIFEST: Final = "manifest.json"
# There from the first shard to the manifest; after a crash it tells which files are ours.
MARKER: Final = "manifest.partial.json"

#: Where the successor of an earlier preparation is written until it is complete.
STAGE: Final = ".gpt2fast-new"

_MAGIC: Final = 20240520
_VERSION: Final = 1
_HEADER_INTS: Final = 256
_HEADER_BYTES: Final = 4 * _HEADER_INTS
_MAX_SHARD_TOKENS: Final = 2**31 - 1  # the count is an int32
_SHARD_FILE: Final = r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)_(?:train|val)_[0-9]{6,}\.bin$"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardError(ValueError):
    """A shard or a manifest is damaged, missing, or of another format."""


def write_shard(path: str | Path, tokens: npt.ArrayLike) -> str:
    """Write ``tokens``, shape (n,), integers in [0, 65535], n >= 1, and return the file's sha256.

    The file appears whole or not at all, and replaces one of the same name.

    Raises:
        ShardError: no tokens, or more than 2^31 - 1.
        TypeError, ValueError: not integers, not one-dimensional, or beyond uint16.
        OSError: the file cannot be written; a full disk is named as such.
    """
    return _write_shard(Path(path), [_as_tokens(tokens)])


def _write_shard(path: Path, parts: Sequence[Tokens]) -> str:
    count = sum(part.size for part in parts)
    if not 0 < count <= _MAX_SHARD_TOKENS:
        raise ShardError(f"{path}: a shard holds 1 to {_MAX_SHARD_TOKENS} tokens, got {count}")
    header = np.zeros(_HEADER_INTS, dtype="<i4")
    header[:3] = _MAGIC, _VERSION, count
    blocks = [header.data, *(np.ascontiguousarray(part, dtype="<u2").data for part in parts)]
    digest = hashlib.sha256()
    with _atomic_write(path, _HEADER_BYTES + 2 * count) as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def read_shard(path: str | Path) -> np.memmap[Any, np.dtype[np.uint16]]:
    """Map the tokens of a shard: shape (n,), uint16, read-only, n >= 1.

    Raises:
        ShardError: other magic or version, an empty shard, or a file whose length does not agree
            with its header (truncated, or longer); the message names file and sizes.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
        size = file.seek(0, os.SEEK_END)
    if len(head) < _HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes, too short for the {_HEADER_BYTES}-byte header")
    magic, version, count = (int(v) for v in np.frombuffer(head, dtype="<i4")[:3])
    if magic != _MAGIC:
        raise ShardError(f"{path}: magic number {magic}, a GPT-2 token shard has {_MAGIC}")
    if version != _VERSION:
        raise ShardError(f"{path}: version {version}, only version {_VERSION} is known")
    if count < 1:
        raise ShardError(f"{path}: an empty shard (its header says {count} tokens)")
    expected = _HEADER_BYTES + 2 * count
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise ShardError(
            f"{path}: {state}: {count} tokens need {expected} bytes, the file has {size}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=_HEADER_BYTES, shape=(count,))


def _as_tokens(tokens: npt.ArrayLike) -> Tokens:
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens must be one-dimensional, got shape {array.shape}")
    if array.dtype == np.uint16:
        return array
    if array.size == 0:
        return array.astype(np.uint16)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ValueError(f"tokens must be in 0 to 65535, got {low} to {high}")
    return array.astype(np.uint16)


@contextlib.contextmanager
def _atomic_write(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file that takes the name ``path`` only when all of it is on disk."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temp.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            message = f"the disk is full ({size:,} bytes wanted, {free:,} free)"
            raise OSError(error.errno, message, str(path)) from error
        raise
    if hasattr(os, "O_DIRECTORY"):  # POSIX: the new name itself is on disk after this
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Model):
    """One shard: file name in the folder, split, number of tokens, sha256 of the whole file."""

    file: str = Field(pattern=_SHARD_FILE)  # a bare name: --overwrite deletes by it
    split: Split
    tokens: int = Field(gt=0)
    sha256: Sha256


class SourceInfo(_Model):
    """Where the tokens come from: kind, path or address, sha256 where it is one file."""

    kind: str
    location: str
    sha256: Sha256 | None = None
    documents: int = Field(ge=0)
    characters: int = Field(ge=0)


class Manifest(_Model):
    """The contents of a prepared folder. ``tokens`` are the totals of both splits."""

    format: Literal["gpt2fast-shards"] = "gpt2fast-shards"
    version: Literal[1] = 1
    tokenizer: dict[str, Any]
    source: SourceInfo
    tokens: dict[Split, int]
    shards: list[ShardInfo]

    @model_validator(mode="after")
    def _totals_agree(self) -> Self:
        totals: Counter[str] = Counter()
        for shard in self.shards:
            totals[shard.split] += shard.tokens
        if dict(totals) != self.tokens:
            raise ValueError(f"totals {self.tokens} do not agree with the shards' {dict(totals)}")
        tokenizer_from_json(self.tokenizer)
        return self

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read ``folder/manifest.json``.

        Raises FileNotFoundError without one, ShardError when it does not hold what it should.
        """
        path = Path(folder) / MANIFEST
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()
            )
            raise ShardError(f"{path}: {problems}") from error

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/manifest.json``, whole or not at all."""
        path = Path(folder) / MANIFEST
        data = (self.model_dump_json(indent=2) + "\n").encode()
        with _atomic_write(path, len(data)) as file:
            file.write(data)
        return path


class ShardWriter:
    """Collect tokens and write them as shards of exactly ``shard_tokens``, the last one shorter.

    Holds one shard in memory: 2 bytes a token. Call `close` to write the last shard; without it
    the tokens since the last full shard are dropped.
    """

    def __init__(
        self, folder: str | Path, name: str, split: Split, shard_tokens: int = 100_000_000
    ) -> None:
        if not 0 < shard_tokens <= _MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens must be 1 to {_MAX_SHARD_TOKENS}, got {shard_tokens}")
        if not re.match(_SHARD_FILE, f"{name}_{split}_000000.bin"):
            raise ValueError(f"name {name!r} does not make a file name: letters, digits, . _ -")
        self.shards: list[ShardInfo] = []
        self.files: list[Path] = []  # begun or done: one more than shards while one is written
        self._folder = Path(folder)
        self._name = name
        self._split: Split = split
        self._shard_tokens = shard_tokens
        self._parts: list[Tokens] = []
        self._held = 0

    def write(self, tokens: npt.ArrayLike) -> None:
        """Append ``tokens``, shape (n,), integers in [0, 65535]; the array is copied."""
        rest = _as_tokens(tokens)
        while rest.size:
            part = rest[: self._shard_tokens - self._held].copy()
            rest = rest[part.size :]
            self._parts.append(part)
            self._held += part.size
            if self._held == self._shard_tokens:
                self._flush()

    def close(self) -> list[ShardInfo]:
        """Write what is left and return all shards in order."""
        if self._held:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        path = self._folder / f"{self._name}_{self._split}_{len(self.shards):06d}.bin"
        if path.exists():
            raise FileExistsError(errno.EEXIST, "gpt2fast did not write this file", str(path))
        self.files.append(path)
        sha256 = _write_shard(path, self._parts)
        self.shards.append(
            ShardInfo(file=path.name, split=self._split, tokens=self._held, sha256=sha256)
        )
        self._parts, self._held = [], 0


class DatasetWriter:
    """Write a prepared folder: both splits' shards, then the manifest.

    A context manager. Left without `finish` (an exception, Ctrl-C), it takes away what it wrote.

    Args:
        folder: made if missing. Existing contents are never touched, with one exception:
            with ``overwrite`` the files of an earlier preparation, finished or interrupted, which
            are known by its manifest or marker. They are replaced when the new ones are complete:
            until then, and after a failure, they are as they were. A folder with other contents
            only is refused.
        name: first part of the shards' names.
        tokenizer: what the tokens mean; recorded in the manifest.
        shard_tokens: tokens a shard.

    Raises:
        FileExistsError: the folder is in use and ``overwrite`` is not set, or is not ours.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        *,
        tokenizer: Tokenizer,
        shard_tokens: int = 100_000_000,
        overwrite: bool = False,
    ) -> None:
        self._folder = Path(folder)
        self._name = name
        self._tokenizer = tokenizer
        self._old = check_output_folder(self._folder, overwrite=overwrite)
        self._created = not self._folder.exists()
        # An earlier preparation stays whole until the new one is: that is written beside it.
        self._stage = self._folder / STAGE if self._old else self._folder
        self._writers: dict[Split, ShardWriter] = {
            "train": ShardWriter(self._stage, name, "train", shard_tokens),
            "val": ShardWriter(self._stage, name, "val", shard_tokens),
        }
        self._open = True
        if self._old:
            shutil.rmtree(self._stage, ignore_errors=True)
            self._stage.mkdir(parents=True)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._mark()
            except BaseException:
                self._remove_created_folder()
                raise

    def _mark(self) -> None:
        """From here to its removal the marker or the manifest names all files that are ours."""
        names = {self._name}
        names |= {m["name"] for file in self._old if (m := re.match(_SHARD_FILE, file))}
        marker = json.dumps({"format": "gpt2fast-partial", "names": sorted(names)}).encode()
        with _atomic_write(self._folder / MARKER, len(marker)) as file:
            file.write(marker)

    def _replace_old(self, new: Sequence[str]) -> None:
        """Put the new shards in the place of the old files; the manifest follows."""
        for name in new:
            if name not in self._old and (self._folder / name).exists():
                path = str(self._folder / name)
                raise FileExistsError(errno.EEXIST, "gpt2fast did not write this file", path)
        self._mark()
        for name in self._old:
            if name != MARKER:
                (self._folder / name).unlink(missing_ok=True)
        for name in new:
            os.replace(self._stage / name, self._folder / name)
        self._stage.rmdir()

    def write(self, split: Split, tokens: npt.ArrayLike) -> None:
        """Append ``tokens``, shape (n,), integers in [0, 65535], to a split."""
        self._writers[split].write(tokens)

    def finish(self, source: SourceInfo) -> Manifest:
        """Write the last shards and the manifest. Raises ValueError if a split has no tokens."""
        shards = [shard for writer in self._writers.values() for shard in writer.close()]
        tokens = {s: sum(shard.tokens for shard in w.shards) for s, w in self._writers.items()}
        for split, count in tokens.items():
            if not count:
                raise ValueError(f"the {split} split has no tokens: the source is too small")
        manifest = Manifest(
            tokenizer=self._tokenizer.to_json(), source=source, tokens=tokens, shards=shards
        )
        if self._old:
            self._replace_old([shard.file for shard in shards])
        manifest.save(self._folder)
        self._open = False
        (self._folder / MARKER).unlink()
        return manifest

    def discard(self) -> None:
        """Take away the files of this unfinished run, and the folder if it was made for it."""
        if not self._open:
            return
        self._open = False
        if self._old and self._stage.exists():  # what was there before is still whole
            shutil.rmtree(self._stage)
            return
        (self._folder / MANIFEST).unlink(missing_ok=True)  # stopped right after it was written
        for writer in self._writers.values():
            for path in writer.files:
                path.unlink(missing_ok=True)
        (self._folder / MARKER).unlink(missing_ok=True)
        self._remove_created_folder()

    def _remove_created_folder(self) -> None:
        if self._created:
            with contextlib.suppress(OSError):  # someone else put a file there meanwhile
                self._folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()


def check_output_folder(folder: Path, *, overwrite: bool) -> list[str]:
    """The files of an earlier preparation in ``folder``, which ``overwrite`` may delete.

    Raises FileExistsError unless the folder is missing, empty, or ours and ``overwrite`` is set;
    NotADirectoryError for a file.
    """
    if not folder.exists():
        return []
    present = sorted(os.listdir(folder))
    if not present:
        return []
    ours = _files_we_wrote(folder, present)
    if not ours:
        raise FileExistsError(
            errno.EEXIST,
            "the folder is not empty and gpt2fast did not write it: choose another",
            str(folder),
        )
    if not overwrite:
        what = "a prepared data set" if MANIFEST in ours else "an interrupted preparation"
        raise FileExistsError(
            errno.EEXIST,
            f"the folder holds {what}: pass --overwrite (overwrite=True) to replace it",
            str(folder),
        )
    return ours


def _files_we_wrote(folder: Path, present: list[str]) -> list[str]:
    """Names of our files, the manifest first so that a half-deleted folder never seems whole."""
    ours: list[str] = []
    if MANIFEST in present:
        try:
            ours += [MANIFEST, *(shard.file for shard in Manifest.load(folder).shards)]
        except ShardError:
            return []  # another program's manifest.json, or one edited by hand
    if MARKER in present:
        try:
            names = json.loads((folder / MARKER).read_bytes())["names"]
            patterns = [rf"{re.escape(n)}_(train|val)_[0-9]{{6,}}\.bin" for n in names]
        except (ValueError, KeyError, TypeError):
            return []
        file = "|".join([*patterns, re.escape(MANIFEST), re.escape(MARKER)])
        ours += [n for n in present if re.fullmatch(rf"{file}|\.({file})\.[0-9]+\.tmp", n)]
    return list(dict.fromkeys(ours))
