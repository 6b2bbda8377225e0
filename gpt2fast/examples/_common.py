"""What the three scripts share: text, the two runs side by side, and the account of them."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2fast.data import BatchLoader, TokenDataset, prepare
from gpt2fast.swap import SwapReport

#: Takes a batch (x, y) to the loss of one optimisation step.
Step = Callable[[Tensor, Tensor], float]

TEXT_BYTES = 4_000_000


@dataclass(frozen=True)
class Result:
    """Both loss curves and speeds.

    Attributes:
        original, swapped: the loss of every step.
        original_speed, swapped_speed: tokens a second, medians over the steps without the first.
        report: what was replaced.
    """

    original: list[float]
    swapped: list[float]
    original_speed: float
    swapped_speed: float
    report: SwapReport

    @property
    def distance(self) -> float:
        """The largest difference between the curves, relative to the loss."""
        pairs = zip(self.original, self.swapped, strict=True)
        return max(abs(a - b) / abs(a) for a, b in pairs)


def arguments(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The options that all three scripts have."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=40, help="optimisation steps")
    parser.add_argument(
        "--data", type=Path, help="a folder of shards; default: Python's own source"
    )
    for name, default in (
        ("batch-size", 8),
        ("block-size", 128),
        ("layers", 4),
        ("heads", 4),
        ("width", 128),
        ("seed", 1337),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=" ")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help=" ")
    parser.add_argument("--device", default="cpu", help=" ")
    return parser.parse_args(argv)


def run(
    options: argparse.Namespace,
    make_model: Callable[[int], nn.Module],
    make_step: Callable[[nn.Module], Step],
    swap: Callable[[nn.Module], SwapReport],
) -> Result:
    """Trains a model and its swapped copy on the same batches and prints how they compare.

    Args:
        options: of :func:`arguments`.
        make_model: the model for a number of tokens in the vocabulary.
        make_step: a training step of a model, with an optimizer of its own.
        swap: puts the kernels in.
    """
    if options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data
        if folder is None:
            folder = Path(temporary) / "stdlib"
            prepare("stdlib", folder, tokenizer="byte", max_bytes=TEXT_BYTES, progress=False)
        dataset = TokenDataset(folder, "train")
        batches = BatchLoader(dataset, options.batch_size, options.block_size, seed=options.seed)
        torch.manual_seed(options.seed)
        model = make_model(dataset.tokenizer.vocab_size)
        model = model.to(options.device, getattr(torch, options.dtype)).train()
        fast = copy.deepcopy(model)
        report = swap(fast)
        print(report)
        print(f"\n{'step':>5} {'original':>10} {'swapped':>10}")
        steps = (make_step(model), make_step(fast))
        losses: tuple[list[float], list[float]] = ([], [])
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(options.steps):
            x, y = (part.to(options.device) for part in next(batches))
            for which in (0, 1) if number % 2 == 0 else (1, 0):  # both meet the same machine
                began = time.perf_counter()
                losses[which].append(steps[which](x, y))  # a float: the device is waited for
                times[which].append(time.perf_counter() - began)
            if number % max(1, options.steps // 10) == 0 or number == options.steps - 1:
                print(f"{number:5d} {losses[0][-1]:10.6f} {losses[1][-1]:10.6f}")
        tokens = options.batch_size * options.block_size
        speeds = [tokens / statistics.median(t[1:] or t) for t in times]
        result = Result(losses[0], losses[1], speeds[0], speeds[1], report)
    print(f"\nlargest distance of the curves: {result.distance:.1e} of the loss")
    print(
        f"tokens/s: original {speeds[0]:,.0f}, swapped {speeds[1]:,.0f}"
        f" ({speeds[1] / speeds[0]:.2f}x)"
    )
    return result


def decay_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
