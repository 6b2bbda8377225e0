"""``gpt2fast fetch``: ready-made token shards from the Hugging Face Hub.

    gpt2fast fetch fineweb10B-gpt2 --shards 10 --out data/fineweb      1B tokens and validation
    gpt2fast fetch owner/name --out data/name                          any of llm.c's format

Every file is checked by the sha256 that the Hub has of it. After any interruption the same command
goes on; one with more --shards fetches the rest.
"""

from __future__ import annotations

import argparse
import shlex

HELP = "get ready-made token shards, hash-checked"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gpt2fast fetch``."""
    from gpt2fast.data.ready import READY

    parser.add_argument(
        "name", metavar="NAME", help=f"{', '.join(READY)}, or owner/name of a data set on the Hub"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--shards", type=int, metavar="N", help="the first N training shards (default: all)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit")


def run(args: argparse.Namespace) -> int:
    """Fetch, print a summary, return 0. Errors are raised."""
    from gpt2fast.data.ready import fetch_shards

    manifest = fetch_shards(args.name, args.out, shards=args.shards, revision=args.revision)
    for split, tokens in manifest.tokens.items():
        shards = sum(shard.split == split for shard in manifest.shards)
        print(f"{split:<6}{tokens:>16,} tokens in {shards} shard{'s' * (shards != 1)}")
    print(f"written to {args.out}")
    print(f"next: gpt2fast train --data {shlex.quote(args.out)}")
    return 0
