"""``gpt2fast prepare``: text to a folder of token shards.

    gpt2fast prepare fineweb-edu --out data/edu         10B tokens, streamed from the Hub
    gpt2fast prepare crawl/ --out data/crawl            .jsonl, .parquet, .txt; .gz .bz2 .xz .zst
    gpt2fast prepare owner/name --text-field content --out data/name
    gpt2fast prepare pairs.jsonl --supervised --out data/pairs
    gpt2fast prepare text --input book.txt --tokenizer char --out data/book

Supervised lines are {"prompt": "...", "response": "..."}, which follow each other as they are, or
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, which
become "User: ...", an empty line, "Assistant: ..." and end-of-text.

After Ctrl-C or kill -9 the same command goes on after the last whole shard.
"""

from __future__ import annotations

import argparse
import shlex
import time

HELP = "turn text into token shards for training"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gpt2fast prepare``."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a file or folder of text, JSONL or Parquet; fineweb-edu, fineweb (-10BT, -100BT, "
        "-350BT, -all) or owner/name of a data set on the Hugging Face Hub; shakespeare: Tiny "
        "Shakespeare; text: --input; stdlib: the source of this Python's library",
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
        metavar="F",
        help="share for validation (default: 0.1; of a data set, and of documents that fill two "
        "shards or more, the first shard)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens a shard (default: 100 million, 200 MB)",
    )
    parser.add_argument(
        "--format",
        choices=("llm.c", "npy", "raw"),
        default="llm.c",
        help="of the shards: llm.c's .bin, build-nanogpt's .npy, nanoGPT's .bin (default: llm.c)",
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="of JSON and columns (default: text)"
    )
    parser.add_argument(
        "--supervised",
        action="store_true",
        help="JSONL of prompt and response, or of messages: train with the loss on responses only",
    )
    parser.add_argument("--config", metavar="NAME", help="configuration of a data set on the Hub")
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="split of a data set on the Hub [train]"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads, or processes for large sources (default: one for each CPU)",
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
        shard_format=args.format,
        text_field=args.text_field,
        supervised=args.supervised,
        dataset_config=args.config,
        dataset_split=args.split,
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
