"""Token shards in llm.c's format, and a folder of them with its manifest.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros)
followed by that many little-endian uint16 tokens: 1024 + 2 n bytes
(llm.c, dev/data/data_common.py).
A prepared folder holds ``{name}_{split}_{index:06d}.bin`` and ``manifest.json``, written last:
where the manifest is, the folder is complete. Two more formats are read and written:
build-nanogpt's ``.npy`` of uint16 and nanoGPT's ``.bin`` of uint16 without a header.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
_SHARD_FILE: Final = r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)_(?:train|val)_[0-9]{6,}\.(?:bin|npy)$"

ShardFormat = Literal["llm.c", "npy", "raw"]
FORMATS: Final[tuple[ShardFormat, ...]] = ("llm.c", "npy", "raw")
#: "all": one stream of which the first shard is for validation and the others for training.
Stream = Literal["train", "val", "all"]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardError(ValueError):
    """A shard or a manifest is damaged, missing, or of another format.

    >>> from pathlib import Path
    >>> _ = Path("short.bin").write_bytes(b"abc")
    >>> read_shard("short.bin")
    Traceback (most recent call last):
    gpt2fast.data.shards.ShardError: short.bin: 3 bytes, too short for the 1024-byte header
    """


def write_shard(
    path: str | Path, tokens: npt.ArrayLike, shard_format: ShardFormat = "llm.c"
) -> str:
    """Write ``tokens``, shape (n,), integers in [0, 65535], n >= 1, and return the file's sha256.

    The file appears whole or not at all, and replaces one of the same name.

    Raises:
        ShardError: no tokens, or more than 2^31 - 1.
        TypeError, ValueError: not integers, not one-dimensional, or beyond uint16.
        OSError: the file cannot be written; a full disk is named as such.

    >>> digest = write_shard("mine_train_000000.bin", [1, 2, 3])
    >>> read_shard("mine_train_000000.bin").tolist(), len(digest)
    ([1, 2, 3], 64)
    """
    return _write_shard(Path(path), [_as_tokens(tokens)], shard_format)


def _write_shard(path: Path, parts: Sequence[Tokens], shard_format: ShardFormat) -> str:
    count = sum(part.size for part in parts)
    if not 0 < count <= _MAX_SHARD_TOKENS:
        raise ShardError(f"{path}: a shard holds 1 to {_MAX_SHARD_TOKENS} tokens, got {count}")
    head = _header(count, shard_format)
    blocks: list[Any] = [head, *(np.ascontiguousarray(part, dtype="<u2").data for part in parts)]
    digest = hashlib.sha256()
    with _atomic_write(path, len(head) + 2 * count) as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _header(count: int, shard_format: ShardFormat) -> bytes:
    """What stands before the tokens."""
    if shard_format == "raw":
        return b""
    if shard_format == "npy":
        head = io.BytesIO()
        described = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(head, described)
        return head.getvalue()
    if shard_format == "llm.c":
        ints = np.zeros(_HEADER_INTS, dtype="<i4")
        ints[:3] = _MAGIC, _VERSION, count
        return ints.tobytes()
    raise ValueError(f"unknown shard format {shard_format!r}: choose {', '.join(FORMATS)}")


def read_shard(
    path: str | Path, shard_format: ShardFormat = "llm.c"
) -> np.memmap[Any, np.dtype[np.uint16]]:
    """Map the tokens of a shard: shape (n,), uint16, read-only, n >= 1.

    ``shard_format`` is the one of a ``.bin`` file; ``.npy`` files tell theirs by the name.

    Raises:
        ShardError: other magic or version, an empty shard, or a file whose length does not agree
            with its header (truncated, or longer); the message names file and sizes.
        FileNotFoundError: no such file.

    >>> _ = write_shard("tokens.npy", range(5), "npy")
    >>> tokens = read_shard("tokens.npy", "npy")
    >>> tokens.shape, tokens.dtype
    ((5,), dtype('uint16'))
    """
    path = Path(path)
    if path.suffix == ".npy":
        return _read_npy(path)
    if shard_format == "raw":
        if (size := path.stat().st_size) < 2 or size % 2:
            raise ShardError(f"{path}: {size} bytes are no uint16 tokens")
        return np.memmap(path, dtype="<u2", mode="r")
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


def _read_npy(path: Path) -> np.memmap[Any, np.dtype[np.uint16]]:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ShardError(f"{path}: truncated, or not a .npy file: {error}") from error
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype != np.dtype("<u2"):
        found = f"{getattr(tokens, 'dtype', '?')} of shape {getattr(tokens, 'shape', '?')}"
        raise ShardError(f"{path}: {found}: uint16 of shape (n,) is wanted")
    if not tokens.size:
        raise ShardError(f"{path}: an empty shard")
    return tokens


def has_llmc_header(path: Path) -> bool:
    """Whether the file begins with the magic number; no GPT-2 token has its first two bytes."""
    with open(path, "rb") as file:
        return file.read(4) == _MAGIC.to_bytes(4, "little")


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
    """One shard: file name in the folder, split, number of tokens, sha256 of the whole file.

    >>> ShardInfo(file="mine_val_000000.bin", split="val", tokens=5, sha256="0" * 64).tokens
    5
    """

    file: str = Field(pattern=_SHARD_FILE)  # a bare name: --overwrite deletes by it
    split: Split
    tokens: int = Field(gt=0)
    sha256: Sha256


class SourceInfo(_Model):
    """Where the tokens come from: kind, path or address, sha256 where it is one file.

    >>> SourceInfo(kind="text", location="my_texts", documents=3, characters=900).sha256 is None
    True
    """

    kind: str
    location: str
    sha256: Sha256 | None = None
    documents: int = Field(ge=0)
    characters: int = Field(ge=0)


class Manifest(_Model):
    """The contents of a prepared folder. ``tokens`` are the totals of both splits.

    >>> from pathlib import Path
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 10)
    >>> manifest = prepare("text", "data", input="mine.txt", tokenizer="byte")
    >>> Manifest.load("data") == manifest, manifest.tokens
    (True, {'train': 189, 'val': 21})
    """

    format: Literal["gpt2fast-shards"] = "gpt2fast-shards"
    version: Literal[1] = 1
    tokenizer: dict[str, Any]
    shard_format: ShardFormat = "llm.c"
    #: Whether the tokens are a stream of text, or marked prompts and responses (`examples`).
    layout: Literal["text", "examples"] = "text"
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

    Args:
        folder, name: where the shards go, and how their names begin.
        split: of the shards; "all": the first is for validation, the others for training.
        shard_tokens: tokens a shard.
        shard_format: of the files.
        flushed: called with the number of tokens when a shard is on disk.

    Raises:
        ValueError: sizes, format or name are none; from `write`, tokens that are not uint16.
        FileExistsError: from `write` and `close`: a file of a shard's name that we did not write.
        OSError: a file cannot be written.

    >>> from pathlib import Path
    >>> Path("data").mkdir()
    >>> writer = ShardWriter("data", "mine", "train", shard_tokens=4)
    >>> writer.write(range(6))
    >>> [shard.tokens for shard in writer.close()]
    [4, 2]
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        split: Stream,
        shard_tokens: int = 100_000_000,
        *,
        shard_format: ShardFormat = "llm.c",
        flushed: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        if not 0 < shard_tokens <= _MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens must be 1 to {_MAX_SHARD_TOKENS}, got {shard_tokens}")
        if shard_format not in FORMATS:
            raise ValueError(f"unknown shard format {shard_format!r}: choose {', '.join(FORMATS)}")
        if not re.match(_SHARD_FILE, f"{name}_val_000000.bin"):
            raise ValueError(f"name {name!r} does not make a file name: letters, digits, . _ -")
        self.shards: list[ShardInfo] = []
        self.files: list[Path] = []  # begun or done: one more than shards while one is written
        self._folder = Path(folder)
        self._name = name
        self._split: Stream = split
        self._format: ShardFormat = shard_format
        self._flushed = flushed
        self.shard_tokens = shard_tokens
        self._parts: list[Tokens] = []
        self._held = 0

    @property
    def tokens(self) -> int:
        """Tokens so far, on disk or not."""
        return sum(shard.tokens for shard in self.shards) + self._held

    def write(self, tokens: npt.ArrayLike) -> None:
        """Append ``tokens``, shape (n,), integers in [0, 65535]; the array is copied."""
        rest = _as_tokens(tokens)
        while rest.size:
            part = rest[: self.shard_tokens - self._held].copy()
            rest = rest[part.size :]
            self._parts.append(part)
            self._held += part.size
            if self._held == self.shard_tokens:
                self._flush()

    def close(self) -> list[ShardInfo]:
        """Write what is left and return all shards in order."""
        if self._held:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        index = len(self.shards)
        split: Split = ("val" if index == 0 else "train") if self._split == "all" else self._split
        end = ".npy" if self._format == "npy" else ".bin"
        path = self._folder / f"{self._name}_{split}_{index:06d}{end}"
        if path.exists():
            raise FileExistsError(errno.EEXIST, "gpt2fast did not write this file", str(path))
        self.files.append(path)
        sha256 = _write_shard(path, self._parts, self._format)
        held = self._held
        self.shards.append(ShardInfo(file=path.name, split=split, tokens=held, sha256=sha256))
        self._parts, self._held = [], 0
        self._flushed(held)


@dataclass
class _Position:
    """How far a stream is on disk: whole pieces, tokens of the next one, and what those held."""

    pieces: int = 0
    tokens: int = 0
    documents: int = 0
    characters: int = 0


class DatasetWriter:
    """Write a prepared folder: all shards, then the manifest.

    A context manager. Left without `finish` (an exception, Ctrl-C), it takes away what it wrote;
    with a ``key`` only before the first shard is whole.

    With a ``key`` the marker tells after every shard how far each stream is, so that after any end
    of the process a writer with an equal key goes on: see `done`.

    Args:
        folder: made if missing. Existing contents are never touched, with one exception:
            with ``overwrite`` the files of an earlier preparation, finished or interrupted, which
            are known by its manifest or marker. They are replaced when the new ones are complete:
            until then, and after a failure, they are as they were. A folder with other contents
            only is refused.
        name: first part of the shards' names.
        tokenizer: what the tokens mean; recorded in the manifest.
        shard_tokens: tokens a shard.
        overwrite: see ``folder``.
        first_is_val: one stream, "all", whose first shard is for validation; else two, "train" and
            "val".
        shard_format: of the files: "llm.c", "npy" or "raw".
        key: everything that decides the tokens, as JSON values; None: no going on.

    Raises:
        FileExistsError: the folder is in use and ``overwrite`` is not set, or is not ours, or
            holds an interrupted preparation with another key.
        ShardError: a shard of the interrupted preparation is damaged.

    >>> with DatasetWriter("data", "mine", tokenizer=ByteTokenizer()) as writer:
    ...     writer.write("train", [1, 2, 3], documents=1)
    ...     writer.write("val", [4, 5], documents=1)
    ...     manifest = writer.finish(
    ...         SourceInfo(kind="numbers", location="here", documents=2, characters=5)
    ...     )
    >>> manifest.tokens
    {'train': 3, 'val': 2}
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        *,
        tokenizer: Tokenizer,
        shard_tokens: int = 100_000_000,
        overwrite: bool = False,
        first_is_val: bool = False,
        shard_format: ShardFormat = "llm.c",
        key: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._name = name
        self._tokenizer = tokenizer
        self._format: ShardFormat = shard_format
        self._key = None if key is None else json.loads(json.dumps(key))
        self._old = check_output_folder(self._folder, overwrite=overwrite, key=self._key)
        self._created = not self._folder.exists()
        # An earlier preparation stays whole until the new one is: that is written beside it.
        self._stage = self._folder / STAGE if self._old else self._folder
        streams: tuple[Stream, ...] = ("all",) if first_is_val else ("train", "val")
        self._writers: dict[Stream, ShardWriter] = {}
        for stream in streams:
            self._writers[stream] = ShardWriter(
                self._stage,
                name,
                stream,
                shard_tokens,
                shard_format=shard_format,
                flushed=functools.partial(self._on_flush, stream),
            )
        self._positions = {stream: _Position() for stream in streams}
        # The pieces from there on that are not all on disk: tokens, documents, characters.
        self._waiting: dict[Stream, deque[tuple[int, int, int]]] = {s: deque() for s in streams}
        self._drop = dict.fromkeys(streams, 0)
        self._open = True
        if (self._stage / MARKER).exists() and self._key is not None and self._adopt():
            return
        if self._old:
            shutil.rmtree(self._stage, ignore_errors=True)
            self._stage.mkdir(parents=True)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._mark(self._stage)
        except BaseException:
            self._remove_created_folder()
            raise

    @property
    def done(self) -> dict[Stream, int]:
        """How many pieces of each stream are on disk: `write` is to be called from the next on."""
        return {stream: position.pieces for stream, position in self._positions.items()}

    def _adopt(self) -> bool:
        """Go on where an interrupted writer with an equal key was; False if there is none."""
        try:
            marker = json.loads((self._stage / MARKER).read_bytes())
            if marker.get("key") != self._key:
                return False
            streams = marker["streams"]
            shards = {s: [ShardInfo(**v) for v in streams[s]["shards"]] for s in self._writers}
            positions = {s: _Position(**streams[s]["position"]) for s in self._writers}
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        for stream, writer in self._writers.items():
            for info in shards[stream]:
                path = self._stage / info.file
                try:
                    found = read_shard(path, self._format).size
                except (OSError, ShardError) as error:
                    raise ShardError(
                        f"{error}; prepare again with --overwrite (overwrite=True)"
                    ) from error
                if found != info.tokens:
                    raise ShardError(f"{path}: {found} tokens, {info.tokens} were written")
                writer.files.append(path)
            writer.shards = shards[stream]
            self._drop[stream] = positions[stream].tokens
        self._positions = positions
        # A shard that was written when the marker did not know yet, and halves of files.
        known = {MARKER, *(info.file for infos in shards.values() for info in infos)}
        for name in _files_we_wrote(self._stage, sorted(os.listdir(self._stage))):
            if name not in known:
                (self._stage / name).unlink(missing_ok=True)
        return True

    def _on_flush(self, stream: Stream, tokens: int) -> None:
        """A shard is on disk: so are the pieces whose last token is in it."""
        position, waiting = self._positions[stream], self._waiting[stream]
        position.tokens += tokens
        while waiting and position.tokens >= waiting[0][0]:
            size, documents, characters = waiting.popleft()
            position.tokens -= size
            position.pieces += 1
            position.documents += documents
            position.characters += characters
        if self._key is not None:
            self._mark(self._stage)

    def _mark(self, folder: Path) -> None:
        """From here to its removal the marker or the manifest names all files that are ours."""
        names = {self._name}
        names |= {m["name"] for file in self._old if (m := re.match(_SHARD_FILE, file))}
        marker: dict[str, Any] = {"format": "gpt2fast-partial", "names": sorted(names)}
        if self._key is not None:
            marker["key"] = self._key
            marker["streams"] = {
                stream: {
                    "shards": [shard.model_dump() for shard in writer.shards],
                    "position": asdict(self._positions[stream]),
                }
                for stream, writer in self._writers.items()
            }
        data = json.dumps(marker).encode()
        with _atomic_write(folder / MARKER, len(data)) as file:
            file.write(data)

    def _replace_old(self, new: Sequence[str]) -> None:
        """Put the new shards in the place of the old files; the manifest follows."""
        for name in new:
            if name not in self._old and (self._folder / name).exists():
                path = str(self._folder / name)
                raise FileExistsError(errno.EEXIST, "gpt2fast did not write this file", path)
        self._mark(self._folder)
        (self._stage / MARKER).unlink(missing_ok=True)
        for name in self._old:
            if name != MARKER:
                (self._folder / name).unlink(missing_ok=True)
        for name in new:
            os.replace(self._stage / name, self._folder / name)
        self._stage.rmdir()

    def write(
        self, stream: Stream, tokens: npt.ArrayLike, *, documents: int = 0, characters: int = 0
    ) -> None:
        """Append a piece to a stream: ``tokens``, shape (n,), integers in [0, 65535].

        ``documents`` and ``characters`` are what the piece adds to their counts.
        """
        ids = _as_tokens(tokens)
        self._waiting[stream].append((ids.size, documents, characters))
        drop = min(self._drop[stream], ids.size)
        self._drop[stream] -= drop
        self._writers[stream].write(ids[drop:])

    @property
    def counts(self) -> tuple[int, int]:
        """Documents and characters of all pieces so far, those of an interrupted run included."""
        documents = characters = 0
        for stream, position in self._positions.items():
            waiting = self._waiting[stream]
            documents += position.documents + sum(piece[1] for piece in waiting)
            characters += position.characters + sum(piece[2] for piece in waiting)
        return documents, characters

    def finish(self, source: SourceInfo, layout: Literal["text", "examples"] = "text") -> Manifest:
        """Write the last shards and the manifest. Raises ValueError if a split has no tokens."""
        self._check_both_splits()
        shards = [shard for writer in self._writers.values() for shard in writer.close()]
        tokens: dict[Split, int] = {"train": 0, "val": 0}
        for shard in shards:
            tokens[shard.split] += shard.tokens
        manifest = Manifest(
            tokenizer=self._tokenizer.to_json(),
            shard_format=self._format,
            layout=layout,
            source=source,
            tokens=tokens,
            shards=shards,
        )
        if self._old:
            self._replace_old([shard.file for shard in shards])
        manifest.save(self._folder)
        self._open = False
        (self._folder / MARKER).unlink()
        return manifest

    def _check_both_splits(self) -> None:
        """Raises ValueError if a split has no tokens; before the last shards are written."""
        told = "the source is too small"
        for stream, writer in self._writers.items():
            if stream != "all" and not writer.tokens:
                raise ValueError(f"the {stream} split has no tokens: {told}")
            if stream == "all" and writer.tokens <= writer.shard_tokens:
                split = "train" if writer.tokens else "val"
                if writer.tokens:
                    told += (
                        f": all its {writer.tokens:,} tokens are in shard 0, which is for "
                        "validation. Use smaller shards, or a share: --val-fraction 0.1"
                    )
                raise ValueError(f"the {split} split has no tokens: {told}")

    def discard(self) -> None:
        """Take away the files of this unfinished run, and the folder if it was made for it."""
        if not self._open:
            return
        self._open = False
        begun = any(writer.shards for writer in self._writers.values())
        if self._key is not None and begun and not (self._folder / MANIFEST).exists():
            return  # the same call goes on from there
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


