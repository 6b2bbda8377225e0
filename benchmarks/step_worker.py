"""One variant of the training step in a process of its own: `python -m benchmarks.step_worker ...`.

Reads lines from standard input; for each it runs one step and answers with a JSON line: seconds,
loss, peak resident memory in bytes. A process of its own, since allocator settings and peak memory
belong to a process.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gpt2fast
from benchmarks.plain_gpt import PlainGPT
from gpt2fast import GPT, GPTConfig

VARIANTS = (
    "torch eager",
    "torch eager, malloc tuned",
    "torch.compile, malloc tuned",
    "gpt2fast cpu",
)
CLIP = 1.0


def make_step(variant: str, config: GPTConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """step(idx, targets) -> loss: forward, backward, clipping at 1.0, AdamW, gradients dropped."""
    torch.manual_seed(0)
    if variant != "torch eager":
        gpt2fast.keep_freed_memory()
    if variant.startswith("gpt2fast"):
        model = GPT(config)
        optimizer = model.configure_optimizer(max_norm=CLIP)

        def fast_step(idx: Tensor, targets: Tensor) -> Tensor:
            _, loss = model(idx, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return fast_step
    plain = PlainGPT(
        config.n_layer, config.n_head, config.n_embd, config.padded_vocab_size, config.block_size
    )
    parameters = list(plain.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(plain, dynamic=False) if "compile" in variant else plain

    def plain_step(idx: Tensor, targets: Tensor) -> Tensor:
        loss = forward(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        fused.step()
        fused.zero_grad(set_to_none=True)
        return loss.detach()

    return plain_step


def peak_memory() -> int:
    """The most resident memory that this process had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    variant, name, batch, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    config = GPTConfig.from_name(name)
    step = make_step(variant, config)
    generator = torch.Generator().manual_seed(1)
    for _ in sys.stdin:
        tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=generator)
        start = time.perf_counter()
        loss = step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak_memory()}), flush=True)


if __name__ == "__main__":
    main()
