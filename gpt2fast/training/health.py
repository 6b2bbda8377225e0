"""Steps that are not sound: numbers that are not finite, and spikes; what to do about them.

A spike is a loss or a norm of the gradient that lies more than `threshold` standard deviations above
the mean of the last `window` steps (the rule of llm.c's outlier detector). Nothing is a spike before
the window is full. Spikes enter the window, too: what was unusual becomes usual if it stays.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, Literal

from gpt2fast.training.config import TrainConfig

__all__ = ["Health", "Verdict"]

#: After so many skipped steps in a row the run is over: no batch is sound any more.
PATIENCE: Final = 50


@dataclass(frozen=True)
class Verdict:
    """What to do about a step, and why; the reason is empty for a sound one."""

    action: Literal["go", "warn", "skip", "stop"] = "go"
    reason: str = ""


class Health:
    """Judges steps by the policies of a configuration. The same numbers give the same verdicts."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._seen: dict[str, deque[float]] = {
            name: deque(maxlen=config.spike_window) for name in ("loss", "gradient norm")
        }
        self._skipped = 0  # in a row

    def judge(self, loss: float, norm: float) -> Verdict:
        """The verdict on a step before its update, by its loss and its gradient's norm."""
        verdict = self._judge({"loss": loss, "gradient norm": norm})
        self._skipped = self._skipped + 1 if verdict.action == "skip" else 0
        if self._skipped > PATIENCE:
            return Verdict("stop", f"{verdict.reason}; {PATIENCE} steps before it were skipped")
        return verdict

    def _judge(self, values: dict[str, float]) -> Verdict:
        for name, value in values.items():
            if not math.isfinite(value):
                return Verdict(self.config.on_nonfinite, f"the {name} is {value}")
        spikes = [told for name, value in values.items() if (told := self._spike(name, value))]
        for name, value in values.items():
            self._seen[name].append(value)
        return Verdict(self.config.on_spike, "; ".join(spikes)) if spikes else Verdict()

    def _spike(self, name: str, value: float) -> str:
        seen = self._seen[name]
        if len(seen) < self.config.spike_window:
            return ""
        mean = statistics.fmean(seen)
        deviation = statistics.pstdev(seen, mean)
        if value - mean <= self.config.spike_threshold * deviation:
            return ""
        z = (value - mean) / deviation if deviation else math.inf
        return (
            f"the {name} {value:.4g} is {z:.1f} standard deviations above the mean {mean:.4g} of "
            f"{len(seen)} steps"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON values."""
        return {"skipped": self._skipped, **{name: list(v) for name, v in self._seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._skipped = int(state.get("skipped", 0))
        for name, seen in self._seen.items():
            seen.clear()
            seen.extend(state.get(name, []))
