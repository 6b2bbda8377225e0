"""``gpt2fast sample``: text from a trained model.

One sample is printed as it is drawn; several are drawn as one batch and printed at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

HELP = "sample text from a run, a checkpoint or a pretrained GPT-2"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gpt2fast sample``."""
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="MODEL",
        help="run, checkpoint, Hugging Face folder, llm.c .bin, gpt2 .. gpt2-xl, or owner/name on"
        " the Hub (default: the newest run in runs/)",
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="how the text begins")
    parser.add_argument("--max-new-tokens", type=int, default=300, metavar="N", help="[300]")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="[0.8]")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest that sum to P only"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="for the same text again")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="[1]")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--no-cache", action="store_true", help="without the key/value cache")
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        help="read weights of 4, 2 or 1 bytes for each token, on the CPU (default: the model's own)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """Print the samples to stdout and the speed to stderr."""
    import torch

    from gpt2fast.decoding import Decoder
    from gpt2fast.generation import prompt_tokens, stream
    from gpt2fast.training.checkpoint import load_tokenizer, open_model

    for name in ("num_samples", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be between 0 and 2^63 - 1, got {args.seed}")
    if not args.prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in args.prompt):
        raise ValueError("--prompt is not valid UTF-8")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = device_named("cpu" if args.weights and args.device == "auto" else args.device)
    if args.weights and (device != "cpu" or args.no_cache):
        raise ValueError(f"--weights {args.weights} works on the CPU and with the key/value cache")
    damaged: list[str] = []
    model, folder = open_model(args.folder, damaged)
    for problem in damaged:
        print(f"warning: passed over a damaged checkpoint: {problem}", file=sys.stderr)
    engine = Decoder(model, args.weights) if args.weights else model.to(device)
    del model  # a decoder may need its own weights only
    tokenizer = load_tokenizer(folder, engine.config.vocab_size)
    prompt = prompt_tokens(tokenizer, args.prompt).expand(args.num_samples, -1)

    began = time.perf_counter()
    count = 0

    def counted() -> Iterator[torch.Tensor]:
        nonlocal count
        for tokens in stream(
            engine,
            prompt.to(device),
            args.max_new_tokens,
            temperature=0.0 if args.greedy else args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            generator=args.seed,
            stop_token=tokenizer.eot_token,
            use_cache=not args.no_cache,
        ):
            count += 1
            yield tokens

    def until_end(tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            if token == tokenizer.eot_token:
                return
            yield token

    if args.num_samples == 1:
        sys.stdout.write(args.prompt)
        sys.stdout.flush()
        for text in tokenizer.decode_stream(until_end(int(row[0]) for row in counted())):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        columns = list(counted())
        for index in range(args.num_samples):
            text = "".join(
                tokenizer.decode_stream(until_end(int(column[index]) for column in columns))
            )
            print(f"--- sample {index + 1} of {args.num_samples} ---\n{args.prompt}{text}")
    sys.stdout.flush()
    seconds = time.perf_counter() - began
    total = count * args.num_samples
    print(f"{total} tokens, {total / max(seconds, 1e-9):,.0f} tokens/s, {folder}", file=sys.stderr)
    return 0


def device_named(name: str) -> str:
    """cpu or cuda for auto, cpu or cuda. Raises ValueError for what is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name}: not there; use auto, cpu or cuda")
    return name
