"""The learning rate by step, and the early end of a run whose time is up.

The schedule is a function of the step alone, so that a run can be repeated and resumed bit for bit.
Time enters in one place: where the steps that fit into the time left are no more than a quarter of
those taken, and not all of them fit, a final decay begins that ends the run in time. It is decided
once, and recorded in the checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt2fast.training.config import TrainConfig

__all__ = ["FinalDecay", "cosine", "learning_rate", "plan_final_decay"]

#: The final decay takes this share of the steps before it: a fifth of the shortened run.
DECAY_SHARE = 0.25


@dataclass(frozen=True)
class FinalDecay:
    """The run ends `steps` after step `start`, with the learning rate falling from there."""

    start: int
    steps: int

    @property
    def end(self) -> int:
        """The step at which the run is over."""
        return self.start + self.steps


def cosine(step: int, lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """GPT-2's recipe (build-nanogpt): lr (step+1)/warmup, then half a cosine to min_lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (lr - min_lr)


def learning_rate(step: int, config: TrainConfig, final: FinalDecay | None = None) -> float:
    """The learning rate of the update after `step` updates; linear to min_lr in a final decay."""
    assert config.min_lr is not None
    assert config.warmup_steps is not None
    shape = (config.lr, config.min_lr, config.warmup_steps, config.max_steps)
    if final is None or step < final.start:
        return cosine(step, *shape)
    top = cosine(final.start, *shape)
    share = min(1.0, (step - final.start) / final.steps)
    return top + share * (min(config.min_lr, top) - top)


def plan_final_decay(
    step: int, max_steps: int, steps_per_second: float, seconds_left: float
) -> FinalDecay | None:
    """The final decay to begin now, or None while it is too early or everything fits."""
    fits = int(max(0.0, seconds_left) * steps_per_second)
    if step + fits >= max_steps or fits > DECAY_SHARE * step:
        return None
    return FinalDecay(step, max(1, fits))
