"""HellaSwag: ours against the straightforward way, on the same weights and examples.

    chrt -f 50 python -m benchmarks.hellaswag --model micro --examples 64

The straightforward way is that of build-nanogpt's hellaswag.py: one example at a time through
transformers' GPT2LMHeadModel, context and ending in each of four rows, padded, logits of all positions,
cross-entropy of all, masked. Examples are made up, as there is no network here: a third short (context
15 to 40 tokens, endings 5 to 20), two thirds long (60 to 110, 15 to 40). Scores must agree.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="micro")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # the peer has the same allocator
    model = GPT(GPTConfig.from_name(args.model)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer, examples = Numbers(), made_up(args.examples)
    ways = {
        "straightforward": lambda: straightforward(theirs, tokenizer, examples),
        "gpt2fast": lambda: score_examples(model, tokenizer, examples, progress=False).losses,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds):
        scores = {}
        for name in list(ways) if number % 2 else reversed(list(ways)):
            began = time.perf_counter()
            scores[name] = ways[name]()
            times[name].append(time.perf_counter() - began)
        np.testing.assert_allclose(scores["gpt2fast"], scores["straightforward"], rtol=1e-4)
    for name, seconds in times.items():
        print(f"{name:<16} {args.examples / min(seconds):8.1f} examples/s (best of {args.rounds})")
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} (median), {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
