"""``gpt2fast prepare``: text to a folder of token shards."""

from __future__ import annotations

import argparse
import shlex
import time

HELP = "turn text into token shards for training"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gpt2fast prepare``."""
    parser.add_argument(
        "source",
        choices=("shakespeare", "text", "stdlib"),
        help="Tiny Shakespeare; your own text (--input); the source of this Python's library",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--input", metavar="PATH", help="a UTF-8 text file, or a folder of *.txt, each a document"
    )
    parser.add_argument(
        "--tokenizer", choices=("gpt2", "char", "byte"), default="gpt2", help="default: gpt2"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the characters for validation (default: 0.1)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens a shard (default: 100 million, 200 MB)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads (default: one for each CPU)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier preparation in --out"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare, print a summary, return 0. Errors are raised."""
    from gpt2fast.data.prepare import prepare

    begin = time.perf_counter()
    manifest = prepare(
        args.source,
        args.out,
        input=args.input,
        tokenizer=args.tokenizer,
        val_fraction=args.val_fraction,
        shard_tokens=args.shard_tokens,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    seconds = time.perf_counter() - begin
    for split, tokens in manifest.tokens.items():
        shards = sum(shard.split == split for shard in manifest.shards)
        print(f"{split:<6}{tokens:>16,} tokens in {shards} shard{'s' * (shards != 1)}")
    source = manifest.source
    total = sum(manifest.tokens.values())
    print(
        f"{source.documents:,} document{'s' * (source.documents != 1)}, "
        f"{source.characters:,} characters, tokenizer {args.tokenizer}, "
        f"{seconds:.1f} s, {total / seconds:,.0f} tokens/s"
    )
    print(f"written to {args.out}")
    print(f"next: gpt2fast train --data {shlex.quote(args.out)}")
    return 0
