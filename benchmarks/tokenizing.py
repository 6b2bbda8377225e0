"""Tokenising speed: `gpt2fast prepare` beside plain tiktoken, from JSONL to shards of uint16.

    python -m benchmarks.tokenizing --input wikitext.txt --megabytes 64

The peers are the loops of the scripts that people copy: JSON lines are read, tiktoken's own r50k_base
encodes them, one document at a time, a batch of them in threads, or in processes as build-nanogpt's
fineweb.py does; end-of-text goes before each, and the tokens are written as one array. Ours also
hashes, checks and keeps the place for a resume.
Documents are paragraphs of a text, about 3,000 characters each, repeated to the size that is asked
for. All ways must give the same tokens. They run in turn, each round in another order; tokens/s are
medians.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import tiktoken

from gpt2fast.data import TokenDataset, prepare

CHARACTERS, BATCH = 3000, 1024


def documents(text: str, size: int) -> Iterator[str]:
    """Paragraphs of `text` in groups of CHARACTERS, over and over until they are `size` together."""
    group: list[str] = []
    for paragraph in cycle(text.split("\n")):
        group.append(paragraph)
        if (length := sum(map(len, group))) >= CHARACTERS:
            yield "\n".join(group)
            group, size = [], size - length
            if size <= 0:
                return


ENCODER = tiktoken.get_encoding("r50k_base")


def encoded(line: str) -> np.ndarray:
    """The tokens of a JSON line, after end-of-text."""
    tokens = ENCODER.encode_ordinary(json.loads(line)["text"])
    return np.array([ENCODER.eot_token, *tokens], np.uint16)


def one_by_one(file: Iterable[str], _: int) -> Iterable[np.ndarray]:
    return map(encoded, file)


def in_threads(file: Iterable[str], threads: int) -> Iterator[np.ndarray]:
    lines = iter(file)
    while batch := [json.loads(line)["text"] for line in islice(lines, BATCH)]:
        found = ENCODER.encode_ordinary_batch(batch, num_threads=threads)
        tokens = chain.from_iterable((ENCODER.eot_token, *ids) for ids in found)
        yield np.fromiter(tokens, np.uint16)


def in_processes(file: Iterable[str], processes: int) -> Iterator[np.ndarray]:
    with multiprocessing.Pool(processes) as pool:
        yield from pool.imap(encoded, file, chunksize=16)


def plain(
    way: Callable[[Iterable[str], int], Iterable[np.ndarray]], lines: Path, out: Path, workers: int
) -> np.ndarray:
    """Tokens (N,) by tiktoken alone."""
    with lines.open() as file:
        whole = np.concatenate(list(way(file, workers)))
    np.save(out, whole)
    return whole


def ours(lines: Path, out: Path, workers: int) -> np.ndarray:
    """Tokens (N,) of both splits, in order."""
    prepare(str(lines), out, workers=workers, progress=False, val_fraction=0.01)
    data = [TokenDataset(out, split) for split in ("train", "val")]
    return np.concatenate([np.asarray(shard) for part in data for shard in part.shards])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="a text in UTF-8")
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    names: dict[str, Callable[[Path, Path, int], np.ndarray]] = {
        "tiktoken, one by one": partial(plain, one_by_one),
        "tiktoken, threads": partial(plain, in_threads),
        "tiktoken, processes": partial(plain, in_processes),
        "gpt2fast prepare": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "documents.jsonl")
        with lines.open("w") as file:
            text = arguments.input.read_text(encoding="utf-8")
            for document in documents(text, int(arguments.megabytes * 1e6)):
                file.write(json.dumps({"text": document}) + "\n")
        count = 0
        for number in range(arguments.rounds):
            sums = set()
            order = list(names)[number % len(names) :] + list(names)[: number % len(names)]
            for place, name in enumerate(order):
                began = time.perf_counter()
                out = Path(folder, f"{number}-{place}.npy")
                tokens = names[name](lines, out, arguments.workers)
                seconds[name].append(time.perf_counter() - began)
                count = tokens.size
                sums.add((count, int(tokens.sum(dtype=np.int64))))
            assert len(sums) == 1, f"the tokens differ: {sums}"
    best = min(statistics.median(times) for times in list(seconds.values())[:-1])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:<22} {count / median:>12,.0f} tokens/s   {best / median:.2f} of the best peer"
        )


if __name__ == "__main__":
    main()
