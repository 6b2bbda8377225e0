"""The training loop: steps, validation, checkpoints, and where to go on after an interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2fast.data import TokenDataset
from gpt2fast.data.batches import batches_in_order, make_loader
from gpt2fast.evaluation import Example, download_examples, evaluate_hellaswag, read_examples
from gpt2fast.training.checkpoint import Checkpoint, save_checkpoint
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.distributed import ALONE, Forward, Ranks, share_rows, whole_ends
from gpt2fast.training.health import Health
from gpt2fast.training.interrupt import StopSignals
from gpt2fast.training.metrics import Metrics, mfu, open_metrics, peak_flops
from gpt2fast.training.progress import Progress
from gpt2fast.training.runs import CHECKPOINTS, METRICS
from gpt2fast.training.schedule import FinalDecay, learning_rate, plan_final_decay

if TYPE_CHECKING:
    from gpt2fast.model import GPT
    from gpt2fast.optim import AdamW

__all__ = ["Diverged", "Outcome", "Trainer", "autocast", "evaluate", "make_optimizer"]


class Diverged(RuntimeError):
    """The loss or the gradient is not a finite number, or jumped, and the policy is to stop.

    >>> issubclass(Diverged, RuntimeError)
    True
    """


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.train` ended: the step, the checkpoint of it, and the signal if one came."""

    step: int
    checkpoint: Checkpoint
    signal: int | None


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context of forward passes: bfloat16 where the configuration asks for it."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def make_optimizer(model: GPT, config: TrainConfig) -> AdamW:
    """The AdamW that `config` describes."""
    return model.configure_optimizer(
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        max_norm=config.clip or math.inf,  # infinity: the norm is measured only
    )


