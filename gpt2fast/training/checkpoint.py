"""Checkpoints: everything a run needs to go on bit for bit, one folder for each saved step.

checkpoints/step_00001000/
    config.json, model.safetensors      the model, as Hugging Face's GPT2LMHeadModel opens it
    gpt2fast_tokenizer.json             what its tokens mean
    train_config.json                   the run's configuration
    training.safetensors                optimizer state and random generators of all processes
    optimizer/                          optimizer state, if `checkpoint` is "sharded": a file for
                                        each process that held a part of it
    training.json                       step, loader position, learning-rate groups
    checkpoint.json                     the list of files and their sizes

A checkpoint is written into a temporary folder, flushed to disk and renamed, so a folder that has
the name is whole, whatever ends the process. Nothing is pickled: loading runs no foreign code.
The weights are one file either way, so that sampling, evaluating and exporting are the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2fast.data.tokenizers import Gpt2Tokenizer, Tokenizer, tokenizer_from_json
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.distributed import ALONE, Ranks, gathered, parted_like
from gpt2fast.training.runs import CHECKPOINTS, CONFIG, newest_run

if TYPE_CHECKING:
    from gpt2fast.model import GPT

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "find_checkpoint",
    "find_model",
    "latest_checkpoint",
    "list_checkpoints",
    "load_tokenizer",
    "open_model",
    "save_checkpoint",
]

MANIFEST: Final = "checkpoint.json"
VERSION: Final = 2  # of what a resumed run reads; 1 had the generators of one process only
MODEL: Final = "model.safetensors"
TOKENIZER: Final = "gpt2fast_tokenizer.json"
TENSORS: Final = "training.safetensors"
PARTS: Final = "optimizer"
STATE: Final = "training.json"

_NAME: Final = re.compile(r"step_(\d{8,})")
_LEFTOVER: Final = re.compile(r"\.(?:writing|deleting)-step_\d{8,}")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another kind; the message says what is left.

    >>> from pathlib import Path
    >>> from gpt2fast.training import resume_run
    >>> Path("run").mkdir()
    >>> resume_run(Path("run"))
    Traceback (most recent call last):
    gpt2fast.training.checkpoint.CheckpointError: ...
    """


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; reading one that is damaged raises CheckpointError naming the file."""

    folder: Path

    @property
    def step(self) -> int:
        """The number of updates that its weights have had."""
        name = _NAME.fullmatch(self.folder.name)
        return int(name[1]) if name else int(self._json(MANIFEST)["step"])

    def check(self) -> None:
        """Raises CheckpointError unless every file is there with the size it was written with."""
        manifest = self._json(MANIFEST)
        try:
            sizes = {str(name): int(size) for name, size in manifest["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.folder / MANIFEST}: no list of files") from error
        for name, size in sizes.items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: the file is missing")
            if (found := path.stat().st_size) != size:
                raise CheckpointError(f"{path}: {found} bytes, {size} were written")

    def config(self) -> TrainConfig:
        """The configuration of the run that wrote it."""
        try:
            return TrainConfig.load(self.folder / CONFIG)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {error}") from error

    def model(self, dropout: float = 0.0) -> GPT:
        """The model, in evaluation mode."""
        from gpt2fast.model import GPT

        try:
            return GPT.from_pretrained(self.folder, dropout=dropout)
        except (ValueError, OSError) as error:
            raise CheckpointError(str(error)) from error

    def restore(self, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Load optimizer and random generators; returns the trainer's own state.

        A process that the run did not have gets random generators of its own.
        """
        if (version := self._json(MANIFEST).get("version")) != VERSION:
            raise CheckpointError(
                f"{self.folder}: another gpt2fast wrote it, whose checkpoints have version {version} "
                f"and not {VERSION}: it cannot be resumed. --init-from starts from its weights"
            )
        state = self._json(STATE)
        path = self.folder / TENSORS
        try:
            tensors = load_file(path)
            if (parts := self.folder / PARTS).is_dir():
                path = parts
                tensors |= ranks.read_parts(parts, partial(_room, optimizer))
            _restore_optimizer(optimizer, state["optimizer"], tensors)
            trainer = dict(state["trainer"])
            if ranks.rank < len(state["random"]):
                _restore_generators(state["random"][ranks.rank], tensors, ranks.rank)
            else:
                ranks.seed(self.config().seed, trainer["step"])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: not this run's state: {error!r}") from error
        return trainer

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: an object is wanted, got {type(value).__name__}")
        return value


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    config: TrainConfig,
    trainer: Mapping[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
) -> Checkpoint:
    """Write `folder`/step_<step> and delete all but the `keep` newest whole checkpoints.

    Older ones go only when the new one is on disk. Of many processes all are to call it, and the
    first one writes: the same files whatever their number, and whether the model is in parts. Only
    a sharded checkpoint has a file of each.

    Raises:
        OSError: it could not be written (a full disk is named so); what was there before is whole.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f".writing-{target.name}"
    whole = ranks.whole(model)
    sharded = config.checkpoint == "sharded"
    groups, tensors = _optimizer_state(optimizer, ranks, whole=not sharded)
    generators = ranks.collect(_generators_state())

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()

    def write() -> Checkpoint:
        assert whole is not None  # on the first process
        described: list[Any] = []
        states: dict[str, Tensor] = {}
        for rank, (python, own) in enumerate(generators):
            described.append(python)
            states |= {f"random.{rank}.{name}": tensor for name, tensor in own.items()}
        whole.save_pretrained(temporary)
        _write_json(temporary / TOKENIZER, tokenizer.to_json())
        config.save(temporary / CONFIG)
        save_file(states if sharded else {**tensors, **states}, temporary / TENSORS)
        state = {"trainer": dict(trainer), "optimizer": groups, "random": described}
        _write_json(temporary / STATE, state)
        _publish(temporary, target, step)
        return Checkpoint(target)

    try:
        ranks.on_first(begin)
        if sharded and tensors:
            ranks.write_parts(temporary / PARTS, tensors)
        written = ranks.on_first(write)
    except BaseException as error:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _explained(error, target) from error
        raise
    if ranks.first:
        _delete_old(folder, step, keep)
    return written


def _publish(temporary: Path, target: Path, step: int) -> None:
    """Lists the files, sees them on disk and gives the folder its name."""
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "format": "gpt2fast-checkpoint",
        "version": VERSION,
        "step": step,
        "files": {path.relative_to(temporary).as_posix(): path.stat().st_size for path in paths},
    }
    _write_json(temporary / MANIFEST, manifest)
    for path in temporary.rglob("*"):
        _flush(path)
    _flush(temporary)
    if target.exists():  # a damaged one, or of a step that is being repeated
        os.rename(target, target.with_name(f".deleting-{target.name}"))
    os.rename(temporary, target)
    _flush(target.parent)


def _delete_old(folder: Path, step: int, keep: int) -> None:
    """All whole checkpoints up to `step` but the `keep` newest, and what kills left."""
    whole = [found for found in list_checkpoints(folder) if found.step <= step]
    for old in whole[:-keep]:
        with contextlib.suppress(OSError):
            os.rename(old.folder, folder / f".deleting-{old.folder.name}")
    _remove_leftovers(folder)


def list_checkpoints(folder: Path, damaged: list[str] | None = None) -> list[Checkpoint]:
    """The whole checkpoints in `folder`, oldest first; what is wrong with others in `damaged`."""
    found = []
    for path in sorted(folder.glob("step_*")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            Checkpoint(path).check()
        except CheckpointError as error:
            if damaged is not None:
                damaged.append(str(error))
        else:
            found.append(Checkpoint(path))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(run: Path, damaged: list[str] | None = None) -> Checkpoint:
    """The newest whole checkpoint of a run; those passed over are named in `damaged`.

    Raises:
        CheckpointError: there is none.
    """
    passed: list[str] = []
    found = list_checkpoints(run / CHECKPOINTS, passed)
    if damaged is not None:
        damaged += passed
    if not found:
        why = f"the damaged ones: {'; '.join(passed)}" if passed else "none was written yet"
        raise CheckpointError(f"{run}: no whole checkpoint: {why}")
    return found[-1]


def find_checkpoint(path: Path, damaged: list[str] | None = None) -> Checkpoint:
    """The checkpoint that `path` is, or the newest whole one of the run that `path` is.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: neither, or damaged; then it says which other checkpoint is whole.
    """
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path))
    named, has = _NAME.fullmatch(path.name), {entry.name for entry in path.iterdir()}
    if not named and MANIFEST not in has:
        if not has & {CHECKPOINTS, CONFIG}:
            raise CheckpointError(f"{path}: neither a run nor a checkpoint")
        return latest_checkpoint(path, damaged)
    checkpoint = Checkpoint(path)
    try:
        checkpoint.check()
    except CheckpointError as error:
        others = list_checkpoints(path.parent) if named else []
        advice = f". Whole is {others[-1].folder}" if others else ""
        raise CheckpointError(f"{error}{advice}") from error
    return checkpoint


def find_model(path: Path | None, damaged: list[str] | None = None) -> Path:
    """A folder to load a model from: a run's newest checkpoint, a checkpoint, any GPT-2 folder.

    None stands for the newest run in runs/.
    """
    path = newest_run() if path is None else path
    plain = path.is_dir() and (path / MODEL).exists() and not (path / MANIFEST).exists()
    return (
        path if plain and not _NAME.fullmatch(path.name) else find_checkpoint(path, damaged).folder
    )


def open_model(
    name: str | Path | None, damaged: list[str] | None = None, *, dropout: float = 0.0
) -> tuple[GPT, Path]:
    """A model in evaluation mode, and the folder or file that it is from.

    Args:
        name: what `find_model` takes, an llm.c file, or a name that `GPT.from_pretrained` fetches.
        damaged: gets what is wrong with checkpoints that were passed over.
        dropout: the model's in training.

    Raises:
        OSError, ValueError, RuntimeError: there is no such model, or it is damaged.
    """
    from gpt2fast import huggingface
    from gpt2fast.model import GPT

    path = None if name is None else Path(name)
    if name is not None and huggingface.hub_name(name):
        path = huggingface.locate(name)
    elif path is None or not path.is_file():
        path = find_model(path, damaged)
    return GPT.from_pretrained(path, dropout=dropout), path


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint; GPT-2's for a foreign folder with GPT-2's vocabulary.

    Raises:
        CheckpointError: the description is damaged, or missing where it cannot be guessed.
        ValueError: the tokenizer has another vocabulary than the model.
    """
    path = folder / TOKENIZER
    if not path.exists():
        if vocab_size == Gpt2Tokenizer.vocab_size:
            return Gpt2Tokenizer()
        raise CheckpointError(f"{path} is missing, and vocab_size={vocab_size} is not GPT-2's")
    try:
        tokenizer = tokenizer_from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{folder}: the model has vocab_size={vocab_size}, its tokenizer "
            f"{tokenizer.name} {tokenizer.vocab_size}"
        )
    return tokenizer


