"""``gpt2fast export``: a model for other programs.

    gpt2fast export runs/001 --out my-gpt2          a Hugging Face folder, ready to upload
    gpt2fast export gpt2 --out gpt2_124M.bin        an llm.c file
    gpt2fast export gpt2_124M.bin --out folder      and back

The Hugging Face folder holds the weights (safetensors), the configuration, GPT-2's tokenizer where
the model has it, and a model card (README.md) that states how the model was trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "write a model as a Hugging Face folder or an llm.c file"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gpt2fast export``."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="run, checkpoint, folder, .bin file, gpt2 .. gpt2-xl, or owner/name on the Hub"
        " (default: the newest run in runs/)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="folder, or .bin file, to write"
    )
    parser.add_argument(
        "--format",
        choices=("huggingface", "llmc"),
        help="default: llmc for a PATH that ends in .bin, else huggingface",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights in the file (default: the model's; llm.c's versions 3 and 5)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at PATH")


def run(args: argparse.Namespace) -> int:
    """Export, print what was written, return 0. Errors are raised."""
    import torch

    from gpt2fast.export import check_target, export_huggingface, export_llmc
    from gpt2fast.training.checkpoint import open_model

    kind = args.format or ("llmc" if args.out.suffix == ".bin" else "huggingface")
    check_target(args.out, kind, overwrite=args.overwrite)
    damaged: list[str] = []
    model, origin = open_model(args.model, damaged)
    for problem in damaged:
        print(f"warning: passed over a damaged checkpoint: {problem}", file=sys.stderr)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    export = export_llmc if kind == "llmc" else export_huggingface
    for line in export(model, origin, args.out, dtype=dtype):
        print(line)
    return 0
