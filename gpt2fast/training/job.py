"""A training run from its configuration to its report; `gpt2fast train` is a thin layer on this."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from gpt2fast import backends
from gpt2fast.bigram import BIGRAMS
from gpt2fast.data import TokenDataset, prepare, sequential_batches
from gpt2fast.data.batches import make_loader
from gpt2fast.data.tokenizers import ByteTokenizer, Tokenizer
from gpt2fast.generation import generate, prompt_tokens
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.training.baseline import Bigram
from gpt2fast.training.checkpoint import (
    TOKENIZER,
    find_checkpoint,
    load_tokenizer,
    open_model,
)
from gpt2fast.training.compare import Comparison, compare_with_reference
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.determinism import Deterministic
from gpt2fast.training.distributed import Ranks, join, share_rows
from gpt2fast.training.metrics import check_trackers, open_metrics
from gpt2fast.training.progress import Progress, duration
from gpt2fast.training.report import plot_losses, summary, write_report
from gpt2fast.training.runs import CHECKPOINTS, CONFIG, METRICS, create_run
from gpt2fast.training.trainer import Trainer, evaluate, hellaswag_examples, make_optimizer

__all__ = ["Result", "build_model", "resume_run", "start_run"]

#: The offline default text: the first modules of Python's standard library, by name.
DEFAULT_TEXT_BYTES: Final = 3_000_000
DEFAULT_PROMPT: Final = "def "
BIGRAM_WIDTH: Final = 128


@dataclass(frozen=True)
class Result:
    """What a run came to. The losses are None and the report is empty if `signal` ended it.

    >>> from pathlib import Path
    >>> Result(Path("runs/001"), step=20, checkpoint=Path("runs/001/checkpoints/20")).val_loss is None
    True
    """

    run: Path
    step: int
    checkpoint: Path
    signal: int | None = None
    val_loss: float | None = None
    bigram_loss: float | None = None
    comparison: Comparison | None = None
    sample: str = ""
    report: str = ""


def start_run(
    config: TrainConfig,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train from the beginning in a new run folder.

    Args:
        config: the run's configuration.
        out: the folder; None takes the next free number in runs/.
        overwrite: replace an earlier run in `out`.
        progress: what the user sees; by default lines on stderr.

    Raises:
        FileExistsError: `out` is in use.
        ValueError: settings, data and weights do not fit together; the message says which.
        OSError, RuntimeError: a file cannot be read or written; the loss is not finite
            (`Diverged`); a backend or device cannot run here.

    >>> from pathlib import Path
    >>> from gpt2fast.data import prepare
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 100)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="char")
    >>> tiny = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 2}
    >>> config = load_config(None, {**tiny, "data": "data", "max_steps": 3, "warmup_steps": 1})
    >>> result = start_run(config, Path("run"))
    >>> result.step, result.checkpoint.is_dir()
    (3, True)
    """
    with _machine(config), join(_device(config)) as ranks:
        progress = (progress or Progress()) if ranks.first else Progress.silent()
        ranks.on_first(lambda: _check_before(config, out))  # which may download
        if config.hellaswag not in (None, "download"):
            config = config.model_copy(update={"hellaswag": str(Path(config.hellaswag).resolve())})
        # A wrong data folder or other weights than the data's are found before a folder is made.
        tokenizer: Tokenizer = ByteTokenizer()
        if config.data is not None:
            config = config.model_copy(update={"data": str(Path(config.data).resolve())})
            for data in (
                TokenDataset(str(config.data), "val"),
                TokenDataset(str(config.data), "train"),
            ):
                make_loader(  # long enough for a row?
                    data, config.batch_size, config.block_size, document_mask=config.document_mask
                )
            tokenizer = data.tokenizer
        build_model(config, tokenizer, on="meta")
        share_rows(config, ranks.world_size)

        def make_run() -> Path:
            run = create_run(out, overwrite=overwrite)
            config.save(run / CONFIG)
            return run

        run = ranks.on_first(make_run)
        train_data, val_data = _open_data(config, run, progress, ranks)
        torch.manual_seed(config.seed)
        model = build_model(config, val_data.tokenizer).to(_device(config))
        if not ranks.first:
            ranks.seed(config.seed)  # dropout; the weights are the same on all
        trainer = _trainer(config, run, model, train_data, val_data, progress, ranks)
        progress.line(_headline(trainer, train_data))
        return _train_and_report(trainer, train_data)


