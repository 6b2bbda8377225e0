"""Chooses the backend of each op and size on a GPU, from a run of the benchmarks on it.

    python -m benchmarks.select device-results/ops/benchmarks.json --gpu "NVIDIA H200" [--write]

An op's backend is the one whose forward and backward together take the least time, in the geometric
mean over the run's shapes of a size class (backends.size_class of the main input's elements). --write
puts the choice where gpt2fast.backends finds it.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks import report
from gpt2fast.backends import OPS, SELECTED, size_class

OURS = "gpt2fast "
#: Ops whose benchmark has another name than the op that is chosen by it.
SAME = {
    "add_layer_norm": "layer_norm",
    "adamw with clipping": "adamw",
    "flash_attn_varlen": "attention",
}


def choices(rows: list[dict[str, Any]], measured: str) -> dict[str, dict[str, dict[str, str]]]:
    """By op and size class: the backend, why, and where that was measured; those with one backend are
    left out."""
    times: dict[tuple[str, str], dict[tuple[str, str], dict[str, float]]] = {}
    for row in rows:
        op = SAME.get(row["op"], row["op"])
        whole = (
            "both" if any(r["direction"] == "both" for r in rows if r["op"] == row["op"]) else ""
        )
        if op not in OPS or not row["variant"].startswith(OURS):
            continue
        if row["direction"] != (whole or row["direction"]):
            continue
        cases = times.setdefault((op, str(size_class(row["elements"]))), {})
        case = cases.setdefault((row["op"], row["label"]), {})
        case[row["variant"].removeprefix(OURS)] = row["median"]
    found: dict[str, dict[str, dict[str, str]]] = {}
    for (op, size), cases in times.items():
        names = sorted(set.intersection(*(set(case) for case in cases.values())))
        if len(names) < 2:
            continue
        mean = {
            n: math.exp(sum(math.log(c[n]) for c in cases.values()) / len(cases)) for n in names
        }
        first, second, *_ = sorted(names, key=mean.__getitem__)
        count = "1 shape" if len(cases) == 1 else f"{len(cases)} shapes"
        why = f"{mean[second] / mean[first]:.2f}x {second} over {count}"
        found.setdefault(op, {})[size] = {"backend": first, "why": why, "measured": measured}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    parser.add_argument(
        "--gpu", required=True, help="its name, as torch.cuda.get_device_name has it"
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = json.dumps(choices(report.load(options.run)[0], str(options.run)), indent=1)
    print(text)
    if options.write:
        SELECTED.mkdir(exist_ok=True)
        path = SELECTED / (options.gpu.replace(" ", "-").lower() + ".json")
        path.write_text(text + "\n")
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
