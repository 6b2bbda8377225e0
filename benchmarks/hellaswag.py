"""HellaSwag: ours against the straightforward way, on the same weights and examples.

    chrt -f 50 python -m benchmarks.hellaswag --model micro --examples 64

The straightforward way is that of build-nanogpt's hellaswag.py: one example at a time through
transformers' GPT2LMHeadModel, context and ending in each of four rows, padded, logits of all positions,
cross-entropy of all, masked. Examples are made up, as there is no network here: a third short (context
15 to 40 tokens, endings 5 to 20), two thirds long (60 to 110, 15 to 40). Scores must agree. Each way
runs in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from gpt2fast import GPT, GPTConfig
from gpt2fast.backends import keep_freed_memory
from gpt2fast.data import Gpt2Tokenizer, Tokenizer
from gpt2fast.data.tokenizers import Tokens
from gpt2fast.evaluation import Example, score_examples


class Numbers(Gpt2Tokenizer):
    """Words are token numbers: no vocabulary is needed."""

    def encode(self, text: str) -> Tokens:
        return np.array([int(word) for word in text.split()], dtype=np.uint16)


def made_up(count: int) -> list[Example]:
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(str(draw.randrange(50257)) for _ in range(draw.randint(low, high)))

    kinds = ((15, 40, 5, 20), (60, 110, 15, 40), (60, 110, 15, 40))
    chosen = [kinds[i % 3] for i in range(count)]
    return [Example(text(a, b), tuple(text(c, d) for _ in range(4)), 0) for a, b, c, d in chosen]


@torch.no_grad()
def straightforward(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, examples: Sequence[Example]
) -> np.ndarray:
    """Summed losses (n, 4)."""
    found = []
    for example in examples:
        context = tokenizer.encode(example.context).tolist()
        endings = [tokenizer.encode(" " + ending).tolist() for ending in example.endings]
        length = len(context) + max(map(len, endings))
        tokens = torch.zeros(4, length, dtype=torch.int64)
        mask = torch.zeros(4, length)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        logits = model(tokens).logits[:, :-1].contiguous()
        losses = F.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].contiguous().flatten(), reduction="none"
        )
        found.append((losses.view(4, -1) * mask[:, 1:]).sum(1).numpy())
    return np.stack(found)


#: The peer as anybody would run it, and with the allocator setting that gpt2fast's commands make.
VARIANTS = ("straightforward", "straightforward, malloc tuned", "gpt2fast")


def worker(variant: str, args: argparse.Namespace, weights: str, pipe: Any) -> None:
    """Scores all examples whenever asked to: (seconds, losses (n, 4)). Its allocator is its own."""
    torch.set_num_threads(args.threads)
    if variant != VARIANTS[0]:
        keep_freed_memory()
    tokenizer, examples = Numbers(), made_up(args.examples)
    if variant == "gpt2fast":
        model = GPT.from_pretrained(weights)

        def score() -> np.ndarray:
            return score_examples(model, tokenizer, examples, progress=False).losses
    else:
        theirs = GPT2LMHeadModel.from_pretrained(weights).eval()

        def score() -> np.ndarray:
            return straightforward(theirs, tokenizer, examples)

    pipe.send(None)
    while pipe.recv():
        began = time.perf_counter()
        losses = score()
        pipe.send((time.perf_counter() - began, losses))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="micro")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(0)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        GPT(GPTConfig.from_name(args.model)).save_pretrained(folder)
        for name in VARIANTS:
            pipes[name], theirs = context.Pipe()
            context.Process(target=worker, args=(name, args, folder, theirs), daemon=True).start()
            pipes[name].recv()
    for number in range(args.rounds + 1):  # the first one warms up
        scores = {}
        for name in VARIANTS if number % 2 else reversed(VARIANTS):
            pipes[name].send(True)
            seconds, scores[name] = pipes[name].recv()
            if number:
                times[name].append(seconds)
        for name in VARIANTS[:2]:
            np.testing.assert_allclose(scores["gpt2fast"], scores[name], rtol=1e-4)
    for pipe in pipes.values():
        pipe.send(False)
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times["gpt2fast"], strict=True))
        print(
            f"{name:<30} {args.examples / statistics.median(seconds):7.1f} examples/s; gpt2fast is "
            f"{statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