def resume_run(
    path: Path, changes: Mapping[str, Any] | None = None, *, progress: Progress | None = None
) -> Result:
    """Go on with a run from its newest whole checkpoint, or from the checkpoint that `path` is.

    Args:
        path: a run folder, or a checkpoint in one.
        changes: settings to change; only those that do not change what a step computes, and
            max_steps, max_minutes.

    Raises:
        CheckpointError: no whole checkpoint, or the named one is damaged.
        ValueError: a change that a resumed run refuses, or nothing is left to do.
        OSError, RuntimeError: see `start_run`.

    >>> from pathlib import Path
    >>> from gpt2fast.data import prepare
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 100)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="char")
    >>> tiny = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 2}
    >>> config = load_config(None, {**tiny, "data": "data", "max_steps": 3, "warmup_steps": 1})
    >>> _ = start_run(config, Path("run"))
    >>> resume_run(Path("run"), {"max_steps": 5}).step
    5
    """
    progress = progress or Progress()
    damaged: list[str] = []
    checkpoint = find_checkpoint(path, damaged)
    run = checkpoint.folder.parent.parent
    if checkpoint.folder.parent.name != CHECKPOINTS or not (run / CONFIG).is_file():
        raise ValueError(f"{path} is not in a run folder: start from it with --init-from")
    saved = checkpoint.config()
    config = saved.resumed_with(changes or {})
    with _machine(config), join(_device(config)) as ranks:
        progress = progress if ranks.first else Progress.silent()
        for problem in damaged:
            progress.line(f"warning: passed over a damaged checkpoint: {problem}")
        if len({step for (step,) in ranks.all(checkpoint.step)}) > 1:
            raise ValueError(f"{run}: its processes see different files: use a disk they share")
        train_data, val_data = _open_data(config, run, progress, ranks)
        model = checkpoint.model(dropout=config.dropout).to(_device(config))
        _check_vocabulary(
            str(checkpoint.folder), load_tokenizer(checkpoint.folder, model.config.vocab_size),
            val_data,
        )  # fmt: skip
        trainer = _trainer(config, run, model, train_data, val_data, progress, ranks)
        extended = config.max_steps != saved.max_steps or config.max_minutes != saved.max_minutes
        state = checkpoint.restore(trainer.optimizer, ranks)
        trainer.load_state_dict(state, keep_final=not extended)
        _check_something_left(trainer, run)
        ranks.on_first(lambda: config.save(run / CONFIG))
        progress.line(f"resuming {run} at step {trainer.step:,} of {trainer.end:,}")
        return _train_and_report(trainer, train_data)


def build_model(config: TrainConfig, tokenizer: Tokenizer, on: str = "cpu") -> GPT:
    """The model of a new run, from random weights or from `init_from`.

    Raises:
        ValueError: `init_from` has another shape or vocabulary than the settings and the data.
    """
    wanted = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    shape = {name: value for name, value in wanted.items() if value is not None}
    if config.init_from is None:
        name = config.model or "gpt2"
        if name in BIGRAMS:
            if shape.keys() - {"n_embd"} or config.dropout:
                raise ValueError(f"{name} has n_embd, but no n_layer, n_head or dropout")
            shape = {"n_layer": 1, "n_head": 1, "n_embd": BIGRAM_WIDTH} | shape
        described = GPTConfig.from_name(
            "gpt2" if name in BIGRAMS else name,
            **shape,
            vocab_size=tokenizer.vocab_size,
            block_size=config.block_size,
            dropout=config.dropout,
        )
        with torch.device(on):
            return BIGRAMS.get(name, GPT)(described)
    model, folder = open_model(config.init_from, dropout=config.dropout)
    has = model.config
    if config.model is not None:
        named = GPTConfig.from_name(config.model)
        shape = {name: getattr(named, name) for name in wanted} | shape
    if differences := [
        f"{name}={getattr(has, name)}, not {value}"
        for name, value in shape.items()
        if getattr(has, name) != value
    ]:
        raise ValueError(f"init_from {folder} has {', '.join(differences)}")
    if config.block_size > has.block_size:
        raise ValueError(
            f"block_size={config.block_size} is more than the {has.block_size} positions of "
            f"init_from {folder}"
        )
    if (folder / TOKENIZER).exists():
        found = load_tokenizer(folder, has.vocab_size)
        if found != tokenizer:
            raise ValueError(_vocabularies(f"init_from {folder}", found, tokenizer))
    elif has.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"init_from {folder} has vocab_size={has.vocab_size}, but the data's tokenizer "
            f"{tokenizer.name} has {tokenizer.vocab_size}"
        )
    return model


