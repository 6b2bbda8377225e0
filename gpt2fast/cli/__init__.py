"""The command line. A command is a module here with HELP, configure(parser) and run(args).

A command's arguments and imports are set up only when it is called, so that ``gpt2fast --help``
does not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = ("info", "prepare", "fetch", "train", "sample", "eval", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for an error, 2 for wrong usage.

    Errors that a user can mend are one line on stderr; others are bugs and keep their traceback.

    Raises:
        What went wrong, instead of that line, where GPT2FAST_TRACEBACK is set.

    >>> from gpt2fast.cli import main
    >>> main(["info", "--no-such-option"])
    2
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _spin_briefly()
    try:
        args = _parser(words).parse_args(words)
        return int(args.run(args))
    except SystemExit as stop:  # argparse: 0 after --help, 2 for wrong usage
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, is gone; Python would complain about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("GPT2FAST_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")  # torchrun's
        which = "" if rank == "0" else f" in process {rank}"
        print(f"error{which}: {_told(error)}", file=sys.stderr)
        if _in_process_group():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # threads of a broken group may abort the process while Python ends
        return 1


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


def _spin_briefly() -> None:
    """Lets OpenMP threads sleep soon at a barrier; has an effect before PyTorch is loaded.

    libgomp spins 300,000 rounds by default. Where another process has a CPU, the thread that is
    waited for does not run meanwhile: a training step of a small model took 1260 ms instead of 73.
    With 10,000 rounds it takes 230, and 76 on a free machine (2 cores, batch 8, 128 tokens).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpt2fast",
        description="GPT-2 made fast: train and sample on tested kernels.",
        epilog="gpt2fast COMMAND --help tells a command's arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    called = next((word for word in words if not word.startswith("-")), None)
    for name in COMMANDS:
        module = importlib.import_module(f"gpt2fast.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=(module.__doc__ or "").partition("\n\n")[2] or module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == called:
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser


def _version() -> str:
    from gpt2fast import __version__

    return f"gpt2fast {__version__}"


def _told(error: Exception) -> str:
    """An error's message; for a file's with the path first, without the number."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__
