"""Many processes that train one model, as torchrun starts them, one for each GPU.

Gradients and parameters go over NCCL between GPUs and over gloo between CPUs (DDP or FSDP2). What
the processes have to agree on (the loss, whether to stop, how an action of the first one ended) is
a few numbers between CPUs: it always goes over gloo and never waits for a GPU.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gpt2fast.training.config import TrainConfig

if TYPE_CHECKING:
    from gpt2fast.model import GPT

__all__ = ["ALONE", "Forward", "Lost", "Ranks", "environment", "join", "share_rows"]

T = TypeVar("T")


class Lost(RuntimeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as the one numbered `rank` of `world_size` sees them.

    Each method but `seed` is to be called by all of them at the same point. Alone, nothing is sent.

    Attributes:
        group: what numbers between CPUs go over; None where `world_size` is 1.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all(self, *numbers: float) -> list[list[float]]:
        """The numbers of each process, in order; the same on all."""
        if self.world_size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        with _telling():
            dist.all_gather(found, own, group=self.group)
        return [row.tolist() for row in found]

    def collect(self, value: T) -> list[T]:
        """The value of each process, in order, on the first; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        found: Any = [None] * self.world_size if self.first else None
        with _telling():
            dist.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns, or raises, on the first process alone; the same on all."""
        if self.world_size == 1:
            return action()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                told[0] = action()
            except Exception as error:
                told[1] = failure = error
        with _telling():
            dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise failure or told[1]
        result: T = told[0]
        return result

    def write_parts(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Each process writes what it holds of the tensors into a safetensors file of its own.

        What all hold is written once. torch.distributed.checkpoint decides who, and notes in each
        file which part of a tensor it has; nothing is pickled.

        Raises:
            OSError, SafetensorError: on all, what one of them met.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with _telling(), _unwrapped():
            save(
                dict(sorted(tensors.items())),  # who writes what depends on the order
                storage_writer=writer,
                process_group=self.group,
                no_dist=self.world_size == 1,
            )

    def read_parts(
        self, folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor]
    ) -> dict[str, Tensor]:
        """The tensors that any number of processes wrote with `write_parts`.

        `empty` makes room for a tensor of a name, whole shape and dtype; where it is a DTensor this
        process reads its part only.

        Raises:
            OSError, SafetensorError, ValueError: on all, what one of them met.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = HuggingFaceStorageReader(str(folder))
        found: dict[str, Tensor] = {}
        for name, kept in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(kept, TensorStorageMetadata)  # safetensors holds nothing else
            found[name] = empty(name, kept.size, kept.properties.dtype)
        with _telling(), _unwrapped():
            load(
                dict(found),
                storage_reader=reader,
                process_group=self.group,
                no_dist=self.world_size == 1,
            )
        return found

    def seed(self, seed: int, step: int = 0) -> None:
        """Random generators of this process that go on as no other's does from `step` on."""
        draw = random.Random(f"{seed} {step} {self.rank}")
        torch.manual_seed(draw.getrandbits(63))
        random.seed(draw.getrandbits(63))

    def shard(self, model: GPT, config: TrainConfig) -> GPT:
        """The model with its parameters shared out, where the configuration asks for FSDP.

        A block's parameters are gathered for its call and its backward. The embeddings and the last
        norm, which stand at both ends, stay gathered from the forward to the end of the backward.
        """
        if self.world_size == 1 or config.parallel != "fsdp":
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # The sum that a block returns is a view within its Function; nothing is added in place to it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (self.world_size,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def whole(self, model: GPT) -> GPT | None:
        """The model with whole parameters: itself, or gathered on the first process's CPU.

        None on the others.
        """
        from gpt2fast.bigram import BIGRAMS
        from gpt2fast.model import GPT

        if not _is_sharded(model):
            return model if self.first else None
        state = {}
        for name, tensor in model.state_dict().items():
            full = gathered(tensor)
            if self.first:
                state[name] = full.cpu()
        if not self.first:
            return None
        with torch.device("meta"):
            copy = BIGRAMS.get(model.model_type, GPT)(model.config)
        copy.load_state_dict(state, assign=True)
        return copy


#: One process by itself.
ALONE: Final = Ranks()


