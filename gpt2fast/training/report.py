"""The end of a run: what was reached, as text, numbers and a picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2fast.training.compare import Comparison
from gpt2fast.training.progress import duration

__all__ = ["plot_losses", "read_metrics", "smooth", "summary", "write_report"]

Floats = npt.NDArray[np.float64]

BLUE, ORANGE, GREY = "#1f6fb4", "#d1590b", "#6b6b6b"


def read_metrics(path: Path) -> tuple[Floats, Floats]:
    """(step, training loss) and (step, validation loss), each of shape (n, 2), of metrics.jsonl."""
    losses: dict[str, list[tuple[float, float]]] = {"loss": [], "val_loss": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, found in losses.items():
            if name in record:
                found.append((record["step"], record[name]))
    train, val = (np.array(found, dtype=np.float64).reshape(-1, 2) for found in losses.values())
    return train, val


def smooth(values: Floats, window: int) -> Floats:
    """The mean over a window centred on each value; the window is cut at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = np.maximum(0, index - window // 2)
    last = np.minimum(len(values), index + window // 2 + 1)
    return (total[last] - total[first]) / (last - first)


def plot_losses(metrics: Path, bigram: float | None, path: Path) -> None:
    """Draw training and validation loss over the steps, and the bigram model's, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, val = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot()
    if len(train):
        window = max(1, len(train) // 40)
        label = "training, each step" if window > 1 else "training"
        axes.plot(*train.T, color=BLUE, alpha=0.3 if window > 1 else 1, linewidth=0.8, label=label)
        if window > 1:
            label = f"training, mean of {window} steps"
            axes.plot(train[:, 0], smooth(train[:, 1], window), color=BLUE, lw=1.8, label=label)
    if len(val):
        axes.plot(*val.T, "o-", color=ORANGE, markersize=5, linewidth=1, label="validation")
    if bigram is not None:
        axes.axhline(
            bigram, color=GREY, linestyle="--", linewidth=1.2,
            label=f"bigram model on the validation text: {bigram:.2f}",
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(f"gpt2fast: {metrics.parent.name}", loc="left", fontsize=11)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def write_report(path: Path, **values: Any) -> None:
    """The numbers of the report as JSON; a Comparison becomes an object."""
    plain = {k: asdict(v) if isinstance(v, Comparison) else v for k, v in values.items()}
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def summary(
    *,
    val_loss: float,
    bigram: float | None,
    steps: int,
    tokens: int,
    seconds: float,
    comparison: Comparison | None,
    reference_reason: str,
) -> str:
    """The report's lines for the terminal."""
    lines = [
        f"trained     {steps:,} steps, {tokens:,} tokens in {duration(seconds)}",
        f"validation  loss {val_loss:.4f} nats a token (perplexity {math.exp(val_loss):.2f})",
    ]
    if bigram is not None:
        better = f"{bigram - val_loss:.4f} better" if val_loss < bigram else "not better yet"
        lines.append(
            f"bigram      loss {bigram:.4f} (perplexity {math.exp(bigram):.2f}): the model is {better}"
        )
    if comparison is not None:
        lines.append(
            f"speed       {comparison.tokens_per_second:,.0f} tokens/s with {comparison.backend} "
            f"kernels, {comparison.reference_tokens_per_second:,.0f} on the plain PyTorch "
            f"reference: "
            f"{comparison.ratio:.2f}x (medians of {comparison.rounds} steps each, in turn)"
        )
    elif reference_reason:
        lines.append(f"speed       {reference_reason}")
    return "\n".join(lines)
