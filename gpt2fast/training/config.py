"""The configuration of a training run: one flat, validated model.

Every field has one name everywhere: in the TOML or JSON file, as a flag (``batch_size`` is
``--batch-size``), in ``train_config.json`` beside the checkpoints, and in error messages.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gpt2fast.recipes import find_recipe

__all__ = ["DEMONSTRATION", "RESUMABLE", "TrainConfig", "load_config", "read_settings"]

#: What `gpt2fast train` does without data of its own: a run that fits three minutes on two cores.
DEMONSTRATION: Final[Mapping[str, Any]] = {
    "model": "nano",
    "block_size": 128,
    "batch_size": 8,
    "max_steps": 1100,
    "max_minutes": 2.0,
    "lr": 3e-3,
    "warmup_steps": 50,
    "eval_interval": 150,
    "eval_batches": 64,
    "save_interval": 300,
    "compare_reference": True,
}

#: Fields that a resumed run may set anew: they do not change what a step computes.
RESUMABLE: Final = frozenset(
    {
        "max_steps",
        "max_minutes",
        "eval_interval",
        "eval_batches",
        "save_interval",
        "keep_checkpoints",
        "checkpoint",
        "sample_tokens",
        "compare_reference",
        "gradient_checkpointing",
        "parallel",
        "hellaswag",
        "hellaswag_interval",
        "hellaswag_examples",
        "tensorboard",
        "wandb",
        "peak_tflops",
    }
)


def _field(default: Any, group: str, about: str, **limits: Any) -> Any:
    return Field(default, description=about, json_schema_extra={"group": group}, **limits)


class TrainConfig(BaseModel):
    """Everything that decides what a run computes, and how it reports.

    The defaults are build-nanogpt's recipe for GPT-2 124M at a batch that fits a small machine.

    Raises:
        pydantic.ValidationError: an unknown field, or a value out of range, named.

    >>> TrainConfig(model="gpt2", lr=3e-4).batch_size
    4
    >>> TrainConfig(batch_size=0)
    Traceback (most recent call last):
    pydantic_core._pydantic_core.ValidationError: ...
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = _field(
        None,
        "model",
        "size: gpt2, gpt2-medium, gpt2-large, gpt2-xl, nano, micro, mini; or a baseline: "
        "bigram-onehot, bigram-embedding [gpt2]",
    )
    n_layer: int | None = _field(None, "model", "blocks (default: the model's)", ge=1)
    n_head: int | None = _field(None, "model", "attention heads (default: the model's)", ge=1)
    n_embd: int | None = _field(None, "model", "width (default: the model's)", ge=1)
    init_from: str | None = _field(
        None,
        "model",
        "start from weights: gpt2 to gpt2-xl, owner/name on the Hugging Face Hub, or a run, "
        "checkpoint, Hugging Face GPT-2 folder or llm.c .bin file",
    )
    dropout: float = _field(0.0, "model", "dropout probability", ge=0, lt=1)

    data: str | None = _field(
        None, "data", "folder that `gpt2fast prepare` made (default: Python's own source text)"
    )
    batch_size: int = _field(
        4, "data", "rows a micro-batch, at most; each of many processes holds so many", ge=1
    )
    block_size: int = _field(1024, "data", "tokens a row: the context length", ge=1)
    grad_accum: int = _field(
        1,
        "data",
        "micro-batches a step, of all processes together: a step is batch_size x grad_accum rows "
        "on any number of them",
        ge=1,
    )

    document_mask: bool = _field(
        False, "data", "attention does not cross end-of-text; positions count from each document"
    )

    max_steps: int = _field(1000, "schedule", "optimizer steps", ge=1)
    max_minutes: float | None = _field(
        None, "schedule", "time limit: the schedule is cut short to end within it", gt=0
    )
    lr: float = _field(6e-4, "schedule", "peak learning rate", gt=0)
    min_lr: float | None = _field(None, "schedule", "final learning rate (default: lr/10)", ge=0)
    warmup_steps: int | None = _field(
        None, "schedule", "steps of warm-up (default: 715, or a tenth of max_steps)", ge=0
    )

    weight_decay: float = _field(0.1, "optimizer", "decay of matrices and embeddings", ge=0)
    beta1: float = _field(0.9, "optimizer", "AdamW's beta 1", ge=0, lt=1)
    beta2: float = _field(0.95, "optimizer", "AdamW's beta 2", ge=0, lt=1)
    clip: float = _field(1.0, "optimizer", "largest global gradient norm; 0: no clipping", ge=0)

    on_nonfinite: Literal["stop", "skip"] = _field(
        "stop", "optimizer", "a loss or gradient that is not finite: stop, or skip the update"
    )
    on_spike: Literal["warn", "skip", "stop"] = _field(
        "warn", "optimizer", "a spike of loss or gradient norm: warn, skip the update, or stop"
    )
    spike_threshold: float = _field(
        6.0, "optimizer", "a spike is so many standard deviations above the mean", gt=0
    )
    spike_window: int = _field(128, "optimizer", "of so many steps before it", ge=2)

    eval_interval: int = _field(250, "reporting", "steps between validations; 0: at the end", ge=0)
    eval_batches: int = _field(20, "reporting", "batches of batch_size rows a validation", ge=1)
    sample_tokens: int = _field(300, "reporting", "tokens of the sample at the end; 0: none", ge=0)
    compare_reference: bool = _field(
        False, "reporting", "at the end, time steps on the kernels against plain PyTorch"
    )

    hellaswag: str | None = _field(
        None, "reporting", "score HellaSwag, too: a .jsonl file, or download"
    )
    hellaswag_interval: int = _field(
        250, "reporting", "steps between HellaSwag scores; 0: at the end", ge=0
    )
    hellaswag_examples: int = _field(1000, "reporting", "the first so many examples", ge=1)
    tensorboard: bool = _field(False, "reporting", "write TensorBoard files into the run, too")
    wandb: str | None = _field(None, "reporting", "project of Weights & Biases to log to, too")
    peak_tflops: float | None = _field(
        None, "reporting", "TFLOP/s that MFU is measured by (default: by the GPU's name)", gt=0
    )

    save_interval: int = _field(
        250, "checkpoints", "steps between checkpoints; 0: at the end", ge=0
    )
    keep_checkpoints: int = _field(2, "checkpoints", "checkpoints to keep", ge=1)
    checkpoint: Literal["whole", "sharded"] = _field(
        "whole",
        "checkpoints",
        "optimizer state: whole (gathered and written by the first process) or sharded (each "
        "process writes its part). The weights are whole either way",
    )

    seed: int = _field(1337, "machine", "seed of weights, data order and dropout", ge=0)
    deterministic: bool = _field(
        False, "machine", "seed everything and refuse operations that do not repeat to the bit"
    )
    dtype: Literal["float32", "bfloat16"] = _field(
        "float32", "machine", "float32, or bfloat16 by autocast (weights stay float32)"
    )
    device: str = _field("auto", "machine", "auto (a GPU where there is one), cpu or cuda")
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = _field(
        "auto", "machine", "kernels: auto, reference (plain PyTorch), cpu, triton or cuda"
    )
    parallel: Literal["ddp", "fsdp"] = _field(
        "ddp",
        "machine",
        "under torchrun: ddp (each process holds the model) or fsdp (each a part of it: FSDP2)",
    )
    gradient_checkpointing: bool = _field(
        False, "machine", "compute activations again in backward: less memory, a third more work"
    )
    compile: bool = _field(False, "machine", "compile the model with torch.compile")
    threads: int | None = _field(None, "machine", "CPU threads (default: PyTorch's)", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_derived(cls, values: Any) -> Any:
        """min_lr follows lr and warmup_steps max_steps: both are saved as numbers."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("model") is None and values.get("init_from") is None:
            values["model"] = "gpt2"
        try:
            if values.get("min_lr") is None:
                values["min_lr"] = max(0.0, float(values.get("lr", 6e-4)) / 10)
            if values.get("warmup_steps") is None:
                values["warmup_steps"] = min(715, int(values.get("max_steps", 1000)) // 10)
        except (TypeError, ValueError):
            values.pop("min_lr", None)  # lr or max_steps is no number: its own check says so
            values.pop("warmup_steps", None)
        return values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is above max_steps={self.max_steps}"
            )
        if self.deterministic and self.max_minutes is not None:
            raise ValueError("deterministic and max_minutes: a time limit does not repeat")
        return self

    def save(self, path: Path) -> None:
        """Write every field, the derived ones included, as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read what `save` wrote. Raises FileNotFoundError, ValueError naming the file."""
        return _validated(read_settings(path), str(path))

    def resumed_with(self, changes: Mapping[str, Any]) -> TrainConfig:
        """This configuration with `changes`, as far as a resumed run may change it.

        Raises:
            ValueError: a field that decides what a step computes would change; all are named.
        """
        after = _validated({**self.model_dump(), **changes}, "--resume")
        refused = [
            f"{name} is {getattr(self, name)!r} in the run and {getattr(after, name)!r} now"
            for name in changes
            if name not in RESUMABLE and getattr(self, name) != getattr(after, name)
        ]
        if refused:
            raise ValueError(
                f"a resumed run keeps its settings: {'; '.join(refused)}. "
                "Leave them out, or start a new run with --init-from"
            )
        return after


def read_settings(path: Path) -> dict[str, Any]:
    """The fields in a TOML or JSON file, not yet validated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, or not TOML or JSON of one table.
    """
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"{path}: a configuration is a .toml or .json file")
    text = path.read_text(encoding="utf-8")
    try:
        settings = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:  # TOMLDecodeError and JSONDecodeError
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: one table of fields is wanted, got {type(settings).__name__}")
    return settings


def load_config(file: str | Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """The configuration from a file or recipe and, above it, single settings such as flags.

    Where neither names `data`, the settings of `DEMONSTRATION` take the place of the defaults.

    Raises:
        FileNotFoundError, ValueError: see `read_settings`; an unknown or wrong field, named.

    >>> load_config("gpt2-124m-fineweb-edu", {"data": "data/edu", "lr": 3e-4}).lr
    0.0003
    """
    settings = {**(read_settings(find_recipe(file)) if file else {}), **overrides}
    _validated(settings, str(file) if file else "")
    if settings.get("data") is None:
        base = dict(DEMONSTRATION)
        if int(settings.get("max_steps", base["max_steps"])) < base["warmup_steps"]:
            del base["warmup_steps"]
        if settings.get("init_from") is not None:
            del base["model"]
        if settings.get("deterministic"):
            del base["max_minutes"]
        settings = {**base, **settings}
    return _validated(settings, str(file) if file else "")


def _validated(settings: Mapping[str, Any], source: str) -> TrainConfig:
    try:
        return TrainConfig.model_validate(dict(settings))
    except ValidationError as error:
        problems = [_problem(dict(e)) for e in error.errors()]
        raise ValueError((f"{source}: " if source else "") + "; ".join(problems)) from error


def _problem(error: dict[str, Any]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, TrainConfig.model_fields, n=1)
        return f"unknown field {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message}" if name else message
