"""Loss curves of our kernels beside plain PyTorch's, from the same weights on the same text.

    python -m benchmarks.convergence --out benchmarks/results/convergence/NAME

writes NAME.json and NAME.png. The truth here is the reference in fp64; in fp32 and in bf16 autocast
run the reference and our kernels. The yardstick is measured: our curve may be from the truth at most
twice as far as the reference of the same precision is, or as a second reference run is whose
sequences lie in another order in the batch, and so rounds differently.
"""

import argparse
import copy
import json
import os
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

import gpt2fast
from gpt2fast import GPT, GPTConfig

#: name: (dtype of the weights, autocast, backend, sequences of a batch in reverse order)
RUNS: dict[str, tuple[torch.dtype, bool, str | None, bool]] = {
    "fp64 reference": (torch.float64, False, "reference", False),
    "fp32 reference": (torch.float32, False, "reference", False),
    "fp32 reference, reversed": (torch.float32, False, "reference", True),
    "fp32 gpt2fast": (torch.float32, False, None, False),
    "bf16 reference": (torch.float32, True, "reference", False),
    "bf16 reference, reversed": (torch.float32, True, "reference", True),
    "bf16 gpt2fast": (torch.float32, True, None, False),
}


def python_source(size: int = 1_000_000) -> bytes:
    """Text that every machine has: Python's own library."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return b"".join(file.read_bytes() for file in files)[:size]


def curve(start: GPT, run: str, batches: list[Tensor], lr: float) -> list[float]:
    """The loss of every step of one run from the weights of `start`."""
    dtype, half, backend, reverse = RUNS[run]
    model = copy.deepcopy(start).to(dtype).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    losses = []
    with gpt2fast.use_backend(backend):
        for tokens in batches:
            tokens = tokens.flip(0) if reverse else tokens
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    return losses


def curves(
    text: bytes, steps: int, layers: int, heads: int, width: int, batch: int, length: int
) -> dict[str, list[float]]:
    """The curves of all runs."""
    torch.manual_seed(1337)
    config = GPTConfig(
        n_layer=layers, n_head=heads, n_embd=width, vocab_size=256, block_size=length
    )
    start = GPT(config)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - length - 1, (steps, batch))
    batches = [torch.stack([data[i : i + length + 1] for i in row]) for row in starts.tolist()]
    return {run: curve(start, run, batches, 1e-3) for run in RUNS}


def distances(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The mean distance from the fp64 curve, by precision: ours and the two references'."""
    truth = torch.tensor(found["fp64 reference"], dtype=torch.float64)

    def far(name: str) -> float:
        return (torch.tensor(found[name], dtype=torch.float64) - truth).abs().mean().item()

    return {
        p: {
            "gpt2fast": far(f"{p} gpt2fast"),
            "reference": max(far(f"{p} reference"), far(f"{p} reference, reversed")),
        }
        for p in ("fp32", "bf16")
    }


#: Of the runs of one precision: colour and label.
STYLES = {
    "reference": ("#7f7f7f", "plain PyTorch"),
    "reference, reversed": ("#bcbd22", "plain PyTorch, batch in reverse"),
    "gpt2fast": ("#d62728", "gpt2fast"),
}
#: Steps over which the lines of distances are averaged, so that they can be told apart.
WINDOW = 15


def smooth(values: list[float]) -> list[float]:
    """Geometric means over a window around each step."""
    logs = torch.tensor(values, dtype=torch.float64).clamp(min=1e-12).log()
    parts = (logs[max(0, i - WINDOW // 2) : i + WINDOW // 2 + 1] for i in range(len(logs)))
    return [part.mean().exp().item() for part in parts]


def plot(found: dict[str, list[float]], path: Path, title: str) -> None:
    """A column a precision: the curves, and below how far each is from fp64."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(10, 6.5), sharex=True, sharey="row", constrained_layout=True
    )
    truth = found["fp64 reference"]
    bound = {p: 2 * pair["reference"] for p, pair in distances(found).items()}
    for (above, below), precision in zip(axes.T, bound, strict=True):
        above.plot(truth, color="black", linewidth=2.5, alpha=0.35, label="plain PyTorch in fp64")
        for run, (color, label) in STYLES.items():
            losses = found[f"{precision} {run}"]
            apart = [abs(a - b) for a, b in zip(losses, truth, strict=True)]
            dashes = "--" if run == "gpt2fast" else "-"
            above.plot(losses, dashes, color=color, linewidth=1, label=label)
            mean = sum(apart) / len(apart)
            below.semilogy(smooth(apart), color=color, linewidth=1.4, label=f"{label}: {mean:.1e}")
        below.axhline(bound[precision], color="black", linestyle=":", label="bound of the mean")
        above.set_title("fp32" if precision == "fp32" else "bf16 autocast", fontsize=10)
        above.legend(fontsize=8, frameon=False)
        below.legend(fontsize=8, frameon=False, title="mean over all steps", title_fontsize=8)
        below.set_xlabel("step")
        for axis in (above, below):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("distance from the fp64 curve")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path of the files, without suffix")
    parser.add_argument("--text", type=Path, help="default: Python's own library")
    for name, default in (("steps", 400), ("layers", 4), ("heads", 4), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    options = vars(parser.parse_args())
    out, text = options.pop("out"), options.pop("text")
    source = python_source() if text is None else text.read_bytes()
    found = curves(source, **options)
    far = distances(found)
    name = "Python's library" if text is None else text.name
    title = (
        f"{options['layers']} layers, width {options['width']}, {options['batch']} x"
        f" {options['length']} bytes of {name} a step, AdamW, torch {torch.__version__}"
    )
    whole = {"setting": title, "options": options, "distances": far, "losses": found}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(whole) + "\n")
    plot(found, out.with_suffix(".png"), title)
    for precision, pair in far.items():
        print(
            f"{precision}: gpt2fast {pair['gpt2fast']:.2e} from fp64 in the mean, reference"
            f" {pair['reference']:.2e}"
        )


if __name__ == "__main__":
    main()
