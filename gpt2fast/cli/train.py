"""``gpt2fast train``: train a GPT.

Without --data it is a demonstration that needs no network and no GPU: a small GPT learns
Python's own source code for at most two minutes. With --data it is a trainer; its defaults are
GPT-2's recipe. Settings come from --config and, above it, the flags.

Ctrl-C finishes the step and saves; --resume goes on, to the same bits as without a break.

On many GPUs: torchrun --nproc-per-node 8 -m gpt2fast train ...
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

HELP = "train a GPT; without arguments a two-minute demonstration"


def configure(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of TrainConfig, and those that say where."""
    from gpt2fast.recipes import recipes
    from gpt2fast.training.config import TrainConfig

    where = parser.add_argument_group("the run")
    where.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default: the next runs/NNN)"
    )
    where.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    where.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="RUN",
        help="go on with a run or checkpoint folder (default: the newest run)",
    )
    where.add_argument(
        "--config",
        metavar="FILE",
        help=f"settings as a .toml or .json file, or a recipe: {', '.join(recipes())}",
    )
    groups: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        title = str(extra["group"]) if isinstance(extra, dict) else "settings"
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        flag = "--" + name.replace("_", "-")
        about = str(field.description)
        if field.annotation is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=about
            )
            continue
        known = "" if field.default is None else f" [{field.default}]"
        group.add_argument(
            flag, default=argparse.SUPPRESS, metavar=_metavar(name), help=about + known
        )


def _metavar(name: str) -> str:
    return {"data": "DIR", "init_from": "MODEL", "model": "NAME"}.get(name, "X")


def run(args: argparse.Namespace) -> int:
    """Train or resume, print the report; 0, or 128 + the number of the signal that stopped it.

    Of the processes that torchrun starts only the first one prints.
    """
    from gpt2fast.recipes import find_recipe
    from gpt2fast.training.config import TrainConfig, load_config, read_settings
    from gpt2fast.training.distributed import environment
    from gpt2fast.training.job import Result, resume_run, start_run
    from gpt2fast.training.runs import newest_run

    flags: dict[str, Any] = {
        name: None if value == "none" else value
        for name, value in vars(args).items()
        if name in TrainConfig.model_fields
    }
    result: Result
    if args.resume is not None:
        if args.out is not None or args.overwrite:
            raise ValueError("--resume goes on in the run's own folder: leave --out, --overwrite")
        path = newest_run() if args.resume == Path() else args.resume
        settings = {**(read_settings(find_recipe(args.config)) if args.config else {}), **flags}
        result = resume_run(path, settings)
    else:
        result = start_run(load_config(args.config, flags), args.out, overwrite=args.overwrite)
    if environment().rank > 0:
        return 0 if result.signal is None else 128 + result.signal
    run_folder = shlex.quote(str(result.run))
    if result.signal is not None:
        print(
            f"stopped at step {result.step}, saved in {result.checkpoint}\n"
            f"go on with: gpt2fast train --resume {run_folder}",
            file=sys.stderr,
        )
        return 128 + result.signal
    print(result.report)
    if result.sample:
        print(f"\nsample:\n{_indented(result.sample)}\n")
    print(f"loss plot   {result.run / 'loss.png'}")
    print(f"checkpoint  {result.checkpoint}")
    print("            opens with transformers.GPT2LMHeadModel.from_pretrained")
    print(f"next        gpt2fast sample {run_folder}")
    return 0


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
