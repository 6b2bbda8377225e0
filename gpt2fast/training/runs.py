"""Run folders: where a run keeps its configuration, metrics, checkpoints and report.

runs/001/
    train_config.json   the effective configuration
    metrics.jsonl       a line for every step and every validation
    checkpoints/        see checkpoint.py
    tensorboard/, wandb/    where asked for
    data/               the offline default text, where no data was named
    report.json, loss.png, sample.txt       written at the end
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Final

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "METRICS",
    "RUNS",
    "TENSORBOARD",
    "WANDB",
    "create_run",
    "newest_run",
]

RUNS: Final = Path("runs")
CONFIG: Final = "train_config.json"
METRICS: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints"
TENSORBOARD: Final = "tensorboard"
WANDB: Final = "wandb"
_OURS: Final = frozenset(
    {
        CONFIG,
        METRICS,
        CHECKPOINTS,
        TENSORBOARD,
        WANDB,
        "data",
        "report.json",
        "loss.png",
        "sample.txt",
    }
)


def create_run(out: Path | None, *, overwrite: bool = False) -> Path:
    """Make the folder of a new run: `out`, or the next free number in runs/.

    With `overwrite` an earlier run in `out` is deleted first.

    Raises:
        FileExistsError: `out` has contents, and is not a run or `overwrite` is not set.
        OSError: it cannot be made.
    """
    if out is None:
        RUNS.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name) for p in RUNS.iterdir() if p.name.isdecimal()), default=0)
        while True:
            try:
                (RUNS / f"{number:03d}").mkdir()
            except FileExistsError:  # another run started at the same time
                number += 1
            else:
                return RUNS / f"{number:03d}"
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if present:
        if not present <= _OURS or CONFIG not in present:
            raise FileExistsError(
                errno.EEXIST, "the folder is not empty and is not a run: choose another", str(out)
            )
        if not overwrite:
            raise FileExistsError(
                errno.EEXIST,
                "the folder holds a run: pass --overwrite to replace it or --resume to go on",
                str(out),
            )
        for name in [*sorted(present - {CONFIG}), CONFIG]:  # known as a run until all is gone
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    return out


def newest_run(folder: Path = RUNS) -> Path:
    """The run in `folder` that began last, of those with a checkpoint if there is one.

    Raises:
        FileNotFoundError: there is no run.
    """
    runs = [path.parent for path in folder.glob(f"*/{CONFIG}")]
    runs = [run for run in runs if any((run / CHECKPOINTS).glob("step_*"))] or runs
    if not runs:
        raise FileNotFoundError(
            errno.ENOENT, "no runs here: `gpt2fast train` makes one", str(folder)
        )
    return max(runs, key=lambda run: ((run / CONFIG).stat().st_mtime_ns, run.name))
