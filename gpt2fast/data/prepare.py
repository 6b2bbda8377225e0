"""Make a folder of token shards from text, from files of documents, or from the Hub's data sets."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from tqdm import tqdm

from gpt2fast.data import documents
from gpt2fast.data.download import fetch, sha256_of
from gpt2fast.data.encoding import Piece, encode_in_order, text_of
from gpt2fast.data.shards import (
    DatasetWriter,
    Manifest,
    ShardFormat,
    SourceInfo,
    Split,
    Stream,
    check_output_folder,
)
from gpt2fast.data.tokenizers import Tokenizer, get_tokenizer

__all__ = ["SOURCES", "Source", "assign_splits", "prepare"]

Source = Literal["shakespeare", "text", "stdlib"]
SOURCES: Final[tuple[Source, ...]] = ("shakespeare", "text", "stdlib")

SHAKESPEARE_URL: Final = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256: Final = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Not the library but its tests, and what pip put beside it.
_STDLIB_SKIP: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# Characters a task: 50 ms of GPT-2 encoding, a thousand times the cost of handing it over.
_TASK_CHARACTERS: Final = 1 << 18

# From here on tokenising runs in processes: starting them takes half a second.
_PROCESS_BYTES: Final = 1 << 25

_Progress = Callable[[int], None]


@dataclass(frozen=True)
class _Corpus:
    """A source as found: its pieces can be read any number of times, in the same order."""

    name: str  # of the shards
    kind: str
    location: str
    #: Called with a tokenizer, what is told how many bytes were read, and pieces to leave out.
    pieces: Callable[[Tokenizer, _Progress, int], Iterator[Piece]]
    texts: Callable[[], Iterable[str]]  # for a vocabulary of characters
    bytes: int | None = None
    sha256: str | None = None  # of the one file
    first_is_val: bool = False
    key: dict[str, Any] = field(default_factory=dict)


def prepare(
    source: Source | str,
    out: str | Path,
    *,
    input: str | Path | None = None,
    tokenizer: str = "gpt2",
    val_fraction: float | None = None,
    shard_tokens: int = 100_000_000,
    shard_format: ShardFormat = "llm.c",
    text_field: str = "text",
    supervised: bool = False,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    max_bytes: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenise a source into the folder ``out`` and return its manifest.

    The same input gives the same bytes, whatever ``workers`` is, and however often it was
    interrupted: given again, the same call goes on after the last whole shard, after Ctrl-C, an
    error or kill -9. If it fails before the first shard is whole, ``out`` is left as it was.

    Everything is read as a stream. A text of one file is one document: the first
    ``int((1 - val_fraction) * n)`` of its ``n`` characters are for training. Of several text files
    each is a document, belongs to one split as a whole (see `assign_splits`), and is preceded by
    the end-of-text token where the tokenizer has one; so are the lines of JSONL and the rows of
    Parquet and of data sets. Empty documents are left out. Texts are UTF-8, line ends are kept, a
    byte order mark is dropped.

    Args:
        source: ``"shakespeare"``: Tiny Shakespeare, from ``input`` or downloaded once;
            ``"text"``: ``input``, a file, or a folder of which all ``*.txt`` below it are taken;
            ``"stdlib"``: the modules of this Python's standard library, without tests;
            a path: a file of text, JSONL (``.jsonl``) or Parquet, or a folder of such, all but
            Parquet also compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``);
            ``"fineweb-edu"`` or another of `documents.DATASETS`, or ``"owner/name"``: a data set
            of the Hugging Face Hub, streamed.
        out: folder to make; see `DatasetWriter` for what it may hold before.
        tokenizer: ``"gpt2"``, ``"char"`` (vocabulary of both splits' characters) or ``"byte"``.
        val_fraction: share for validation, between 0 and 1. By default a tenth; of a data set, and
            of documents that fill two shards or more, the first shard.
        shard_tokens: tokens a shard.
        shard_format: ``"llm.c"``, ``"npy"`` (build-nanogpt) or ``"raw"`` (nanoGPT).
        text_field: where JSON objects, Parquet files and data sets have the text.
        supervised: the JSONL lines are prompts and responses, for training with the loss on the
            responses: ``{"prompt": ..., "response": ...}`` or ``{"messages": [...]}``; see
            `gpt2fast.data.examples`. By default a tenth of them is for validation.
        dataset_config, dataset_split: of a data set on the Hub.
        max_bytes: of several text files take the first ones, up to this many bytes together.
        workers: threads, or processes for large sources; default one for each CPU this process
            may use.
        overwrite: replace an earlier preparation in ``out``, once the new one is complete.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: an argument or the text is wrong: bytes that are not UTF-8 (named by file and
            offset), another Tiny Shakespeare, a split without tokens.
        FileExistsError, OSError: ``out`` is in use, a file cannot be read or written, no space.
        TokenizerUnavailable, DownloadError: RuntimeErrors, with what to do about it.

    >>> from pathlib import Path
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 10)
    >>> prepare("text", "data", input="mine.txt", tokenizer="char").tokens
    {'train': 189, 'val': 21}
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    if supervised:
        if not _is_jsonl(Path(source)):
            raise ValueError(f"{source}: prompts and responses are read from JSONL files")
        val_fraction = 0.1 if val_fraction is None else val_fraction
    # Before the work: downloads, and the reading of all text for a char vocabulary.
    check_output_folder(Path(out), overwrite=overwrite, early=True)

    corpus = _find_corpus(
        source,
        None if input is None else Path(input),
        val_fraction=val_fraction,
        max_bytes=max_bytes,
        shard_tokens=shard_tokens,
        text_field=text_field,
        dataset=(dataset_config, dataset_split),
    )
    if supervised and tokenizer == "char":
        raise ValueError("examples need a tokenizer with end-of-text: gpt2 or byte")
    coder = get_tokenizer(tokenizer, corpus.texts() if tokenizer == "char" else None)
    key = {
        "source": corpus.kind,
        "location": corpus.location,
        "tokenizer": coder.to_json(),
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "shard_format": shard_format,
        "text_field": text_field,
        "part_characters": _TASK_CHARACTERS,
        "supervised": supervised,
        **corpus.key,
    }
    workers = workers or _cpus()
    large = corpus.bytes is None or corpus.bytes >= _PROCESS_BYTES
    with (
        DatasetWriter(
            out,
            corpus.name,
            tokenizer=coder,
            shard_tokens=shard_tokens,
            overwrite=overwrite,
            first_is_val=corpus.first_is_val,
            shard_format=shard_format,
            key=key,
        ) as writer,
        tqdm(
            total=corpus.bytes,
            unit="B" if corpus.bytes is not None else " tokens",
            unit_scale=True,
            disable=None if progress else True,
        ) as bar,
    ):
        done = writer.done
        skipped = done.get("all", 0) if corpus.bytes is None else 0
        pieces = corpus.pieces(coder, bar.update if corpus.bytes is not None else _ignore, skipped)
        left = Counter[Any](done)
        left["all"] -= skipped

        def to_do() -> Iterator[Piece]:
            """Without those that an interrupted run has written."""
            for piece in pieces:
                if left[piece.stream] > 0:
                    left[piece.stream] -= 1
                else:
                    yield piece

        tokens = 0
        begin = time.perf_counter()
        with contextlib.closing(
            encode_in_order(
                coder,
                to_do(),
                workers=workers,
                processes=large and workers > 1,
                task_size=_TASK_CHARACTERS,
                field=None if supervised else text_field,
            )
        ) as results:
            for piece, ids, characters in results:
                writer.write(
                    piece.stream,
                    ids,
                    documents=int(piece.begins_document and characters > 0),
                    characters=characters,
                )
                tokens += ids.size
                if not bar.disable:
                    rate = tokens / (time.perf_counter() - begin)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    if corpus.bytes is None:
                        bar.update(ids.size)
        found, characters = writer.counts
        return writer.finish(
            SourceInfo(
                kind=corpus.kind,
                location=corpus.location,
                sha256=corpus.sha256,
                documents=max(found, 1),
                characters=characters,
            ),
            "examples" if supervised else "text",
        )


def _ignore(count: int) -> None:
    pass


def assign_splits(sizes: Sequence[int], val_fraction: float) -> list[Split]:
    """The split of each document, given their sizes in order; both splits get at least one.

    A document goes to validation when that brings the validation share of all sizes so far nearer
    to ``val_fraction``. So the share is met to within one document, validation is spread over the
    whole order rather than taken from its end, and there is no randomness to record.

    Raises ValueError for fewer than two documents.
    """
    if len(sizes) < 2:
        raise ValueError(f"a split by documents needs at least 2 of them, got {len(sizes)}")
    splits: list[Split] = []
    total = val = 0
    for size in sizes:
        total += size
        is_val = 2 * (val_fraction * total - val) >= size
        val += size * is_val
        splits.append("val" if is_val else "train")
    # Few documents: the wanted share may be nearer to none. Then the one nearest to it is taken.
    missing: Split
    for missing, share in (("val", val_fraction), ("train", 1 - val_fraction)):
        if missing not in splits:
            nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - share * total))
            splits[nearest] = missing
    return splits


def _find_corpus(
    source: str,
    input: Path | None,
    *,
    val_fraction: float | None,
    max_bytes: int | None,
    shard_tokens: int,
    text_field: str,
    dataset: tuple[str | None, str],
) -> _Corpus:
    share = 0.1 if val_fraction is None else val_fraction
    if source == "shakespeare":
        return _one_text(
            source, _shakespeare(input), share, SHAKESPEARE_URL, sha256=SHAKESPEARE_SHA256
        )
    if source == "stdlib":
        if input is not None:
            raise ValueError("the stdlib source takes no --input")
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in root.rglob("*.py")
            if _STDLIB_SKIP.isdisjoint(path.relative_to(root).parts[:-1])
        ]
        location = f"standard library of Python {platform.python_version()}"
        return _texts(source, root, files, location, share, max_bytes)
    if source == "text":
        if input is None:
            raise ValueError("the text source needs a file or a folder: --input PATH")
        if input.is_file():
            return _one_text(source, input, share, str(input.resolve()))
        if not input.is_dir():
            raise FileNotFoundError(f"--input {input}: no such file or folder")
        files = [path for path in input.rglob("*.txt*") if path.is_file() and _is_txt(path)]
        return _texts(source, input, files, str(input.resolve()), share, max_bytes)
    if input is not None:
        raise ValueError(f"the source {source!r} takes no --input")
    path = Path(source)
    if path.exists():
        files = [path]
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file() and documents.kind_of(p)]
        kinds = {documents.kind_of(file) for file in files}
        if kinds <= {"text", None}:  # a file of another name that is asked for is text
            if path.is_file():
                return _one_text("text", path, share, str(path.resolve()))
            return _texts("text", path, files, str(path.resolve()), share, max_bytes)
        return _documents(path, files, text_field, val_fraction, shard_tokens)
    if (named := documents.hub_dataset(source)) is not None:
        config, split = dataset[0] or named[1], dataset[1]
        return _hub(source, named[0], config, split, text_field, val_fraction)
    raise ValueError(
        f"unknown source {source!r}: choose {', '.join(SOURCES)}, a file or folder that exists, "
        f"{', '.join(documents.DATASETS)}, or owner/name of a data set on the Hugging Face Hub"
    )


def _is_jsonl(path: Path) -> bool:
    """Whether a path is a JSONL file, or a folder of which all files that count are."""
    if path.is_dir():
        kinds = {documents.kind_of(p) for p in path.rglob("*") if p.is_file()} - {None}
        return kinds == {"jsonl"}
    return documents.kind_of(path) == "jsonl"


def _is_txt(path: Path) -> bool:
    return documents.kind_of(path) == "text" and ".txt" in path.suffixes[-2:]


def _shakespeare(input: Path | None) -> Path:
    path = input or fetch(
        SHAKESPEARE_URL,
        "tinyshakespeare.txt",
        SHAKESPEARE_SHA256,
        what="Tiny Shakespeare",
        by_hand="--input PATH",
    )
    if (found := sha256_of(path)) != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{path} is not Tiny Shakespeare: expected sha256 {SHAKESPEARE_SHA256}, got {found}. "
            "For a text of your own use the text source"
        )
    return path


def _one_text(
    kind: str, path: Path, val_fraction: float, location: str, sha256: str | None = None
) -> _Corpus:
    """A file that is one document, cut in two by its characters."""

    def pieces(coder: Tokenizer, progress: _Progress, skip: int) -> Iterator[Piece]:
        cut = int((1 - val_fraction) * sum(map(len, documents.text_chunks(path))))
        chunks = _Cut(documents.text_chunks(path, progress), cut)
        for stream in ("train", "val"):
            for part in documents.text_parts(coder, chunks, _TASK_CHARACTERS):
                yield Piece(stream, part)
            chunks.limit = None

    sha256 = sha256 or sha256_of(path)
    return _Corpus(
        kind,
        kind,
        location,
        pieces,
        lambda: documents.text_chunks(path),
        path.stat().st_size,
        sha256,
        key={"sha256": sha256},
    )


class _Cut:
    """Chunks of text up to ``limit`` characters; iterated again, with no limit, the rest."""

    def __init__(self, chunks: Iterator[str], limit: int) -> None:
        self._chunks = chunks
        self._rest = ""
        self.limit: int | None = limit

    def __iter__(self) -> Iterator[str]:
        while self.limit is None or self.limit > 0:
            chunk = self._rest or next(self._chunks, "")
            if not chunk:
                return
            taken, self._rest = chunk[: self.limit], chunk[len(chunk[: self.limit]) :]
            if self.limit is not None:
                self.limit -= len(taken)
            yield taken


def _texts(
    kind: str,
    root: Path,
    files: Iterable[Path],
    location: str,
    val_fraction: float,
    max_bytes: int | None,
) -> _Corpus:
    """The non-empty ``files`` in the order of their paths below ``root``, up to ``max_bytes``."""
    taken: list[Path] = []
    sizes: list[int] = []
    left = float("inf") if max_bytes is None else max_bytes
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        if size := path.stat().st_size:
            left -= size
            if left < 0:
                break
            taken.append(path)
            sizes.append(size)
    if not taken:
        limit = "" if max_bytes is None else f" within max_bytes={max_bytes}"
        raise ValueError(f"{root}: no text files with contents{limit}")
    if len(taken) == 1:
        return _one_text(kind, taken[0], val_fraction, location)
    splits = assign_splits(sizes, val_fraction)

    def pieces(coder: Tokenizer, progress: _Progress, skip: int) -> Iterator[Piece]:
        for path, split in zip(taken, splits, strict=True):
            chunks = documents.text_chunks(path, progress)
            for i, part in enumerate(documents.text_parts(coder, chunks, _TASK_CHARACTERS)):
                yield Piece(split, part, begins_document=i == 0)

    def texts() -> Iterator[str]:
        for path in taken:
            yield from documents.text_chunks(path)

    key = {"files": _listing(root, taken, sizes)}
    return _Corpus(kind, kind, location, pieces, texts, sum(sizes), key=key)


def _listing(root: Path, files: Sequence[Path], sizes: Sequence[int]) -> str:
    """Names and sizes of files, as a hash: what a preparation that goes on compares."""
    names = [file.relative_to(root).as_posix() for file in files]
    return hashlib.sha256(json.dumps([names, list(sizes)]).encode()).hexdigest()


class _Share:
    """The split of documents that come one by one, as `assign_splits` does it."""

    def __init__(self, val_fraction: float | None) -> None:
        self._fraction = val_fraction
        self._total = self._val = 0

    def stream(self, size: int) -> Stream:
        if self._fraction is None:
            return "all"
        self._total += size
        if 2 * (self._fraction * self._total - self._val) >= size:
            self._val += size
            return "val"
        return "train"


def _documents(
    root: Path,
    files: Sequence[Path],
    text_field: str,
    val_fraction: float | None,
    shard_tokens: int,
) -> _Corpus:
    """Files of which some hold many documents."""
    files = sorted(files, key=lambda path: path.relative_to(root).as_posix())
    sizes = [file.stat().st_size for file in files]
    # At four bytes a token these fill two shards, and the first one can be spared.
    if val_fraction is None and sum(sizes) < 8 * shard_tokens:
        val_fraction = 0.1

    def pieces(coder: Tokenizer, progress: _Progress, skip: int) -> Iterator[Piece]:
        share = _Share(val_fraction)
        for file, size in zip(files, sizes, strict=True):
            match documents.kind_of(file):
                case "jsonl":
                    for number, line in documents.json_lines(file, progress):
                        where = f"{file}, line {number}"
                        yield Piece(share.stream(len(line)), line, True, where)
                case "parquet":
                    for _, text in documents.parquet_texts(file, text_field, progress):
                        yield Piece(share.stream(len(text)), text, True)
                case _:
                    stream = share.stream(size)
                    chunks = documents.text_chunks(file, progress)
                    for i, part in enumerate(documents.text_parts(coder, chunks, _TASK_CHARACTERS)):
                        yield Piece(stream, part, begins_document=i == 0)

    def texts() -> Iterator[str]:
        # The char tokenizer is what is being made: any other does for cutting texts.
        for piece in pieces(get_tokenizer("byte"), _ignore, 0):
            yield text_of(piece, text_field)

    name = re.sub(r"[^A-Za-z0-9.-]+", "-", root.resolve().name.split(".")[0]).strip("-.")
    return _Corpus(
        name or "data",
        "documents",
        str(root.resolve()),
        pieces,
        texts,
        sum(sizes),
        first_is_val=val_fraction is None,
        key={"files": _listing(root, files, sizes)},
    )


def _hub(
    name: str,
    repository: str,
    config: str | None,
    split: str,
    text_field: str,
    val_fraction: float | None,
) -> _Corpus:
    def pieces(coder: Tokenizer, progress: _Progress, skip: int) -> Iterator[Piece]:
        share = _Share(val_fraction)
        read = partial(documents.hub_texts, repository, config, split, text_field)
        for text in read(skip):
            yield Piece(share.stream(len(text)), text, begins_document=True)

    def texts() -> Iterable[str]:
        raise ValueError("the char tokenizer would read the whole data set first: use gpt2 or byte")

    where = f"{repository}{f', {config}' if config else ''}, {split}"
    return _Corpus(
        name.split("/")[-1],
        "huggingface",
        f"https://huggingface.co/datasets/{where}",
        pieces,
        texts,
        first_is_val=val_fraction is None,
    )


def _cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
