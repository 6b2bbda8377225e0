"""Where the time of a training step goes on a GPU, kernel by kernel.

python -m benchmarks.profile_step [--variant gpt2fast] [--model gpt2] [--json FILE]
"""

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import gpt2fast
from benchmarks.harness import DEVICE, REHEARSAL, pick, randint
from benchmarks.step_worker import VARIANTS, config_of, make_step

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--variant", choices=VARIANTS, default=pick(VARIANTS[-1], *["gpt2fast"] * 2)
    )
    parser.add_argument("--model", default=pick("gpt2", "gpt2", "nano"))
    parser.add_argument("--shape", type=int, nargs=2, default=pick((4, 64), (64, 1024), (1, 8)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = config_of(options.model)
    with gpt2fast.use_backend("triton" if REHEARSAL else None):
        step = make_step(options.variant, config)
        batches = [randint(config.vocab_size, *options.shape) for _ in range(STEPS + 2)]
        for batch in batches[:2]:
            step(batch, batch)
        activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
        with profile(activities={ProfilerActivity.CPU, activity}) as profiler:
            for batch in batches[2:]:
                step(batch, batch)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
    kind = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    events = [(getattr(event, kind), event) for event in profiler.key_averages()]
    if DEVICE.type == "cuda":  # kernels, not the host's calls that launched them
        events = [(t, e) for t, e in events if str(e.device_type).endswith("CUDA")]
    total = sum(spent for spent, _ in events) or 1
    rows = [
        {
            "kernel": event.key,
            "calls": event.count // STEPS,
            "ms": spent / 1e3 / STEPS,
            "share": spent / total,
        }
        for spent, event in sorted(events, key=lambda pair: -pair[0])[:40]
    ]
    for row in rows:
        print(f"{row['ms']:9.3f} ms {row['share']:6.1%} {row['calls']:5} x {row['kernel'][:90]}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
