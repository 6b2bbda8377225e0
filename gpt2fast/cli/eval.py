"""``gpt2fast eval``: how good a model is.

    gpt2fast eval hellaswag gpt2                    OpenAI's 124M
    gpt2fast eval hellaswag runs/001 --limit 500    the newest checkpoint of a run
    gpt2fast eval loss gpt2 --data data/fineweb     loss on validation shards

A model is a run, a checkpoint, a Hugging Face GPT-2 folder, an llm.c .bin file, one of OpenAI's
(gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a repository owner/name on the Hugging Face Hub.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gpt2fast.data import Tokenizer
    from gpt2fast.model import GPT

HELP = "score a model: HellaSwag, or the loss on prepared shards"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gpt2fast eval``."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)

    hellaswag = tasks.add_parser(
        "hellaswag",
        help="share of 10,042 contexts for which the right one of four endings is likeliest",
        allow_abbrev=False,
    )
    _model_arguments(hellaswag)
    hellaswag.add_argument(
        "--data", type=Path, metavar="FILE", help="JSONL file (default: downloaded once)"
    )
    hellaswag.add_argument("--split", choices=("val", "train"), default="val", help="[val]")
    hellaswag.add_argument("--limit", type=int, metavar="N", help="the first N examples only")
    hellaswag.add_argument(
        "--batch-tokens", type=int, metavar="N", help="positions in a call of the model [4096]"
    )
    _machine_arguments(hellaswag)

    loss = tasks.add_parser(
        "loss", help="mean loss in nats a token on prepared shards", allow_abbrev=False
    )
    _model_arguments(loss)
    loss.add_argument(
        "--data", required=True, metavar="DIR", help="folder that `gpt2fast prepare` made"
    )
    loss.add_argument("--split", choices=("val", "train"), default="val", help="[val]")
    loss.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows a batch [8]")
    loss.add_argument("--block-size", type=int, metavar="N", help="tokens a row [the model's]")
    loss.add_argument("--max-batches", type=int, metavar="N", help="the first N batches only")
    loss.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="also with weights as `gpt2fast sample --weights` has them, and the change [float32]",
    )
    _machine_arguments(loss)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, file, gpt2 .. gpt2-xl, or owner/name (default: the newest run in runs/)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")


def _machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="[float32]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """Score the model, print the result, return 0. Errors are raised."""
    import torch

    from gpt2fast import backends

    for name in ("limit", "threads", "batch_tokens"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.json is not None and not args.json.parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: no such folder")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    task = _hellaswag if args.task == "hellaswag" else _loss
    result = task(args, dtype)
    result["backend"] = backends.choose(torch.empty(0, device=result["device"]))
    if args.json is not None:
        _write(args.json, result)
        print(f"written to {args.json}")
    return 0


def _open(args: argparse.Namespace) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model on its device, its tokenizer, and the first fields of the result."""
    from gpt2fast import __version__
    from gpt2fast.backends import keep_freed_memory
    from gpt2fast.cli.sample import device_named
    from gpt2fast.training.checkpoint import load_tokenizer, open_model

    device = device_named(args.device)
    if device == "cpu":
        keep_freed_memory()
    damaged: list[str] = []
    model, origin = open_model(args.model, damaged)
    for problem in damaged:
        print(f"warning: passed over a damaged checkpoint: {problem}", file=sys.stderr)
    tokenizer = load_tokenizer(origin, model.config.vocab_size)
    return (
        model.to(device),
        tokenizer,
        {
            "task": args.task,
            "model": str(origin),
            "parameters": model.num_parameters(),
            "gpt2fast": __version__,
            "device": device,
            "dtype": args.dtype,
            "split": args.split,
        },
    )


def _hellaswag(args: argparse.Namespace, dtype: torch.dtype | None) -> dict[str, Any]:
    from gpt2fast.data.download import sha256_of
    from gpt2fast.evaluation import download_examples, evaluate_hellaswag, read_examples

    # The data first: a missing file is told before a large model is read.
    path = args.data or download_examples(args.split)
    examples = read_examples(path, args.limit)
    model, tokenizer, told = _open(args)
    began = time.perf_counter()
    found = evaluate_hellaswag(
        model, tokenizer, examples, batch_tokens=args.batch_tokens, dtype=dtype
    )
    seconds = time.perf_counter() - began
    print(f"{told['model']} on {path}")
    print(f"acc       {found.acc:.4f} +- {found.acc_stderr:.4f}   smallest sum of losses")
    print(f"acc_norm  {found.acc_norm:.4f} +- {found.acc_norm_stderr:.4f}   smallest mean loss")
    cut = f", {found.truncated:,} cut to block_size" if found.truncated else ""
    print(
        f"{found.examples:,} examples{cut}, {seconds:.1f} s, "
        f"{found.examples / seconds:,.1f} examples/s"
    )
    return {**told, "data": str(path), "data_sha256": sha256_of(path), **asdict(found),
            "seconds": round(seconds, 3)}  # fmt: skip


def _loss(args: argparse.Namespace, dtype: torch.dtype | None) -> dict[str, Any]:
    from gpt2fast.data import TokenDataset
    from gpt2fast.decoding import Decoder
    from gpt2fast.evaluation import evaluate_loss

    if args.weights != "float32":
        if args.device == "cuda" or dtype is not None:
            raise ValueError(f"--weights {args.weights} works on the CPU, beside --dtype float32")
        args.device = "cpu"
    dataset = TokenDataset(args.data, args.split)
    model, tokenizer, told = _open(args)
    if tokenizer != dataset.tokenizer:
        raise ValueError(
            f"{args.data} was prepared with the {dataset.tokenizer.name} tokenizer, the model has "
            f"{tokenizer.name}" + (" of other characters" if tokenizer.name == "char" else "")
        )
    how = {
        "batch_size": args.batch_size,
        "block_size": args.block_size,
        "max_batches": args.max_batches,
        "dtype": dtype,
    }
    began = time.perf_counter()
    found = evaluate_loss(model, dataset, **how)
    seconds = time.perf_counter() - began
    print(f"{told['model']} on {args.data}, {args.split}")
    changed: dict[str, Any] = {"weights": args.weights}
    if args.weights != "float32":
        other = evaluate_loss(Decoder(model, args.weights), dataset, **how).loss
        changed |= {"loss_with_weights": other, "change": other - found.loss}
        print(f"loss        {other:.4f} with {args.weights} weights, {other - found.loss:+.5f}")
    print(f"loss        {found.loss:.4f} nats a token")
    print(f"perplexity  {found.perplexity:,.2f}")
    print(f"{found.tokens:,} tokens, {seconds:.1f} s, {found.tokens / seconds:,.0f} tokens/s")
    return {**told, "data": str(args.data), "data_fingerprint": dataset.fingerprint,
            **asdict(found), **changed, "seconds": round(seconds, 3)}  # fmt: skip


def _write(path: Path, result: dict[str, Any]) -> None:
    import json
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
