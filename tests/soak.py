"""kill -9 at random moments of preparing and of training: what comes of it is what would have.

    OMP_NUM_THREADS=1 python -m tests.soak --kills 50

A run is killed, gone on with and killed again until it ends; then its files are compared with those of
a run that nobody killed, and the next one begins, until the kills are used up. Sessions are forks of
this process, which has PyTorch loaded already: so most kills hit the work and not the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gpt2fast.training.job
from gpt2fast.cli import main as gpt2fast_main
from gpt2fast.data.shards import MANIFEST, MARKER
from gpt2fast.training.checkpoint import list_checkpoints

SECONDS_AT_MOST = 300.0


def session(words: Sequence[str], alive: float | None) -> bool:
    """Runs a command in a fork; kills it after `alive` seconds. Whether it came to its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os._exit(gpt2fast_main(words))
    deadline = time.monotonic() + (SECONDS_AT_MOST if alive is None else alive)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if code := os.waitstatus_to_exitcode(status):
                raise AssertionError(f"{' '.join(words)}: exit code {code}")
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if alive is None:
        raise AssertionError(f"{' '.join(words)}: not done in {SECONDS_AT_MOST:.0f} s")
    return False


def soak(
    kills: int,
    draw: random.Random,
    command: Callable[[Path], list[str] | None],
    compare: Callable[[Path, Path], None],
    folder: Path,
) -> int:
    """Kills sessions until the kills are used up; returns how many runs came whole out of it.

    `command` tells how to begin or go on with what is in a folder; None: it is done.
    """
    whole = folder / "whole"
    began = time.monotonic()
    session(command(whole) or [], None)
    length = time.monotonic() - began
    runs = done = 0
    while done < kills:
        run = folder / f"run{runs}"
        while words := command(run):
            if session(words, draw.uniform(0, length) if done < kills else None):
                break
            done += 1
        compare(whole, run)
        runs += 1
    return runs


def soak_prepare(kills: int, folder: Path, seed: int = 0, documents: int = 8000) -> int:
    """Documents of JSONL to small shards."""
    draw = random.Random(seed)
    source = folder / "source"
    source.mkdir()
    for part in range(4):
        lines = (
            json.dumps({"text": f"{part} {i} " + "lorem ipsum " * draw.randint(0, 40)})
            for i in range(documents // 4)
        )
        (source / f"{part}.jsonl").write_text("\n".join(lines))

    def command(out: Path) -> list[str] | None:
        if (out / MANIFEST).exists():  # killed between the last file and the process's end
            (out / MARKER).unlink(missing_ok=True)
            return None
        options = ["--tokenizer", "byte", "--shard-tokens", "20000", "--val-fraction", "0.1"]
        return ["prepare", str(source), "--out", str(out), *options]

    return soak(kills, draw, command, _same_files, folder)


def _same_files(whole: Path, run: Path) -> None:
    expected, found = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (whole, run))
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert found == expected, [name for name in found if found[name] != expected[name]]


def soak_train(kills: int, folder: Path, seed: int = 0, steps: int = 60) -> int:
    """A tiny model with dropout; a checkpoint after every second step, HellaSwag left out."""
    draw = random.Random(seed)
    (folder / "text.txt").write_text("".join(draw.choices("abcdefgh \n", k=30_000)))
    data = folder / "data"
    session(["prepare", str(folder / "text.txt"), "--tokenizer", "byte", "--out", str(data)], None)
    shape = ["--model", "nano", "--n-layer", "2", "--n-head", "2", "--n-embd", "32"]
    settings = {
        "data": data, "block-size": 32, "batch-size": 4, "max-steps": steps, "warmup-steps": 5,
        "dropout": 0.1, "eval-interval": 7, "eval-batches": 2, "save-interval": 2,
        "sample-tokens": 5, "threads": 1,
    }  # fmt: skip
    flags = [*shape, "--deterministic", "--document-mask"]
    flags += [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def command(out: Path) -> list[str] | None:
        kept = list_checkpoints(out / "checkpoints")
        if kept and kept[-1].step == steps:  # killed in the last validation or the report
            return None
        if kept:
            return ["train", "--resume", str(out)]
        return ["train", "--out", str(out), "--overwrite", *flags]

    return soak(kills, draw, command, _same_runs, folder)


def _same_runs(whole: Path, run: Path) -> None:
    last = [list_checkpoints(folder / "checkpoints")[-1].folder for folder in (whole, run)]
    _same_files(*last)
    records = [_without_times(folder / "metrics.jsonl") for folder in (whole, run)]
    # A run killed after its last checkpoint may lack the last validation.
    assert records[1] in (records[0], records[0][:-1]), "the metrics differ"
    assert not list((run / "checkpoints").glob(".*"))


def _without_times(path: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    times = ("elapsed", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, part in (("prepare", soak_prepare), ("train", soak_train)):
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            runs = part(args.kills, Path(folder), args.seed)
            seconds = time.monotonic() - began
        print(
            f"{name}: {args.kills} kills, {runs} runs, all equal to the unkilled; {seconds:.0f} s"
        )


if __name__ == "__main__":
    assert gpt2fast.training.job  # loaded before the forks
    main()
