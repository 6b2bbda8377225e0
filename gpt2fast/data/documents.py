"""Documents where they lie: text, JSONL and Parquet files, compressed or not, and the Hub's data.

Everything is read as a stream, in an order that is the same each time: memory does not grow with
the corpus, and a piece's number says where it is.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from gpt2fast.data.download import DownloadError
from gpt2fast.data.tokenizers import Tokenizer

__all__ = [
    "DATASETS",
    "hub_dataset",
    "hub_texts",
    "json_lines",
    "kind_of",
    "parquet_texts",
    "text_chunks",
    "text_parts",
]

_KINDS: Final = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst")

#: Short names for data sets on the Hub: repository and configuration.
DATASETS: Final = {
    f"{name}{suffix}": (f"HuggingFaceFW/{name}", config)
    for name in ("fineweb", "fineweb-edu")
    for suffix, config in (
        ("", "sample-10BT"),
        ("-10BT", "sample-10BT"),
        ("-100BT", "sample-100BT"),
        ("-350BT", "sample-350BT"),
        ("-all", "default"),
    )
}
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_CHUNK_BYTES: Final = 1 << 20

Progress = Callable[[int], None]


def kind_of(path: Path) -> str | None:
    """ "text", "jsonl" or "parquet" by the file's name, compressed or not; None for others."""
    name = Path(path.stem) if path.suffix in _COMPRESSED else path
    kind = _KINDS.get(name.suffix)
    return None if kind == "parquet" and path.suffix in _COMPRESSED else kind


def hub_dataset(name: str) -> tuple[str, str | None] | None:
    """Repository and configuration that a source's name stands for on the Hub, or None."""
    return DATASETS.get(name) or ((name, None) if _REPOSITORY.fullmatch(name) else None)


class _Counted(io.RawIOBase):
    """A file that tells how many of its bytes have been read."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._progress(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(path: Path, progress: Progress) -> Any:
    """A binary file of the uncompressed bytes; `read(n)` gives n except at the end."""
    raw = io.BufferedReader(_Counted(path, progress), _CHUNK_BYTES)
    match path.suffix:
        case ".gz":
            return gzip.open(raw)
        case ".bz2":
            return bz2.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".zst":
            return _zstd(path, raw)
    return raw


def _zstd(path: Path, raw: BinaryIO) -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            raise RuntimeError(
                f'{path}: .zst files need Python 3.14 or: pip install "gpt2fast[datasets]"'
            ) from error
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader, _CHUNK_BYTES)
    return zstd.open(raw)


def _blocks(path: Path, progress: Progress) -> Iterator[bytes]:
    """The uncompressed bytes of a file in blocks of one size; the last is shorter.

    Raises ValueError for damaged compressed data.
    """
    with _opened(path, progress) as file:
        while True:
            try:
                block = file.read(_CHUNK_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
                raise ValueError(f"{path}: damaged or cut short: {error}") from error
            except OSError as error:
                if error.errno is None and path.suffix in _COMPRESSED:  # bz2 says it so
                    raise ValueError(f"{path}: damaged or cut short: {error}") from error
                raise
            except Exception as error:
                if type(error).__name__ != "ZstdError":
                    raise
                raise ValueError(f"{path}: damaged or cut short: {error}") from error
            if not block:
                return
            yield block


def text_chunks(path: Path, progress: Progress = lambda count: None) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, without a byte order mark.

    Raises ValueError naming file and offset where it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed, first = 0, True
    blocks = _blocks(path, progress)
    while True:
        block = next(blocks, b"")
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = consumed - pending + error.start
            raise ValueError(f"{path}: not UTF-8 at byte {at}: {error.reason}") from error
        consumed += len(block)
        if text and first:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not block:
            return


def text_parts(coder: Tokenizer, chunks: Iterable[str], size: int) -> Iterator[str]:
    """A text that comes in chunks, cut into parts of about ``size`` that may be encoded apart."""
    held = ""
    for chunk in chunks:
        held += chunk
        if len(held) >= 2 * size:
            # What the last part is may depend on what follows it.
            *parts, held = coder.split(held, size)
            yield from parts
    yield from coder.split(held, size)


def json_lines(path: Path, progress: Progress = lambda count: None) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSONL file that are not blank, with their numbers from 1; not yet parsed."""
    number, held = 0, b""
    for block in _blocks(path, progress):
        *lines, held = (held + block).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
    if held.strip():
        yield number + 1, held


def parquet_texts(
    path: Path, field: str, progress: Progress = lambda count: None
) -> Iterator[tuple[int, str]]:
    """The texts in a column of a Parquet file, with their row numbers from 1; a null is empty.

    Raises:
        RuntimeError: the package pyarrow is missing.
        ValueError: not Parquet, or without that column of strings.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise RuntimeError(
            f'{path}: Parquet needs the package pyarrow: pip install "gpt2fast[datasets]"'
        ) from error
    size, told = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: no column {field!r}, only {names}: --text-field NAME")
            rows, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None and not isinstance(text, str):
                        kind = type(text).__name__
                        raise ValueError(f"{path}: column {field!r} holds {kind}, not text")
                    yield number, text or ""
                now = size * number // max(rows, 1)
                progress(now - told)
                told = now
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: {error}") from error


def hub_texts(
    repository: str, config: str | None, split: str, field: str, skip: int = 0
) -> Iterator[str]:
    """The texts of a data set on the Hugging Face Hub from row ``skip`` on, as a stream.

    Raises:
        DownloadError: the package datasets is missing, or the Hub was not reached.
        ValueError: no such data set, configuration, split or column.
    """
    by_hand = (
        f"Or fetch Parquet or JSONL files from https://huggingface.co/datasets/{repository} on "
        "another machine and prepare their folder: gpt2fast prepare FOLDER"
    )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DownloadError(
            f"{repository}: there is no such file or folder, and data sets of the Hugging Face Hub "
            f'need the package datasets: pip install "gpt2fast[datasets]". {by_hand}'
        ) from error
    try:
        rows = load_dataset(repository, config, split=split, streaming=True)
        rows = iter(rows.skip(skip) if skip else rows)
        for row in rows:
            text = row.get(field)
            if field not in row:
                names = ", ".join(row)
                raise ValueError(f"{repository}: no column {field!r}, only {names}")
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"{repository}: column {field!r} holds {kind}, not text")
            yield text or ""
    except OSError as error:  # no connection, an HTTP error, no such data set
        raise DownloadError(
            f"{repository} could not be read from the Hugging Face Hub: {error}. Whole shards are "
            f"kept: the same command goes on. {by_hand}"
        ) from error
