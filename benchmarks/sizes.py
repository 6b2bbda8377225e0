"""Every op from 1 row to 64K rows against torch eager, on one thread and on two: fp32 on a CPU.

    chrt -f 50 python -m benchmarks.sizes --ops layer_norm gelu --write sizes.md

A cell is torch eager's time over ours, medians of interleaved calls in one process: below 1 ours is
slower. "forward" is with gradients wanted, "both" adds backward. The last columns are our own times,
and the time on one thread over that on two. Ops whose tensors outgrow this machine's memory, or whose
matrix products take minutes, stop before 64K rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import (
    test_attention,
    test_block,
    test_cross_entropy,
    test_embedding,
    test_gelu,
    test_layer_norm,
    test_linear,
)
from benchmarks.harness import OURS, Case, once
from benchmarks.plain_gpt import PlainGPT
from benchmarks.report import table
from gpt2fast import GPT, GPTConfig

EAGER, OURS_NAME = "torch eager", OURS[0]
SECONDS, ROUNDS = 0.4, range(3, 400)  # of one case
SIZES = [4**i for i in range(9)]


def attention(rows: int) -> Case:
    """Sequences of at most 1024; torch chooses its kernel itself."""
    length = min(rows, 1024)
    case = test_attention.case(rows // length, length)
    return dataclasses.replace(case, variants={**case.variants, EAGER: test_attention.sdpa_plain})


def block(width: int, rows: int) -> Case:
    length = min(rows, 1024)
    return test_block.case(rows // length, length, width)


def embedding(rows: int) -> Case:
    length = min(rows, 1024)
    return test_embedding.case(rows // length, length)


#: What makes a case of so many rows, and the most rows.
OPS: dict[str, tuple[Callable[[int], Case], int]] = {
    "layer_norm": (partial(test_layer_norm.case, False), 65536),
    "add_layer_norm": (partial(test_layer_norm.case, True), 65536),
    "gelu": (test_gelu.gelu_case, 65536),
    "gelu_mlp": (test_gelu.mlp_case, 4096),
    "linear": (test_linear.case, 4096),
    "attention": (attention, 16384),
    "block, width 128": (partial(block, 128), 16384),
    "block, width 768": (partial(block, 768), 4096),
    "embedding": (embedding, 65536),
    "cross_entropy": (test_cross_entropy.loss_case, 4096),
    "linear_cross_entropy": (test_cross_entropy.head_case, 1024),
}
#: Ops whose forward computes the gradients, too.
ONLY_BOTH = ("linear_cross_entropy",)
#: Whole models, forward and backward with the loss, and the most tokens.
MODELS = {"nano": 16384, "mini": 4096, "gpt2": 1024}


def measure(case: Case) -> dict[str, tuple[float, float]]:
    """Seconds (forward, both) of torch and of ours."""
    probe = case.variants[EAGER](**case.inputs)
    upstream = [
        torch.randn_like(t) for t in ([probe] if isinstance(probe, torch.Tensor) else probe)
    ]
    del probe
    times: dict[str, list[tuple[float, float]]] = {EAGER: [], OURS_NAME: []}
    began = time.perf_counter()
    for done in range(ROUNDS.stop):
        if done >= ROUNDS.start and time.perf_counter() - began > SECONDS:
            break
        for name, found in times.items():
            forward, backward = once(case, name, upstream)
            found.append((forward, forward + backward))
    return medians(times)


def measure_model(name: str, tokens: int) -> dict[str, tuple[float, float]]:
    """Seconds (forward, both) of PlainGPT and of our GPT with the loss, sequences of at most 1024."""
    length = min(tokens, 1024)
    overrides = {} if name == "gpt2" else {"vocab_size": 257}  # a head's width for bytes
    config = GPTConfig.from_name(name, **overrides)
    sizes = (config.n_layer, config.n_head, config.n_embd)
    plain = PlainGPT(*sizes, config.padded_vocab_size, config.block_size)
    ours = GPT(config)
    idx = torch.randint(config.vocab_size, (tokens // length, length))
    times: dict[str, list[tuple[float, float]]] = {EAGER: [], OURS_NAME: []}
    began = time.perf_counter()
    for done in range(ROUNDS.stop):
        if done >= ROUNDS.start and time.perf_counter() - began > 4 * SECONDS:
            break
        for run, model in ((EAGER, plain), (OURS_NAME, ours)):
            start = time.perf_counter()
            loss = model(idx, idx)
            loss = loss if isinstance(loss, torch.Tensor) else loss[1]
            forward = time.perf_counter()
            loss.backward()
            times[run].append((forward - start, time.perf_counter() - start))
            for parameter in model.parameters():
                parameter.grad = None
    return medians(times)


def medians(times: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Of (forward, both), the first round left out."""
    return {
        name: (
            statistics.median(forward for forward, _ in found[1:]),
            statistics.median(both for _, both in found[1:]),
        )
        for name, found in times.items()
    }


def lines(op: str, threads: tuple[int, ...] = (1, 2)) -> list[list[str]]:
    """The rows of the table of an op, or a model."""
    most = MODELS[op] if op in MODELS else OPS[op][1]
    found = []
    for rows in SIZES:
        if rows > most:
            break
        torch.manual_seed(0)
        run = (
            partial(measure_model, op, rows) if op in MODELS else partial(measure, OPS[op][0](rows))
        )
        results = []
        for count in threads:
            torch.set_num_threads(count)
            results.append(run())
        cells = [str(rows)]
        for result in results:
            ratios = [a / b for a, b in zip(result[EAGER], result[OURS_NAME], strict=True)]
            cells += ["" if op in ONLY_BOTH else f"{ratios[0]:.2f}", f"{ratios[1]:.2f}"]
        own = [result[OURS_NAME][1] for result in results]
        cells += [f"{seconds * 1e3:.3g} ms" for seconds in own] + [f"{own[0] / own[-1]:.2f}"]
        found.append(cells)
        print(op, *cells, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*OPS, *MODELS]
    parser.add_argument("--ops", nargs="+", choices=names, default=names, metavar="OP")
    parser.add_argument("--write", type=Path, metavar="MD", help="append the tables to a file")
    arguments = parser.parse_args()
    head = ["rows", "forward, 1 thread", "both, 1", "forward, 2 threads", "both, 2"]
    head += ["ours, both, 1", "ours, both, 2", "1 over 2"]
    for op in arguments.ops:
        text = f"### {op}\n\n{table(head, lines(op))}\n"
        if arguments.write:
            with arguments.write.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
