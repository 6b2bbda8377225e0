"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import importlib
import json
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from gpt2fast.training.config import TrainConfig
from gpt2fast.training.distributed import ALONE, Ranks
from gpt2fast.training.runs import METRICS, TENSORBOARD, WANDB

if TYPE_CHECKING:
    from gpt2fast.model import GPT

__all__ = ["Metrics", "check_trackers", "mfu", "open_metrics", "peak_flops"]

#: Dense bfloat16 TFLOP/s with fp32 accumulation, by words of the GPU's name; the first that fits.
#: NVIDIA's data sheets: A100 (2021), H100 (2023), H200 (2024), B200 (2024), L4 and L40S (2023, half
#: the number with sparsity), A10 (2021), GeForce RTX 3090 (GA102 white paper), 4090 (Ada white paper).
PEAK_TFLOPS: Final = (
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def peak_flops(config: TrainConfig, device: torch.device, world_size: int = 1) -> float | None:
    """FLOP/s that the devices of all processes can do at most; None if unknown.

    For each `peak_tflops`, or by the GPU's name. The table is for bfloat16; float32 and CPUs need
    `peak_tflops`.
    """
    if config.peak_tflops is not None:
        return 1e12 * config.peak_tflops * world_size
    if device.type != "cuda" or config.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peak for words, peak in PEAK_TFLOPS if re.search(rf"\b{words}\b", name))
    peak = next(known, None)
    return None if peak is None else 1e12 * peak * world_size


def mfu(model: GPT, length: int, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilisation: tokens/s * `GPT.flops_per_token` / peak (Chowdhery et al. 2022).

    FLOPs are those that forward and backward need, whatever is computed again. `tokens_per_second`
    and `peak` are of the same devices.
    """
    return tokens_per_second * model.flops_per_token(length) / peak


def check_trackers(config: TrainConfig) -> None:
    """Raises RuntimeError if a package is missing that the configuration asks for."""
    wanted = (("tensorboard", config.tensorboard), ("wandb", config.wandb is not None))
    for package, is_wanted in wanted:
        if is_wanted:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise RuntimeError(
                    f'--{package} needs the package {package}: pip install "gpt2fast[tracking]"'
                ) from error


class Metrics:
    """No place for records: a context manager that drops them."""

    def write(self, record: dict[str, Any]) -> None:
        """A record: its step, and numbers and texts by name."""

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        """Close what is open."""


def open_metrics(run: Path, config: TrainConfig, step: int, ranks: Ranks = ALONE) -> Metrics:
    """Where the first process writes its records; the others' are dropped. See `_Written`."""
    return _Written(run, config, step) if ranks.first else Metrics()


class _Written(Metrics):
    """Open places for records.

    Args:
        run: the run's folder.
        config: its configuration.
        step: TensorBoard forgets what an interrupted session wrote after this step.
    """

    def __init__(self, run: Path, config: TrainConfig, step: int) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            board = importlib.import_module("torch.utils.tensorboard")
            self._board = board.SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1)
        if config.wandb is not None:
            folder = run / WANDB
            folder.mkdir(exist_ok=True)
            identity = folder / "id.txt"  # the same run after an interruption
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex[:16])
            self._wandb = importlib.import_module("wandb").init(
                project=config.wandb,
                name=run.name,
                dir=str(run),
                id=identity.read_text(),
                resume="allow",
                config=config.model_dump(),
            )
        # Line by line: what is in the file after a kill are whole lines, but for the last.
        self._file = open(run / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """A record: its step, and numbers by name; texts go to the file only."""
        self._file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if k != "step" and not isinstance(v, str)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