def check_output_folder(
    folder: Path, *, overwrite: bool, key: Mapping[str, Any] | None = None, early: bool = False
) -> list[str]:
    """The files of an earlier preparation in ``folder``, which ``overwrite`` may delete.

    An interrupted preparation with an equal ``key`` is none of these: it goes on. ``early``: the
    key is not known yet, any will do.

    Raises FileExistsError unless the folder is missing, empty, to go on, or ours and ``overwrite``
    is set; NotADirectoryError for a file.
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
        what, differs = "a prepared data set", ""
        if MANIFEST not in ours:
            theirs = json.loads((folder / MARKER).read_bytes()).get("key")
            if theirs is not None and (early or theirs == key):
                return []
            what = "an interrupted preparation"
            if isinstance(theirs, dict) and key is not None:
                names = [n for n in sorted({*theirs, *key}) if theirs.get(n) != key.get(n)]
                differs = f" with another {', '.join(names)}"
        raise FileExistsError(
            errno.EEXIST,
            f"the folder holds {what}{differs}: pass --overwrite (overwrite=True) to replace it",
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
            patterns = [rf"{re.escape(n)}_(train|val)_[0-9]{{6,}}\.(bin|npy)" for n in names]
        except (ValueError, KeyError, TypeError):
            return []
        file = "|".join([*patterns, re.escape(MANIFEST), re.escape(MARKER)])
        ours += [n for n in present if re.fullmatch(rf"{file}|\.({file})\.[0-9]+\.tmp", n)]
    return list(dict.fromkeys(ours))
