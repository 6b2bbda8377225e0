"""Pieces of documents to tokens, on threads or in processes of their own, in order.

A worker process is this module, run by Python, that reads tasks from its stdin and writes results
to its stdout. It ends when its stdin does: also when the process that started it was killed. (A
multiprocessing pool would import the user's main module again, or fork beside running threads, and
stay behind.) It parses JSON, too, so that the main process only reads lines and hands them on.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import numpy as np

from gpt2fast.data.examples import encode_example
from gpt2fast.data.tokenizers import Tokenizer, Tokens, tokenizer_from_json, without_surrogates

__all__ = ["Piece", "encode_in_order", "text_of"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one, to encode by itself: text, or as bytes a line of JSON."""

    stream: Any
    content: str | bytes
    begins_document: bool = False  # put end-of-text before it
    where: str = ""  # file and line, for messages

    @property
    def size(self) -> int:
        """Characters, or bytes."""
        return len(self.content)


#: Tokens of all pieces of a task one after another; of each its tokens and its characters.
_Encoded = tuple[Tokens, list[int], list[int]]


def _json_of(piece: Piece) -> Any:
    try:
        return json.loads(piece.content)
    except ValueError as error:
        raise ValueError(f"{piece.where}: not JSON: {error}") from error


def text_of(piece: Piece, field: str) -> str:
    """The text of a piece. Raises ValueError for a line that does not hold one."""
    if isinstance(piece.content, str):
        return piece.content
    value = _json_of(piece)
    if not isinstance(value, dict) or field not in value:
        has = f"only {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{piece.where}: no field {field!r}, {has}: --text-field NAME")
    text = value[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{piece.where}: {field!r} holds {type(text).__name__}, not text")
    return without_surrogates(text)


def encode_pieces(coder: Tokenizer, field: str | None, pieces: Sequence[Piece]) -> _Encoded:
    """Tokens of pieces; end-of-text comes before each document, and none for an empty one.

    Without a field pieces are lines of prompts and responses, see `examples`.
    """
    parts: list[Tokens] = []
    sizes, characters = [], []
    for piece in pieces:
        if field is None:
            ids, count = encode_example(coder, _json_of(piece), piece.where)
            parts.append(ids)
            sizes.append(ids.size)
            characters.append(count)
            continue
        text = text_of(piece, field)
        ids = coder.encode(text) if text else np.empty(0, dtype=np.uint16)
        size = ids.size
        if text and piece.begins_document and coder.eot_token is not None:
            parts.append(np.array([coder.eot_token], dtype=np.uint16))
            size += 1
        parts.append(ids)
        sizes.append(size)
        characters.append(len(text))
    return np.concatenate(parts), sizes, characters


def encode_in_order(
    coder: Tokenizer,
    pieces: Iterable[Piece],
    *,
    workers: int,
    processes: bool,
    task_size: int,
    field: str | None = "text",
) -> Generator[tuple[Piece, Tokens, int]]:
    """Yield the pieces in order, each with its tokens and its number of characters.

    Args:
        coder: the tokenizer; tiktoken encodes outside Python's interpreter lock.
        pieces: read at most ``2 * workers`` tasks ahead.
        workers: threads.
        processes: each thread has a process of its own.
        task_size: characters that are handed over at once, or one piece if it has more.
        field: of JSON lines; None: they hold prompts and responses.
    """
    with _Processes(coder, field) if processes else contextlib.nullcontext() as remote:

        def encode(task: list[Piece]) -> tuple[list[Piece], _Encoded]:
            if remote is not None:
                return task, remote.call(task)
            return task, encode_pieces(coder, field, task)

        for task, (ids, sizes, characters) in _map_in_order(
            encode, _tasks(pieces, task_size), workers
        ):
            start = 0
            for piece, size, count in zip(task, sizes, characters, strict=True):
                yield piece, ids[start : start + size], count
                start += size


def _tasks(pieces: Iterable[Piece], task_size: int) -> Iterator[list[Piece]]:
    task: list[Piece] = []
    held = 0
    for piece in pieces:
        task.append(piece)
        held += piece.size
        if held >= task_size:
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


class _Processes:
    """A worker process for each thread that calls; all end with the block."""

    def __init__(self, coder: Tokenizer, field: str | None) -> None:
        self._setting = (coder.to_json(), field)
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def call(self, task: list[Piece]) -> _Encoded:
        """The task's result from this thread's process. Raises what the worker raised."""
        process: subprocess.Popen[bytes] = getattr(self._own, "process", None) or self._start()
        assert process.stdout is not None
        try:
            _send(process.stdin, task)
            failed, result = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a tokenising process ended with {process.wait()}: out of memory?"
            ) from error
        if failed:
            raise result
        encoded: _Encoded = result
        return encoded

    def _start(self) -> subprocess.Popen[bytes]:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from gpt2fast.data.encoding import serve; serve()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._all.append(process)
        self._own.process = process
        _send(process.stdin, self._setting)
        return process

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._all:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        for process in self._all:
            process.wait()


def _send(pipe: IO[bytes] | None, value: Any) -> None:
    assert pipe is not None
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def serve() -> None:
    """A worker process: the setting, then tasks, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    with contextlib.suppress(EOFError, BrokenPipeError):
        described, field = pickle.load(sys.stdin.buffer)
        coder = tokenizer_from_json(described)
        while True:
            task = pickle.load(sys.stdin.buffer)
            answer: tuple[bool, Any]
            try:
                answer = False, encode_pieces(coder, field, task)
            except Exception as error:
                answer = True, error
            _send(sys.stdout.buffer, answer)
