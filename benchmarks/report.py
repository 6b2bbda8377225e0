"""Tables and plots of saved benchmarks.

pytest benchmarks --benchmark-only --benchmark-json=run.json
python -m benchmarks.report run.json                    # the tables, as Markdown
python -m benchmarks.report run.json --plot speed.png   # the speed-up of every op
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

BASE = "torch eager"


def load(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a file that --benchmark-json or --benchmark-save wrote, and the whole file."""
    whole = json.loads(path.read_text())
    rows = [
        {**bench["extra_info"], "median": bench["stats"]["median"]}
        for bench in whole["benchmarks"]
        if bench["extra_info"].get("op")
    ]
    if not rows:
        raise SystemExit(f"{path} has no benchmarks of ours in it")
    return rows, whole


def title(whole: dict[str, Any]) -> str:
    """The machine, date and commit of a file of results."""
    machine = whole["machine_info"]
    return (
        f"{machine['cpu'].get('brand_raw', machine['processor'])}, {machine['threads']} threads,"
        f" torch {machine.get('torch')}, {machine.get('backend')}, {whole['datetime'][:10]},"
        f" commit {whole['commit_info'].get('id', 'unknown')[:10]}"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _memory(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose source is aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _rate(row: dict[str, Any]) -> str:
    if "tokens" in row:
        return f"{row['tokens'] / row['median']:.0f} tokens/s"
    if row["compute_bound"]:
        return f"{row['gigaflops_per_second']:.0f} GFLOP/s"
    return f"{row['gigabytes_per_second']:.1f} GB/s"


def tables(rows: list[dict[str, Any]]) -> str:
    """One Markdown table an op, a line for each shape and direction.

    Times are medians. Rate and fraction of the roofline (the floor measured in the same run over
    the time) are those of ours, the fastest where there are several; memory is the peak beside the
    inputs.
    """
    parts = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        variants = list(dict.fromkeys(row["variant"] for row in mine))
        base = BASE if BASE in variants else variants[0]  # Hugging Face's own model
        lines = []
        for label, direction in dict.fromkeys((row["label"], row["direction"]) for row in mine):
            found = {
                row["variant"]: row
                for row in mine
                if (row["label"], row["direction"]) == (label, direction)
            }
            own = [row for name, row in found.items() if name.startswith("gpt2fast")]
            ours = min(own, key=lambda row: row["median"], default=None)
            peers = [
                row["median"] for name, row in found.items() if not name.startswith("gpt2fast")
            ]
            lines.append(
                [
                    label,
                    direction,
                    *(_time(found[v]["median"]) if v in found else "" for v in variants),
                    f"{found[base]['median'] / ours['median']:.2f}x"
                    if ours and base in found
                    else "",
                    f"{min(peers) / ours['median']:.2f}x" if ours and peers else "",
                    _rate(ours) if ours else "",
                    f"{ours['fraction_of_roofline']:.0%}" if ours else "",
                    " / ".join(_memory(found[v]["peak_bytes"]) for v in variants if v in found),
                ]
            )
        head = ["shape", "direction", *variants, "over eager", "over best peer", "rate"]
        head += ["of roofline", "peak memory"]
        parts.append(f"### {op}\n\n{table(head, lines)}\n")
    return "\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars: how much faster than torch eager each op is, forward and backward together."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    whole = [r for r in rows if r["direction"] in ("both", "step")] or rows
    groups = list(dict.fromkeys((r["op"], r["label"]) for r in whole))
    variants = [v for v in dict.fromkeys(r["variant"] for r in whole) if v != BASE]
    colors = {
        v: "#1b7f5c" if v.startswith("gpt2fast") else f"C{7 + n}" for n, v in enumerate(variants)
    }
    bars, middles = [], []  # a bar is (y, ratio, variant); each group as high as its bars
    y = 0.0
    for op, label in groups:
        found = {r["variant"]: r["median"] for r in whole if (r["op"], r["label"]) == (op, label)}
        here = [v for v in variants if v in found and BASE in found]
        bars += [(y + n, found[BASE] / found[v], v) for n, v in enumerate(here)]
        middles.append(y + (len(here) - 1) / 2)
        y += len(here) + 0.8
    figure, axes = plt.subplots(figsize=(8, 1.0 + 0.16 * y), constrained_layout=True)
    for y, ratio, variant in bars:
        axes.barh(y, ratio, 0.95, color=colors[variant])
        axes.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=6)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[v]) for v in variants]
    figure.legend(handles, variants, fontsize=8, loc="outside lower center", ncols=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(middles, [f"{op}  {label}" for op, label in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("speed against torch eager, forward + backward (higher is faster)")
    axes.margins(x=0.08, y=0.01)
    figure.suptitle(textwrap.fill(title, 110), fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="JSON written by pytest-benchmark")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the speed-ups")
    arguments = parser.parse_args()
    rows, whole = load(arguments.file)
    print(f"{title(whole)}\n\n{tables(rows)}")
    if arguments.plot:
        plot(rows, arguments.plot, title(whole))


if __name__ == "__main__":
    main()
