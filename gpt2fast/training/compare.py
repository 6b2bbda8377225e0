"""Training steps on the kernels against the same steps on plain PyTorch, timed side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2fast import backends
from gpt2fast.data import TokenDataset
from gpt2fast.data.batches import make_loader
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.trainer import autocast, make_optimizer

if TYPE_CHECKING:
    from gpt2fast.model import GPT

__all__ = ["Comparison", "compare_with_reference"]


@dataclass(frozen=True)
class Comparison:
    """Median speeds in tokens a second, and the median of the rounds' ratios."""

    backend: str
    tokens_per_second: float
    reference_tokens_per_second: float
    ratio: float
    rounds: int


def compare_with_reference(
    model: GPT, dataset: TokenDataset, config: TrainConfig, seconds: float = 12.0
) -> Comparison | None:
    """Time whole steps (forward, backward, AdamW) of copies of `model`, which stays as it is.

    A round is a step of each, in turn first and second, so that both meet the same state of the
    machine. Rounds go on for about `seconds`, at least 4 and at most 50; the first does not count.

    Returns None where the kernels in use are the reference itself.
    """
    device = next(model.parameters()).device
    automatic = None if config.backend == "auto" else config.backend
    with backends.use_backend(automatic):
        fast = backends.choose(next(model.parameters()))
    if fast == "reference":
        return None
    loader = make_loader(
        dataset,
        config.batch_size,
        config.block_size,
        seed=config.seed + 1,
        document_mask=config.document_mask,
    )

    def stepper(backend: str) -> Callable[[], float]:
        own = copy.deepcopy(model).train()
        optimizer = make_optimizer(own, config)

        def step() -> float:
            x, y, cu_seqlens = next(loader).to(device)
            began = time.perf_counter()
            with backends.use_backend(backend):
                with autocast(config, device):
                    _, loss = own(x, y, cu_seqlens=cu_seqlens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                float(loss.detach())  # waits for a GPU
            return time.perf_counter() - began

        return step

    steps = {"fast": stepper(fast), "reference": stepper("reference")}
    times: dict[str, list[float]] = {"fast": [], "reference": []}
    began = time.perf_counter()
    count = 0
    while count < 4 or (count < 50 and time.perf_counter() - began < seconds):
        order = list(steps) if count % 2 == 0 else list(reversed(steps))
        for name in order:
            times[name].append(steps[name]())
        count += 1
    kept = {name: values[1:] for name, values in times.items()}
    tokens = config.batch_size * config.block_size
    ratios = [r / f for f, r in zip(kept["fast"], kept["reference"], strict=True)]
    return Comparison(
        backend=fast,
        tokens_per_second=tokens / statistics.median(kept["fast"]),
        reference_tokens_per_second=tokens / statistics.median(kept["reference"]),
        ratio=statistics.median(ratios),
        rounds=count - 1,
    )
