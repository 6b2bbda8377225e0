"""Make a folder of token shards from Tiny Shakespeare, from text files, or from Python itself."""

from __future__ import annotations

import contextlib
import os
import platform
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from gpt2fast.data.download import fetch, sha256_of
from gpt2fast.data.shards import (
    DatasetWriter,
    Manifest,
    SourceInfo,
    Split,
    check_output_folder,
)
from gpt2fast.data.tokenizers import Tokenizer, Tokens, get_tokenizer

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

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class _Corpus:
    """The files of a source in their order, each one document."""

    files: Sequence[Path]
    sizes: Sequence[int]  # bytes
    location: str
    sha256: str | None = None  # of the one file


@dataclass(frozen=True)
class _Piece:
    """Text to encode by itself: a document, or a part of one."""

    split: Split
    text: str
    begins_document: bool = False  # put end-of-text before it


def prepare(
    source: Source,
    out: str | Path,
    *,
    input: str | Path | None = None,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
    max_bytes: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenise a source into the folder ``out`` and return its manifest.

    The same input gives the same bytes, whatever ``workers`` is. If anything fails, or on Ctrl-C,
    ``out`` is left as it was.

    A source of one file is one document: the first ``int((1 - val_fraction) * n)`` of its ``n``
    characters are for training. It is held in memory whole. Of several files each is a document,
    belongs to one split as a whole (see `assign_splits`), and is preceded by the end-of-text
    token where the tokenizer has one. Empty files are left out. Texts are UTF-8, line ends are
    kept, a byte order mark is dropped.

    Args:
        source: ``"shakespeare"``: Tiny Shakespeare, from ``input`` or downloaded once;
            ``"text"``: ``input``, a file, or a folder of which all ``*.txt`` below it are taken;
            ``"stdlib"``: the modules of this Python's standard library, without tests.
        out: folder to make; see `DatasetWriter` for what it may hold before.
        tokenizer: ``"gpt2"``, ``"char"`` (vocabulary of both splits' characters) or ``"byte"``.
        val_fraction: share of the characters for validation, between 0 and 1.
        shard_tokens: tokens a shard.
        max_bytes: of several documents take the first ones, up to this many bytes together.
        workers: threads; default one for each CPU this process may use. tiktoken encodes
            outside Python's interpreter lock, so threads do what processes would.
        overwrite: replace an earlier preparation in ``out``, once the new one is complete.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: an argument or the text is wrong: bytes that are not UTF-8 (named by file and
            offset), another Tiny Shakespeare, a split without tokens.
        FileExistsError, OSError: ``out`` is in use, a file cannot be read or written, no space.
        TokenizerUnavailable, DownloadError: RuntimeErrors, with what to do about it.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    # Before the work: downloads, and the reading of all text for a char vocabulary.
    check_output_folder(Path(out), overwrite=overwrite)

    corpus = _find_corpus(source, None if input is None else Path(input), max_bytes)
    if len(corpus.files) == 1:
        text = _read_text(corpus.files[0])
        cut = int((1 - val_fraction) * len(text))
        pieces: Iterable[_Piece] = [_Piece("train", text[:cut]), _Piece("val", text[cut:])]
        vocabulary: Iterable[str] = [text]
    else:
        pieces = _documents(corpus, val_fraction)
        vocabulary = map(_read_text, corpus.files)
    coder = get_tokenizer(tokenizer, vocabulary if tokenizer == "char" else None)

    documents = characters = tokens = 0
    begin = time.perf_counter()
    with (
        DatasetWriter(
            out, source, tokenizer=coder, shard_tokens=shard_tokens, overwrite=overwrite
        ) as writer,
        tqdm(
            total=sum(corpus.sizes), unit="B", unit_scale=True, disable=None if progress else True
        ) as bar,
        contextlib.closing(_encode_in_order(coder, pieces, workers or _cpus())) as results,
    ):
        for piece, ids in results:
            writer.write(piece.split, ids)
            documents += piece.begins_document
            characters += len(piece.text)
            tokens += ids.size
            if not bar.disable:
                rate = tokens / (time.perf_counter() - begin)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(len(piece.text.encode()))
        return writer.finish(
            SourceInfo(
                kind=source,
                location=corpus.location,
                sha256=corpus.sha256,
                documents=max(documents, 1),
                characters=characters,
            )
        )


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


def _find_corpus(source: Source, input: Path | None, max_bytes: int | None) -> _Corpus:
    if source == "shakespeare":
        return _shakespeare(input)
    if source == "text":
        if input is None:
            raise ValueError("the text source needs a file or a folder: --input PATH")
        if input.is_file():
            location = str(input.resolve())
            return _Corpus([input], [input.stat().st_size], location, sha256_of(input))
        if not input.is_dir():
            raise FileNotFoundError(f"--input {input}: no such file or folder")
        files = [path for path in input.rglob("*.txt") if path.is_file()]
        return _folder(input, files, str(input.resolve()), max_bytes)
    if source == "stdlib":
        if input is not None:
            raise ValueError("the stdlib source takes no --input")
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in root.rglob("*.py")
            if _STDLIB_SKIP.isdisjoint(path.relative_to(root).parts[:-1])
        ]
        return _folder(
            root, files, f"standard library of Python {platform.python_version()}", max_bytes
        )
    raise ValueError(f"unknown source {source!r}: choose {', '.join(SOURCES)}")


def _folder(root: Path, files: Iterable[Path], location: str, max_bytes: int | None) -> _Corpus:
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
    return _Corpus(taken, sizes, location)


def _shakespeare(input: Path | None) -> _Corpus:
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
    return _Corpus([path], [path.stat().st_size], SHAKESPEARE_URL, SHAKESPEARE_SHA256)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: {error.reason}") from error


def _documents(corpus: _Corpus, val_fraction: float) -> Iterator[_Piece]:
    """Every document as a piece; read when asked for."""
    for path, split in zip(corpus.files, assign_splits(corpus.sizes, val_fraction), strict=True):
        if text := _read_text(path):
            yield _Piece(split, text, begins_document=True)


def _encode_in_order(
    coder: Tokenizer, pieces: Iterable[_Piece], workers: int
) -> Generator[tuple[_Piece, Tokens]]:
    """Yield the parts of the pieces in order, each with its tokens."""

    def encode(task: list[_Piece]) -> list[tuple[_Piece, Tokens]]:
        return [(piece, _encode(coder, piece)) for piece in task]

    for encoded in _map_in_order(encode, _tasks(coder, pieces), workers):
        yield from encoded


def _encode(coder: Tokenizer, piece: _Piece) -> Tokens:
    ids = coder.encode(piece.text)
    if piece.begins_document and coder.eot_token is not None:
        ids = np.concatenate([np.array([coder.eot_token], dtype=np.uint16), ids])
    return ids


def _tasks(coder: Tokenizer, pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Cut long pieces and gather short ones into tasks of similar size."""
    task: list[_Piece] = []
    held = 0
    for piece in pieces:
        for i, text in enumerate(coder.split(piece.text, _TASK_CHARACTERS)):
            task.append(_Piece(piece.split, text, piece.begins_document and i == 0))
            held += len(text)
            if held >= _TASK_CHARACTERS:
                yield task
                task, held = [], 0
    if task:
        yield task


def _map_in_order(
    function: Callable[[_In], _Out], items: Iterable[_In], workers: int
) -> Iterator[_Out]:
    """``map`` on threads, reading at most ``2 * workers`` items ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    running: deque[Future[_Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:  # an error or Ctrl-C: what has not begun never does
            for future in running:
                future.cancel()


def _cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
