"""Batches of any data set: of a text's windows, or of examples, with the borders of documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2fast.data.examples import IGNORE, PROMPT, START, split_example
from gpt2fast.data.loader import (
    BatchLoader,
    TokenDataset,
    check_state,
    permutation,
    sequential_batches,
)

__all__ = ["Batch", "ExampleLoader", "Loader", "batches_in_order", "make_loader"]


class Batch(NamedTuple):
    """Inputs and targets (B, T), int64, -100 for no target, and what GPT calls cu_seqlens."""

    x: Tensor
    y: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def targets(self) -> int:
        """How many positions have a target; the batch must lie on the CPU."""
        return int((self.y != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        x, y = (part.to(device, non_blocking=True) for part in self[:2])
        borders = self.cu_seqlens
        return Batch(x, y, None if borders is None else borders.to(device, non_blocking=True))


class Loader(Protocol):
    """An endless iterator of batches whose place can be saved."""

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Self: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_loader(
    dataset: TokenDataset,
    batch_size: int,
    block_size: int,
    *,
    seed: int = 1337,
    document_mask: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """`BatchLoader` or `ExampleLoader`, as the data set is; with ``document_mask`` a text's batches
    tell where documents begin (examples' always do).

    Raises:
        ValueError: see the loaders; ``document_mask`` and no end-of-text in the vocabulary.
    """
    options: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    if dataset.supervised:
        return ExampleLoader(dataset, batch_size, block_size, **options)
    return _TextLoader(dataset, batch_size, block_size, document_mask, options)


def batches_in_order(
    dataset: TokenDataset,
    batch_size: int,
    block_size: int,
    max_batches: int | None = None,
    *,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """Everything once, in order, for evaluation: see `sequential_batches`.

    The last batch has fewer rows if they do not fill it: weigh by targets when averaging.
    """
    if dataset.supervised:
        rows = _Rows(dataset, block_size)
        return rows.batches_in_order(batch_size, max_batches)
    eot = _end_of_text(dataset) if document_mask else None
    batches = sequential_batches(dataset, batch_size, block_size, max_batches)
    return (_with_documents(x, y, eot) for x, y in batches)


def _end_of_text(dataset: TokenDataset) -> int:
    if dataset.tokenizer.eot_token is None:
        raise ValueError(
            f"document_mask: the {dataset.tokenizer.name} tokenizer of {dataset.folder} has no "
            "end-of-text token to tell documents apart"
        )
    return dataset.tokenizer.eot_token


def _with_documents(x: Tensor, y: Tensor, eot: int | None) -> Batch:
    """A document begins with end-of-text, and with each row."""
    if eot is None:
        return Batch(x, y)
    begins = x == eot
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0]
    return Batch(x, y, torch.cat([starts, starts.new_tensor([x.numel()])]).to(torch.int32))


class _TextLoader:
    """A BatchLoader whose batches are `Batch`es."""

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        block_size: int,
        document_mask: bool,
        options: dict[str, Any],
    ) -> None:
        self._eot = _end_of_text(dataset) if document_mask else None
        self._loader = BatchLoader(dataset, batch_size, block_size, **options)
        self.state_dict = self._loader.state_dict
        self.load_state_dict = self._loader.load_state_dict

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return _with_documents(*next(self._loader), self._eot)


class _Rows:
    """The examples of a split, packed into rows of T tokens.

    A row takes whole examples while they fit; the rest of it is padding. Of an example of more than
    T + 1 tokens the last T + 1 are kept: its end has targets, whatever the length of its prompt.

    Raises:
        ValueError: sizes below 1, the data set is not of examples, or has none of two tokens.
    """

    def __init__(self, dataset: TokenDataset, block_size: int) -> None:
        if not dataset.supervised:
            raise ValueError(f"{dataset.folder} holds text, not prompts and responses")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.dataset = dataset
        self.block_size = block_size
        borders = np.cumsum([0, *(shard.size for shard in dataset.shards)])
        self._borders = borders
        starts, marks = (
            np.concatenate(
                [
                    np.flatnonzero(s >= low) + at
                    for s, at in zip(dataset.shards, borders, strict=False)
                ]
            )
            for low in (START, PROMPT)
        )
        ends = np.append(starts[1:], borders[-1])
        lengths = ends - starts - (np.searchsorted(marks, ends) - np.searchsorted(marks, starts))
        kept = lengths >= 2  # one token has nothing that predicts it
        if not kept.any():
            raise ValueError(f"{dataset.folder}: no {dataset.split} examples")
        self._starts, self._ends = starts[kept], ends[kept]
        #: Positions that each example takes, (n,).
        self.sizes = np.minimum(lengths[kept] - 1, block_size)
        self.truncated = int((lengths[kept] - 1 > block_size).sum())

    def __len__(self) -> int:
        return len(self.sizes)

    def _stored(self, number: int) -> npt.NDArray[np.uint16]:
        start, end = int(self._starts[number]), int(self._ends[number])
        first = int(np.searchsorted(self._borders, start, side="right")) - 1
        parts = []
        for shard, at in zip(self.dataset.shards[first:], self._borders[first:], strict=False):
            if at >= end:
                break
            parts.append(shard[max(0, start - at) : end - at])
        return np.concatenate(parts)

    def assemble(self, rows: list[list[int]]) -> Batch:
        """A batch whose rows hold the examples of these numbers."""
        eot = self.dataset.tokenizer.eot_token or 0
        x = np.full((len(rows), self.block_size), eot, dtype=np.int64)
        y = np.full_like(x, IGNORE)
        borders = []
        for row, numbers in enumerate(rows):
            at = 0
            for number in numbers:
                ids, counted = split_example(self._stored(number))
                ids, counted = ids[-self.block_size - 1 :], counted[-self.block_size - 1 :]
                if ids.max() >= self.dataset.tokenizer.vocab_size:
                    raise ValueError(
                        f"{self.dataset.folder}: example {number} has token {ids.max()}, outside "
                        f"the {self.dataset.tokenizer.name} vocabulary: the shard is damaged"
                    )
                borders.append(row * self.block_size + at)
                end = at + len(ids) - 1
                x[row, at:end] = ids[:-1]
                y[row, at:end] = np.where(counted[1:], ids[1:], IGNORE)
                at = end
            if at < self.block_size:
                borders.append(row * self.block_size + at)
        borders.append(x.size)
        return Batch(
            torch.from_numpy(x), torch.from_numpy(y), torch.tensor(borders, dtype=torch.int32)
        )

    def batches_in_order(self, batch_size: int, max_batches: int | None) -> Iterator[Batch]:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        rows: list[list[int]] = [[]]
        left = self.block_size
        count = 0
        for number, size in enumerate(self.sizes.tolist()):
            if size > left:
                if len(rows) == batch_size:
                    yield self.assemble(rows)
                    count += 1
                    if count == max_batches:
                        return
                    rows = []
                rows.append([])
                left = self.block_size
            rows[-1].append(number)
            left -= size
        yield self.assemble(rows)


class ExampleLoader:
    """An endless iterator of `Batch`es of examples, with targets in the responses only.

    An epoch visits every example once, in an order that depends on seed and epoch alone. Examples
    are packed into rows in that order, and no example sees another. Each step all ranks together
    take the next ``world_size * batch_size`` rows, and rank r the r-th ``batch_size`` of them.

    Args: those of `BatchLoader`.

    Raises:
        ValueError: an argument out of range, or no examples.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        block_size: int,
        *,
        seed: int = 1337,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 to world_size - 1, got {rank} of {world_size}")
        self.rows = _Rows(dataset, block_size)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._go_to(0, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch = epoch
        self._position = position
        self._order = permutation(len(self.rows), self.seed, epoch)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        rows = [self._row() for _ in range(self.batch_size * self.world_size)]
        first = self.rank * self.batch_size
        return self.rows.assemble(rows[first : first + self.batch_size])

    def _row(self) -> list[int]:
        row: list[int] = []
        left = self.rows.block_size
        while (size := int(self.rows.sizes[number := int(self._order[self._position])])) <= left:
            row.append(number)
            left -= size
            self._position += 1
            if self._position == len(self.rows):
                self._go_to(self.epoch + 1, 0)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON values: the same on every rank."""
        return {"epoch": self.epoch, "position": self._position, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises ValueError, and changes nothing, if the state is of other data or settings.
        """
        epoch, position = check_state(state, self._identity())
        if not 0 <= position < len(self.rows):
            raise ValueError(f"position must be in 0 to {len(self.rows) - 1}, got {position!r}")
        self._go_to(epoch, position)

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset": self.rows.dataset.fingerprint,
            "examples": len(self.rows),
            "block_size": self.rows.block_size,
            "seed": self.seed,
        }