def _vocabularies(where: str, found: Tokenizer, wanted: Tokenizer) -> str:
    same = " of other characters" if found.vocab_size == wanted.vocab_size else ""
    return (
        f"{where} has the {found.name} vocabulary of {found.vocab_size}, but the data has the "
        f"{wanted.name} vocabulary of {wanted.vocab_size}{same}"
    )


def _check_vocabulary(where: str, found: Tokenizer, data: TokenDataset) -> None:
    if found != data.tokenizer:
        raise ValueError(f"{data.folder}: {_vocabularies(where, found, data.tokenizer)}")


class _machine:
    """Sets threads, backend and memory policy for a run, and puts the first two back."""

    def __init__(self, config: TrainConfig) -> None:
        self._threads = torch.get_num_threads()
        self._backend = backends.use_backend(None if config.backend == "auto" else config.backend)
        self._config = config
        self._repeats = Deterministic(config.seed) if config.deterministic else nullcontext()

    def __enter__(self) -> None:
        self._backend.__enter__()
        self._repeats.__enter__()
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        if _device(self._config).type == "cpu":
            backends.keep_freed_memory()

    def __exit__(self, *error: Any) -> None:
        torch.set_num_threads(self._threads)
        self._repeats.__exit__(*error)
        self._backend.__exit__(*error)