class Environment(NamedTuple):
    """What torchrun tells a process: `local_rank` is its number on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def environment() -> Environment:
    """This process's place among those that torchrun started; the only one without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Environment(rank, world_size, int(os.environ.get("LOCAL_RANK", rank)))


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Within the block the processes that torchrun started are one group; alone, `ALONE`.

    A process group that the caller has made is used and left as it is.

    Raises:
        ValueError: this machine has fewer GPUs than processes.
    """
    _, world_size, local = environment()
    ours = not dist.is_initialized()
    if ours and world_size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine finds no GPU of its own: there are "
                f"{torch.cuda.device_count()}. Start as many processes as GPUs (--nproc-per-node)"
            )
        torch.cuda.set_device(local)
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    on_cpu = dist.get_backend() == "gloo"
    group = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo")
    with _telling():
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
        # The others wait for the first one's report. After an error nobody does: the groups go
        # with the process.
        dist.barrier(group=group)
    if ours:
        dist.destroy_process_group()


@contextmanager
def _telling() -> Iterator[None]:
    """Says in words that another process is gone, which PyTorch tells in terms of sockets."""
    try:
        yield
    except RuntimeError as error:
        network = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
        if isinstance(error, Lost) or not (network or "gloo" in str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise Lost(
            "another process of this run has ended or cannot be reached. Its own message tells "
            f"why, if it could give one; --resume goes on from the last checkpoint ({reason})"
        ) from error


@contextmanager
def whole_ends(model: Any) -> Iterator[None]:
    """Within the block embeddings and last norm are whole, for calls of parts of the model.

    FSDP gathers them by itself only for calls of the model; blocks it gathers for their own.
    """
    if not _is_sharded(model):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raises what failed in torch.distributed.checkpoint, and not its collection of failures."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            # One process by itself is no mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from None


def _is_sharded(model: Any) -> bool:
    """Whether it is an FSDPModule, whose import takes a second."""
    return hasattr(model, "set_requires_gradient_sync")


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor of which each process holds a part (DTensor); others as they are."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def parted_like(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that all hold whole, parted as `like` is."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def share_rows(config: TrainConfig, world_size: int) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches a step, of each process.

    All together take batch_size x grad_accum rows a step, however many they are: each its equal
    share, in the largest equal micro-batches of at most batch_size rows.

    >>> share_rows(TrainConfig(batch_size=8, grad_accum=4), 2)
    (8, 2)
    >>> share_rows(TrainConfig(batch_size=8, grad_accum=1), 2)
    (4, 1)

    Raises:
        ValueError: the rows cannot be shared equally.
    """
    rows = config.batch_size * config.grad_accum
    if rows % world_size:
        raise ValueError(
            f"{rows} rows a step (batch_size={config.batch_size} x grad_accum={config.grad_accum}) "
            f"cannot be shared equally by {world_size} processes"
        )
    own = rows // world_size
    size = max(size for size in range(1, config.batch_size + 1) if own % size == 0)
    return size, own // size


class Forward:
    """A model's loss in training, whose backward sums gradients over processes when asked to.

    Args:
        model: as `Ranks.shard` gave it.
        config: says whether it is compiled.
        ranks: the processes.
    """

    def __init__(self, model: GPT, config: TrainConfig, ranks: Ranks) -> None:
        self._model: Any = model
        self._call: Any = torch.compile(model) if config.compile else model
        if ranks.world_size > 1 and config.parallel == "ddp":
            # Gradients live in the buckets that are sent.
            self._call = DistributedDataParallel(self._call, gradient_as_bucket_view=True)

    def __call__(self, *inputs: Tensor, sync: bool, **named: Tensor | None) -> Tensor:
        """The loss that the model gives for its inputs.

        Without `sync` its backward adds to this process's own gradients; with it these become the
        mean over all processes.
        """
        quiet: AbstractContextManager[Any] = nullcontext()
        if isinstance(self._call, DistributedDataParallel):
            quiet = quiet if sync else self._call.no_sync()
        elif _is_sharded(self._model):
            self._model.set_requires_gradient_sync(sync)
        with quiet:
            _, loss = self._call(*inputs, **named)
        assert isinstance(loss, Tensor)
        return loss
