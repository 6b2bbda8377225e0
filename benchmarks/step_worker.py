"""One variant of the training step in a process of its own: `python -m benchmarks.step_worker ...`.

Reads lines from standard input; for each it runs one step and answers with a JSON line: seconds,
loss, peak resident memory in bytes. A process of its own, since allocator settings and peak memory
belong to a process.
"""

import importlib.util
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpt2fast
from benchmarks.harness import DEVICE, GPU, REHEARSAL
from benchmarks.plain_gpt import PlainGPT
from gpt2fast import GPT, GPTConfig

#: On a GPU all in bf16 autocast with fp32 weights; on a CPU in fp32.
VARIANTS = (
    ("torch eager", "torch.compile", "gpt2fast", "gpt2fast, CUDA graph", "gpt2fast, torch.compile")
    if GPU
    else (
        "torch eager",
        "torch eager, malloc tuned",
        "torch.compile, malloc tuned",
        *(["Hugging Face, malloc tuned"] if importlib.util.find_spec("transformers") else []),
        "gpt2fast cpu",
    )
)
#: Hugging Face's GPT-2 as it is and after `apply_gpt2fast_to_gpt2`, see test_swap.py.
SWAP_VARIANTS = (
    "Hugging Face",
    "Hugging Face, malloc tuned",
    "gpt2fast in one line",
)
CLIP = 1.0
OPTIONS: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95)}

Step = Callable[[Tensor, Tensor], Tensor]


def config_of(name: str) -> GPTConfig:
    """The named model; in a rehearsal with few tokens."""
    return GPTConfig.from_name(name, **({"vocab_size": 300} if REHEARSAL else {}))


def precision() -> AbstractContextManager[Any]:
    """The context of a forward pass."""
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16) if GPU else nullcontext()


def make_step(variant: str, config: GPTConfig) -> Step:
    """step(idx, targets) -> loss: forward, backward, clipping at 1.0, AdamW, gradients dropped."""
    torch.manual_seed(0)
    if variant in SWAP_VARIANTS:
        return _hugging_face_step(config, variant)
    if not GPU and variant != "torch eager":
        gpt2fast.keep_freed_memory()
    ours = variant.startswith("gpt2fast")
    compiled = "torch.compile" in variant and not REHEARSAL
    return (_our_step if ours else _plain_step)(config, compiled, "graph" in variant)


def _our_step(config: GPTConfig, compiled: bool, graph: bool) -> Step:
    model = GPT(config).to(DEVICE)
    graph = graph and DEVICE.type == "cuda"
    optimizer = model.configure_optimizer(max_norm=CLIP, capturable=graph, **OPTIONS)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step(idx: Tensor, targets: Tensor) -> Tensor:
        with precision():
            _, loss = forward(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return _captured(step) if graph else step


def _captured(step: Step) -> Step:
    """`step` as a CUDA graph, which replays on inputs copied into place."""
    state: dict[str, Any] = {}

    def replay(idx: Tensor, targets: Tensor) -> Tensor:
        if not state:
            state["idx"], state["targets"] = idx.clone(), targets.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels and allocates the optimizer's state
                for _ in range(3):
                    step(state["idx"], state["targets"])
            torch.cuda.current_stream().wait_stream(side)
            state["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):
                state["loss"] = step(state["idx"], state["targets"])
        state["idx"].copy_(idx)
        state["targets"].copy_(targets)
        state["graph"].replay()
        return state["loss"]

    return replay


def _plain_step(config: GPTConfig, compiled: bool, graph: bool) -> Step:
    plain = PlainGPT(
        config.n_layer, config.n_head, config.n_embd, config.padded_vocab_size, config.block_size
    ).to(DEVICE)
    parameters = list(plain.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = torch.optim.AdamW(groups, fused=True, **OPTIONS)
    forward = torch.compile(plain, dynamic=False) if compiled else plain

    def step(idx: Tensor, targets: Tensor) -> Tensor:
        with precision():
            loss = forward(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        fused.step()
        fused.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _hugging_face_step(config: GPTConfig, variant: str) -> Step:
    """transformers' GPT-2 with sdpa and fused AdamW, the loss from labels, as a script of a user."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if "malloc tuned" in variant:
        gpt2fast.keep_freed_memory()
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=config.vocab_size, attn_implementation="sdpa", **shape, **dropout)
    )
    model = model.to(DEVICE).train()
    if variant.startswith("gpt2fast"):
        gpt2fast.apply_gpt2fast_to_gpt2(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True, **OPTIONS)

    def step(idx: Tensor, targets: Tensor) -> Tensor:
        with precision():
            loss = model(idx, labels=idx, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peak_memory() -> int:
    """The most GPU memory that torch used, or resident memory that this process had, in bytes."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    variant, name, batch, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    config = config_of(name)
    backend = "triton" if REHEARSAL and variant.startswith("gpt2fast") else None
    with gpt2fast.use_backend(backend):
        step = make_step(variant, config)
        generator = torch.Generator().manual_seed(1)
        for _ in sys.stdin:
            tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=generator)
            tokens = tokens.to(DEVICE)
            clock = time.perf_counter()
            loss = step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item()
            seconds = time.perf_counter() - clock
            answer = {"seconds": seconds, "loss": loss, "peak": peak_memory()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