@torch.no_grad()
def evaluate(
    model: GPT,
    dataset: TokenDataset,
    config: TrainConfig,
    batches: int,
    cancelled: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> float | None:
    """Mean loss in nats a token over the first `batches` of the data; None if `cancelled`.

    Draws no random numbers, so that a run is the same with more or fewer validations. Of many
    processes all are to call it: they take the batches in turn, and all get the mean.

    Raises:
        ValueError: no shard has a whole window.

    >>> from pathlib import Path
    >>> from gpt2fast.data import TokenDataset, prepare
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 10)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="byte")
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=8))
    >>> config = TrainConfig(block_size=8, batch_size=2)
    >>> 5 < evaluate(model, TokenDataset("data", "val"), config, batches=1) < 6  # log 257 = 5.55
    True
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = count = 0.0
    try:
        sizes = (config.batch_size, config.block_size, batches)
        left = batches_in_order(dataset, *sizes, document_mask=config.document_mask)
        while turn := list(islice(left, ranks.world_size)):
            if cancelled():
                return None
            # One for whom no batch is left runs another's: parts of a model are gathered together.
            mine = ranks.rank < len(turn)
            batch = turn[ranks.rank] if mine else turn[0]
            x, y, cu_seqlens = batch.to(device)
            with autocast(config, device):
                _, loss = model(x, y, cu_seqlens=cu_seqlens)
            if mine:
                total += float(loss) * batch.targets
                count += batch.targets
    finally:
        model.train(was_training)
    totals, counts = zip(*ranks.all(total, count), strict=True)
    return sum(totals) / sum(counts)


class Trainer:
    """Trains `model` in the run folder `run` from where it stands to the end of the schedule.

    Args:
        config: the run's configuration.
        run: the run's folder; metrics are appended and checkpoints written there.
        model: on its device; fp32 weights; as `ranks.shard` gave it.
        optimizer: of the model's parameters.
        train_data, val_data: of one tokenizer, the model's.
        progress: what the user sees.
        ranks: the processes that train together, each with a trainer of its own. The first one
            writes; all take the same steps and end at the same one.

    `start_run` and `resume_run` make one; a trainer can be made by hand, too:

    >>> from pathlib import Path
    >>> from gpt2fast.data import TokenDataset, prepare
    >>> from gpt2fast.training.progress import Progress
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 100)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="byte")
    >>> config = TrainConfig(block_size=8, batch_size=2, max_steps=2, warmup_steps=1)
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=8))
    >>> optimizer = model.configure_optimizer(lr=1e-3)
    >>> data = TokenDataset("data", "train"), TokenDataset("data", "val")
    >>> trainer = Trainer(config, Path("."), model, optimizer, *data, Progress.silent())
    >>> trainer.step
    0
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        model: GPT,
        optimizer: AdamW,
        train_data: TokenDataset,
        val_data: TokenDataset,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.config = config
        self.run = run
        self.model = model
        self.optimizer = optimizer
        self.val_data = val_data
        self.progress = progress
        self.device = next(model.parameters()).device
        rows, self._accumulate = share_rows(config, ranks.world_size)
        self.loader = make_loader(
            train_data,
            rows,
            config.block_size,
            seed=config.seed,
            document_mask=config.document_mask,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self.health = Health(config)
        self.examples = ranks.on_first(lambda: hellaswag_examples(config))
        self.step = 0
        self.final: FinalDecay | None = None
        self.elapsed = 0.0  # seconds of training, earlier sessions included
        model.transformer.gradient_checkpointing = config.gradient_checkpointing
        self._forward = Forward(model, config, ranks)
        self._signal: int | None = None  # that any of the processes got
        self._seconds_per_step: float | None = None
        self._session: tuple[float, int] = (0.0, 0)  # when this session began, and at which step
        self._clock = 0.0

    @property
    def end(self) -> int:
        """The step at which the run is over, as planned now."""
        return self.config.max_steps if self.final is None else self.final.end

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on, of all processes."""
        return self.config.batch_size * self.config.block_size * self.config.grad_accum

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside model, optimizer and random generators: JSON values."""
        return {
            "step": self.step,
            # A checkpoint of a run that repeats to the bit does not tell the time.
            "elapsed": None if self.config.deterministic else self.elapsed,
            "health": self.health.state_dict(),
            "final": asdict(self.final) if self.final else None,
            "loader": self.loader.state_dict(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": self.ranks.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any], keep_final: bool = True) -> None:
        """Go on where `state_dict` was taken; without its final decay if not `keep_final`."""
        self.loader.load_state_dict(state["loader"])
        self.step = int(state["step"])
        self.elapsed = float(state["elapsed"] or self._elapsed_by_metrics())
        self.health.load_state_dict(state.get("health", {}))
        self.final = FinalDecay(**state["final"]) if state["final"] and keep_final else None
        here_now = self.state_dict()
        for name in ("torch", "threads", "processes"):
            if state[name] != (here := here_now[name]):
                self.progress.line(
                    f"note: the run had {name} {state[name]}, here it is {here}: "
                    "results may differ in the last bits"
                )

    def train(self) -> Outcome:
        """Train to the end, or until Ctrl-C or SIGTERM; the last step is saved either way.

        Raises:
            Diverged: a loss or gradient is not finite; the last checkpoint is from before it.
            OSError: a checkpoint or the metrics cannot be written; earlier checkpoints are whole.
        """
        config = self.config
        self._session = (self.elapsed, self.step)
        self._clock = time.perf_counter() - self.elapsed
        self.ranks.on_first(self._cut_metrics)
        saved: Checkpoint | None = None
        self.model.train()
        # What many processes were sent as a group torchrun sends them again.
        with (
            StopSignals(deaf_seconds=1.0 if self.ranks.world_size > 1 else 0.0) as stop,
            open_metrics(self.run, config, self.step, self.ranks) as metrics,
        ):
            if self.step == 0 and config.eval_interval:
                self._validate(metrics, stop)
            while self.step < self.end and not self._stopped(stop):
                began = time.perf_counter()
                record = self._train_step()
                seconds = time.perf_counter() - began
                self.elapsed = time.perf_counter() - self._clock
                self._report(record, seconds, metrics)
                self._mind_the_time()
                last = self.step >= self.end
                if config.eval_interval and self.step % config.eval_interval == 0 and not last:
                    self._validate(metrics, stop)
                every = config.hellaswag_interval
                if every and self.step % every == 0 and not last:
                    self.score_hellaswag(metrics, stop)
                if config.save_interval and self.step % config.save_interval == 0 and not last:
                    saved = self.save()
            if saved is None or saved.step != self.step:
                saved = self.save()
        return Outcome(self.step, saved, self._signal)

    def _stopped(self, stop: StopSignals) -> bool:
        """Whether any process got a signal by now, when all of them ask."""
        self._signal = int(max(self.ranks.all(stop.received or 0))[0]) or None
        return self._signal is not None

    def save(self) -> Checkpoint:
        """Write a checkpoint of this step."""
        return save_checkpoint(
            self.run / CHECKPOINTS,
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=self.val_data.tokenizer,
            config=self.config,
            trainer=self.state_dict(),
            keep=self.config.keep_checkpoints,
            ranks=self.ranks,
        )

    def _train_step(self) -> dict[str, Any]:
        """One update; returns what is known about it."""
        config = self.config
        rate = learning_rate(self.step, config, self.final)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        batches = [next(self.loader) for _ in range(self._accumulate)]
        # Every target of the step counts as much, in whatever micro-batch and process it is.
        own = sum(batch.targets for batch in batches)
        targets = sum(count for (count,) in self.ranks.all(own))
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            x, y, cu_seqlens = batch.to(self.device)
            with autocast(config, self.device):
                loss = self._forward(x, y, cu_seqlens=cu_seqlens, sync=left == 0)
            loss = loss * (batch.targets / targets)
            (loss * self.ranks.world_size).backward()  # gradients become the mean over processes
            total += loss.detach()
        mean = sum(loss for (loss,) in self.ranks.all(float(total)))
        measured = self.optimizer.measure()
        assert measured is not None  # max_norm is set
        norm = float(measured)
        verdict = self.health.judge(mean, norm)  # before the update: the weights stay good
        record: dict[str, Any] = {"step": self.step + 1, "lr": rate}
        record |= {
            name: value
            for name, value in (("loss", mean), ("grad_norm", norm))
            if math.isfinite(value)  # JSON has no other numbers
        }
        if verdict.action == "stop":
            raise self._diverged(verdict.reason, rate)
        if verdict.action != "go":
            self.progress.line(f"step {self.step + 1:,}: {verdict.action}: {verdict.reason}")
            record[verdict.action] = verdict.reason
        if verdict.action != "skip":
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return record

    def _diverged(self, reason: str, rate: float) -> Diverged:
        folder = self.run / CHECKPOINTS
        kept = sorted(path.name for path in folder.glob("step_*"))
        left = f"The last good checkpoint is {folder / kept[-1]}" if kept else "None was saved yet"
        return Diverged(
            f"{reason} at step {self.step + 1} (lr {rate:.3g}). {left}. "
            "A lower --lr, a longer --warmup-steps or --clip 1.0 may help"
        )

    def _report(self, record: dict[str, Any], seconds: float, metrics: Metrics) -> None:
        before = self._seconds_per_step
        self._seconds_per_step = seconds if before is None else 0.9 * before + 0.1 * seconds
        speed = self.tokens_per_step / seconds
        record |= {"tokens_per_second": round(speed, 1), "elapsed": round(self.elapsed, 3)}
        if (peak := peak_flops(self.config, self.device, self.ranks.world_size)) is not None:
            record["mfu"] = round(mfu(self.model, self.config.block_size, speed, peak), 4)
        metrics.write(record)
        began, first = self._session
        eta = (self.end - self.step) * (self.elapsed - began) / (self.step - first)
        if self.config.max_minutes is not None:
            eta = min(eta, 60 * self.config.max_minutes - self.elapsed)
        smooth = self.tokens_per_step / self._seconds_per_step
        self.progress.step(self.step, self.end, record.get("loss", math.nan), smooth, eta)

    def _mind_the_time(self) -> None:
        """Begin the final decay when the time limit asks for it; end when it is over."""
        if self.config.max_minutes is None or self.step >= self.end:
            return
        self.elapsed = self.ranks.all(self.elapsed)[0][0]  # by the first one's clock for all
        left = 60 * self.config.max_minutes - self.elapsed
        if left <= 0:
            self.final = FinalDecay(self.step - 1, 1)
            self.progress.line(f"the time is up at step {self.step}")
        elif self.final is None:
            began, first = self._session
            rate = (self.step - first) / (self.elapsed - began)
            self.final = plan_final_decay(self.step, self.config.max_steps, rate, left)
            if self.final is not None:
                self.progress.line(
                    f"the time limit cuts the schedule: {self.final.steps} last steps, "
                    f"to step {self.final.end} of {self.config.max_steps}"
                )

    def _validate(self, metrics: Metrics, stop: StopSignals) -> None:
        loss = evaluate(
            self.model,
            self.val_data,
            self.config,
            self.config.eval_batches,
            cancelled=lambda: self._stopped(stop),
            ranks=self.ranks,
        )
        if loss is None:
            return
        self.elapsed = time.perf_counter() - self._clock
        metrics.write({"step": self.step, "val_loss": loss})
        self.progress.line(f"step {self.step:,}: validation loss {loss:.4f}")

    def score_hellaswag(self, metrics: Metrics, stop: StopSignals | None = None) -> None:
        """Score the examples, if there are any, and record it; draws no random numbers.

        Left undone if a stop signal arrives. Of many processes each scores all examples.
        """
        if not self.examples:
            return
        dtype = None if self.config.dtype == "float32" else torch.bfloat16
        try:
            with whole_ends(self.model):
                found = evaluate_hellaswag(
                    self.model,
                    self.val_data.tokenizer,
                    self.examples,
                    dtype=dtype,
                    progress=False,
                    cancelled=lambda: stop is not None and self._stopped(stop),
                )
        except InterruptedError:
            return
        metrics.write(
            {
                "step": self.step,
                "hellaswag_acc": found.acc,
                "hellaswag_acc_norm": found.acc_norm,
                "hellaswag_examples": found.examples,
            }
        )
        self.progress.line(
            f"step {self.step:,}: HellaSwag acc {found.acc:.4f}, acc_norm {found.acc_norm:.4f} "
            f"+- {found.acc_norm_stderr:.4f} ({found.examples:,} examples)"
        )

    def _elapsed_by_metrics(self) -> float:
        """What the metrics say of the last step of the checkpoint; 0 if nothing."""
        path, found = self.run / METRICS, 0.0
        for record in _records(path) if path.exists() else []:
            if record["step"] <= self.step:
                found = float(record.get("elapsed", found))
        return found

    def _cut_metrics(self) -> None:
        """Drop the lines of steps after the checkpoint that this session continues from."""
        path = self.run / METRICS
        if not path.exists():
            return
        kept = [
            json.dumps(record) + "\n"
            for record in _records(path)
            if self.step and record["step"] <= self.step
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


def hellaswag_examples(config: TrainConfig) -> list[Example]:
    """The examples that the configuration asks for; none if it does not.

    Raises:
        DownloadError, OSError, ValueError: they cannot be had.
    """
    if config.hellaswag is None:
        return []
    path = download_examples() if config.hellaswag == "download" else config.hellaswag
    return read_examples(path, config.hellaswag_examples)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl, without a line that a kill cut short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        yield record