def _device(config: TrainConfig) -> torch.device:
    """Raises ValueError for a device that PyTorch does not know or does not have."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"device={config.device!r}: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r}: PyTorch finds no GPU here")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={config.device!r}: use auto, cpu or cuda")
    return device


def _check_before(config: TrainConfig, out: Path | None) -> None:
    check_trackers(config)
    hellaswag_examples(config)
    if out is not None and config.data is not None:
        data, folder = Path(config.data).resolve(), out.resolve()
        if data == folder or folder in data.parents:
            raise ValueError(f"the data {config.data} lies in the run folder {out}: move it out")


def _trainer(
    config: TrainConfig,
    run: Path,
    model: GPT,
    train_data: TokenDataset,
    val_data: TokenDataset,
    progress: Progress,
    ranks: Ranks,
) -> Trainer:
    model = ranks.shard(model, config)
    optimizer = make_optimizer(model, config)
    return Trainer(config, run, model, optimizer, train_data, val_data, progress, ranks)


def _open_data(
    config: TrainConfig, run: Path, progress: Progress, ranks: Ranks
) -> tuple[TokenDataset, TokenDataset]:
    folder = Path(config.data) if config.data is not None else run / "data"

    def prepare_default() -> None:
        if config.data is not None or (folder / "manifest.json").exists():
            return
        progress.line("preparing the offline default text: source code of Python's own library")
        prepare(
            "stdlib",
            folder,
            tokenizer=ByteTokenizer.name,
            max_bytes=DEFAULT_TEXT_BYTES,
            overwrite=folder.exists(),
            progress=False,
        )

    ranks.on_first(prepare_default)
    return TokenDataset(folder, "train"), TokenDataset(folder, "val")


def _headline(trainer: Trainer, data: TokenDataset) -> str:
    shape = trainer.model.config
    with_ = backends.choose(next(trainer.model.parameters()))
    shaped = f"GPT with {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}"
    if (kind := trainer.model.model_type) in BIGRAMS:
        shaped = f"{kind} of width {shape.n_embd}"
    return (
        f"{trainer.run}: {shaped}: {trainer.model.num_parameters():,} parameters; "
        f"{data.tokens:,} training tokens; {trainer.tokens_per_step:,} a step; {with_} kernels "
        f"({backends.status(with_).detail})"
    )


def _check_something_left(trainer: Trainer, run: Path) -> None:
    limit = trainer.config.max_minutes
    if trainer.step >= trainer.end:
        raise ValueError(
            f"{run} is finished: step {trainer.step} of {trainer.end}. To train on give it a "
            "larger --max-steps" + (" and --max-minutes" if limit is not None else "")
        )
    if limit is not None and trainer.elapsed >= 60 * limit:
        raise ValueError(
            f"{run} has used up its time: {duration(trainer.elapsed)} of max_minutes={limit:g}. "
            "To train on give it a larger --max-minutes"
        )


def _train_and_report(trainer: Trainer, train_data: TokenDataset) -> Result:
    outcome = trainer.train()
    run, checkpoint = trainer.run, outcome.checkpoint.folder
    if outcome.signal is not None and trainer.step < trainer.end:
        return Result(run, outcome.step, checkpoint, signal=outcome.signal)
    config, val_data, progress = trainer.config, trainer.val_data, trainer.progress
    progress.line("validating")
    val_loss = evaluate(trainer.model, val_data, config, config.eval_batches, ranks=trainer.ranks)
    assert val_loss is not None
    with open_metrics(run, config, outcome.step, trainer.ranks) as metrics:
        metrics.write({"step": outcome.step, "val_loss": val_loss})
        trainer.score_hellaswag(metrics)
    whole = trainer.ranks.whole(trainer.model)
    if whole is None:  # the first process reports
        return Result(run, outcome.step, checkpoint, None, val_loss)
    model = whole.to(trainer.device)
    bigram: float | None = None
    try:
        if not train_data.supervised:
            bigram = Bigram.count(train_data).loss(
                sequential_batches(
                    val_data, config.batch_size, config.block_size, config.eval_batches
                )
            )
    except ValueError as error:  # a damaged part of the data that no batch has met
        progress.line(f"warning: no bigram model to compare with: {error}")
    comparison, reason = None, ""
    if config.compare_reference:
        progress.line("timing the kernels against plain PyTorch")
        comparison = compare_with_reference(model, train_data, config)
        if comparison is None:
            why = backends.status("cpu")
            reason = "ran on plain PyTorch" + ("" if why.available else f": {why.detail}")
    text, speed = _sample(model, val_data.tokenizer, config)
    (run / "sample.txt").write_text(text, encoding="utf-8")
    plot_losses(run / METRICS, bigram, run / "loss.png")
    tokens = outcome.step * trainer.tokens_per_step
    write_report(
        run / "report.json",
        steps=outcome.step,
        tokens=tokens,
        seconds=trainer.elapsed,
        val_loss=val_loss,
        bigram_loss=bigram,
        comparison=comparison,
        sample_tokens_per_second=speed,
        checkpoint=str(checkpoint.relative_to(run)),
    )
    report = summary(
        val_loss=val_loss,
        bigram=bigram,
        steps=outcome.step,
        tokens=tokens,
        seconds=trainer.elapsed,
        comparison=comparison,
        reference_reason=reason,
    )
    return Result(run, outcome.step, checkpoint, None, val_loss, bigram, comparison, text, report)


def _sample(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> tuple[str, float | None]:
    """A text from the model and tokens a second; the prompt is left in."""
    if config.sample_tokens == 0:
        return "", None
    prompt = prompt_tokens(tokenizer, DEFAULT_PROMPT if config.data is None else "")
    began = time.perf_counter()
    idx = prompt.to(next(model.parameters()).device)
    tokens = generate(
        model, idx, config.sample_tokens, temperature=0.8, top_k=50, generator=config.seed
    )
    seconds = time.perf_counter() - began
    ids = tokens[0].tolist()
    if tokenizer.eot_token is not None and ids[0] == tokenizer.eot_token:
        ids = ids[1:]
    return tokenizer.decode(ids), config.sample_tokens / seconds