def _optimizer_state(
    optimizer: torch.optim.Optimizer, ranks: Ranks, whole: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state_dict as JSON values and, apart, its tensors.

    These are gathered on the first process, or where not `whole` left in parts on each.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"optimizer.{index}.{name}"
            if isinstance(value, Tensor) and not whole:
                tensors[key] = value.detach()
            elif isinstance(value, Tensor):
                full = gathered(value.detach())
                if not ranks.first:
                    continue
                # Cloned only where it is a view, which safetensors refuses.
                tensor = full.cpu().contiguous()
                own = tensor.untyped_storage().nbytes() == tensor.nbytes
                tensors[key] = tensor if own else tensor.clone()
            else:
                scalars.setdefault(str(index), {})[name] = value
    return {"groups": state["param_groups"], "scalars": scalars}, tensors


def _room(
    optimizer: torch.optim.Optimizer, key: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """For the state `key` of a checkpoint: as its parameter is parted, if it has its shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameter = parameters[int(key.split(".")[1])]
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, described: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    here = optimizer.state_dict()["param_groups"]
    groups = described["groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in here]:
        raise ValueError("the optimizer has other parameter groups")
    for group, own in zip(groups, here, strict=True):
        for name, value in group.items():  # JSON has no tuples
            if isinstance(own.get(name), tuple):
                group[name] = tuple(value)
    state: dict[int, dict[str, Any]] = {}
    for index, entries in described["scalars"].items():
        state.setdefault(int(index), {}).update(entries)
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameters[index].shape:
                raise ValueError(
                    f"optimizer state {name} of parameter {index} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(parameters[index].shape)}"
                )
            if isinstance(value, Tensor):
                entries[name] = parted_like(value, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _generators_state() -> tuple[list[Any], dict[str, Tensor]]:
    """Python's and PyTorch's global random generators of this process."""
    version, words, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return [version, list(words), gauss], tensors


def _restore_generators(python: list[Any], tensors: Mapping[str, Tensor], rank: int) -> None:
    version, words, gauss = python
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(tensors[f"random.{rank}.torch"])
    if torch.cuda.is_available() and (state := tensors.get(f"random.{rank}.cuda")) is not None:
        torch.cuda.set_rng_state(state)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """The contents of a file, or the names in a folder, are on disk after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of a process that was killed; only ours, by name."""
    for path in _leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob(".*-step_*") if _LEFTOVER.fullmatch(path.name))


def _explained(error: OSError | SafetensorError, target: Path) -> OSError:
    """An OSError that names the checkpoint; safetensors reports a full disk in words only."""
    number = error.errno if isinstance(error, OSError) else errno.EIO
    told = re.search(r"os error (\d+)", str(error))
    if told and not isinstance(error, OSError):
        number = int(told[1])
    if number in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    kept = [found.folder.name for found in list_checkpoints(target.parent)]
    left = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
    return OSError(number, f"the checkpoint was not written: {reason}; {left}", str(target))
