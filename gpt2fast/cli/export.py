"""``gpt2fast export``: a model for other programs."""

from __future__ import annotations

import argparse

HELP = "write a model as a Hugging Face folder or an llm.c file"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gpt2fast export``."""


def run(args: argparse.Namespace) -> int:
    """Export, print what was written, return 0. Errors are raised."""
    return 0
