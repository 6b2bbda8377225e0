"""Batches of tokens from shards: shuffled, endless and resumable for training; in order for eval.

A window is T + 1 consecutive tokens of one shard: T inputs and, one further, T targets. Windows of
an epoch begin every T tokens, so each token is a target at most once; neighbours share one token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch

from gpt2fast.data.shards import (
    MANIFEST,
    MARKER,
    Manifest,
    ShardError,
    Split,
    has_llmc_header,
    read_shard,
)
from gpt2fast.data.tokenizers import Gpt2Tokenizer, Tokenizer, tokenizer_from_json

__all__ = [
    "BatchLoader",
    "TokenDataset",
    "check_state",
    "permutation",
    "sequential_batches",
]

Batch = tuple[torch.Tensor, torch.Tensor]
_Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


class TokenDataset:
    """The tokens of one split of a folder of shards, memory-mapped.

    The folder is one that `prepare` or `DatasetWriter` made; or any folder of llm.c ``.bin`` or
    build-nanogpt ``.npy`` shards with ``_train_`` or ``_val_`` (or ``_train.bin``, ``_val.bin``)
    in their names; or nanoGPT's with ``train.bin`` and ``val.bin``, which have no header.

    Attributes:
        folder, split: as given.
        manifest: the folder's manifest, or None for plain shards.
        supervised: the tokens are prompts and responses, see `examples`: for `ExampleLoader`.
        names: the shards' file names.
        shards: one read-only uint16 array of shape (n,) for each shard.
        tokens: number of tokens in all shards.
        tokenizer: what the tokens mean. Plain shards are GPT-2's by their magic number.
        fingerprint: 16 hex digits that tell data sets apart.

    Raises:
        FileNotFoundError: no such folder.
        ShardError: a shard of the manifest is missing or has another length, a file is damaged,
            the split has no shards, or the preparation of the folder was interrupted.

    >>> from pathlib import Path
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 10)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="byte")
    >>> TokenDataset("data", "train").shards[0][:5]
    memmap([ 84, 111,  32,  98, 101], dtype=uint16)
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder = Path(folder)
        self.split = split
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder")
        self.manifest: Manifest | None = None
        self.tokenizer: Tokenizer = Gpt2Tokenizer()
        if (self.folder / MANIFEST).exists():
            self.manifest = Manifest.load(self.folder)
            self.tokenizer = tokenizer_from_json(self.manifest.tokenizer)
            infos = [info for info in self.manifest.shards if info.split == split]
            names = [info.file for info in infos]
            identity: list[Any] = [info.sha256 for info in infos]
        elif (self.folder / MARKER).exists():
            raise ShardError(
                f"{self.folder}: its preparation was interrupted; give the same command again"
            )
        else:
            pattern = re.compile(rf"(.*_)?{split}(_.*)?\.(bin|npy)")
            names = sorted(p.name for p in self.folder.iterdir() if pattern.fullmatch(p.name))
            identity = []
        if not names:
            raise ShardError(f"{self.folder}: no {split} shards (*_{split}_*.bin or .npy)")
        self.supervised = self.manifest is not None and self.manifest.layout == "examples"
        self.names = names
        self.shards = [self._open(name) for name in names]
        self.tokens = sum(shard.size for shard in self.shards)
        if self.manifest is not None:
            for info, shard in zip(infos, self.shards, strict=True):
                if info.tokens != shard.size:
                    raise ShardError(
                        f"{self.folder / info.file}: {shard.size} tokens, the manifest says "
                        f"{info.tokens}"
                    )
        else:
            identity = [(n, s.size) for n, s in zip(names, self.shards, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def _open(self, name: str) -> np.memmap[Any, np.dtype[np.uint16]]:
        path = self.folder / name
        try:
            if self.manifest is not None:
                return read_shard(path, self.manifest.shard_format)
            if name == f"{self.split}.bin" and not has_llmc_header(path):
                if (self.folder / "meta.pkl").exists():
                    raise ShardError(
                        f"{self.folder}: what its tokens mean is in meta.pkl, a pickle, which is "
                        "not read: prepare the text with gpt2fast"
                    )
                return read_shard(path, "raw")
            return read_shard(path)
        except FileNotFoundError as error:
            raise ShardError(
                f"{self.folder / name}: the manifest lists this shard, but it is missing"
            ) from error

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest's. Raises ShardError."""
        if self.manifest is None:
            raise ShardError(f"{self.folder}: no manifest to verify against")
        for info in self.manifest.shards:
            if info.split == self.split:
                with open(self.folder / info.file, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != info.sha256:
                    raise ShardError(
                        f"{self.folder / info.file}: expected sha256 {info.sha256}, got {found}"
                    )

    def __repr__(self) -> str:
        return (
            f"TokenDataset({str(self.folder)!r}, {self.split!r}): {self.tokens:,} tokens in "
            f"{len(self.shards)} shards"
        )


class BatchLoader:
    """An endless iterator of ``(x, y)``: int64 CPU tensors of shape (B, T), contiguous.

    ``y[b, t]`` is the token after ``x[b, t]``. An epoch visits each of its windows exactly once,
    in an order and from a first token that depend on seed and epoch alone, so window borders move
    from epoch to epoch. Batches run on over the end of an epoch and are always full. Windows do
    not cross shards: up to T tokens at each end of a shard rest for an epoch.

    Each step all ranks together take the next ``world_size * batch_size`` windows, and rank r the
    r-th ``batch_size`` of them. The order needs no memory and no setting up, whatever the size.

    Args:
        dataset: the tokens.
        batch_size: B, rows a rank.
        block_size: T, tokens a row.
        seed: any integer.
        shuffle: False takes the windows in order, every epoch from the first token.
        rank, world_size: this process, and the number of them.

    Raises:
        ValueError: an argument out of range, or no shard has T + 1 tokens.

    >>> from pathlib import Path
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 10)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="byte")
    >>> x, y = next(BatchLoader(TokenDataset("data", "train"), batch_size=2, block_size=8))
    >>> x.shape, x.dtype, torch.equal(x[:, 1:], y[:, :-1])
    (torch.Size([2, 8]), torch.int64, True)
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        block_size: int,
        *,
        seed: int = 1337,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sizes(dataset, batch_size, block_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 to world_size - 1, got {rank} of {world_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self._position = 0  # windows of this epoch that all ranks together have taken
        self._order = self._epoch_order(0)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch's first window, from 0."""
        return self._order.epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        shards, starts = [], []
        left = self.batch_size * self.world_size
        while left:
            take = min(left, self._order.windows - self._position)
            shard, start = self._order.locate(self._position, take)
            shards.append(shard)
            starts.append(start)
            left -= take
            self._position += take
            if self._position == self._order.windows:
                self._order = self._epoch_order(self.epoch + 1)
                self._position = 0
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        shards_of_rows = np.concatenate(shards)[mine]
        return _gather(self.dataset, shards_of_rows, np.concatenate(starts)[mine], self.block_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON values: the same on every rank.

        ``epoch`` and ``position`` count windows over all ranks, so that a run may continue with
        another ``world_size`` or ``batch_size`` and see the same windows.
        """
        return {"epoch": self.epoch, "position": self._position, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises ValueError, and changes nothing, if the state is of other data or settings.
        """
        epoch, position = check_state(state, self._identity())
        order = self._epoch_order(epoch)
        if not 0 <= position < order.windows:
            raise ValueError(f"position must be in 0 to {order.windows - 1}, got {position!r}")
        self._order, self._position = order, position

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset.fingerprint,
            "tokens": self.dataset.tokens,
            "block_size": self.block_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _epoch_order(self, epoch: int) -> _EpochOrder:
        if not self.shuffle:
            return _EpochOrder.of(self.dataset, self.block_size, epoch, 0, None)
        phase_word, *keys = _random_words(self.seed, epoch)
        # At most T - 1, and never so late that the longest shard has no window.
        longest = max(shard.size for shard in self.dataset.shards)
        phase = phase_word % min(self.block_size, longest - self.block_size)
        return _EpochOrder.of(self.dataset, self.block_size, epoch, phase, keys)


def check_state(state: dict[str, Any], here: dict[str, Any]) -> tuple[int, int]:
    """Epoch and position of a loader's state.

    Raises:
        ValueError: it is no such state, or of a loader with another identity than `here`.
    """
    try:
        epoch, position, of = state["epoch"], state["position"], dict(state["of"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("not the state of a loader: epoch, position and of") from error
    if differences := [
        f"{key} is {of.get(key)!r} in the state and {here.get(key)!r} here"
        for key in sorted(here.keys() | of.keys())
        if here.get(key) != of.get(key)
    ]:
        raise ValueError("the state belongs to another loader: " + "; ".join(differences))
    if not (isinstance(epoch, int) and epoch >= 0):
        raise ValueError(f"epoch must be an integer >= 0, got {epoch!r}")
    if not isinstance(position, int):
        raise ValueError(f"position must be an integer, got {position!r}")
    return epoch, position


def sequential_batches(
    dataset: TokenDataset, batch_size: int, block_size: int, max_batches: int | None = None
) -> Iterator[Batch]:
    """Every window in order, once: ``(x, y)`` as from `BatchLoader`, for evaluation.

    The last batch is shorter if the windows do not fill it: weight by rows when averaging. Fewer
    than T + 1 tokens at the end of a shard are left out. Stops after ``max_batches``.

    Raises:
        ValueError: at the call: sizes below 1, or no shard has T + 1 tokens.

    >>> from pathlib import Path
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 10)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="byte")
    >>> [x.shape for x, y in sequential_batches(TokenDataset("data", "val"), 4, 6)]
    [torch.Size([3, 6])]
    """
    _check_sizes(dataset, batch_size, block_size)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    order = _EpochOrder.of(dataset, block_size, 0, 0, None)
    stop = order.windows
    if max_batches is not None:
        stop = min(stop, max_batches * batch_size)

    def batches() -> Iterator[Batch]:
        for first in range(0, stop, batch_size):
            where = order.locate(first, min(batch_size, stop - first))
            yield _gather(dataset, *where, block_size)

    return batches()


def _check_sizes(dataset: TokenDataset, batch_size: int, block_size: int) -> None:
    for name, value in (("batch_size", batch_size), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dataset.supervised:
        raise ValueError(f"{dataset.folder} holds prompts and responses: use ExampleLoader")
    longest = max(shard.size for shard in dataset.shards)
    if longest < block_size + 1:
        raise ValueError(
            f"the longest {dataset.split} shard in {dataset.folder} has {longest} tokens: "
            f"block_size {block_size} needs {block_size + 1}. Use a smaller block_size or more data"
        )


def _gather(dataset: TokenDataset, shards: _Ints, starts: _Ints, block_size: int) -> Batch:
    rows = np.empty((len(shards), block_size + 1), dtype=np.int64)
    for row, shard, start in zip(rows, shards.tolist(), starts.tolist(), strict=True):
        row[:] = dataset.shards[shard][start : start + block_size + 1]
    vocabulary = dataset.tokenizer.vocab_size
    if rows.size and rows.max() >= vocabulary:
        r, t = (int(i) for i in np.argwhere(rows >= vocabulary)[0])
        raise ShardError(
            f"{dataset.folder / dataset.names[int(shards[r])]}: token {rows[r, t]} at position "
            f"{int(starts[r]) + t} is outside the {dataset.tokenizer.name} vocabulary of "
            f"{vocabulary}: the shard is damaged or of another tokenizer"
        )
    # Two copies rather than two views of one: kernels want rows that begin aligned.
    x, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in (rows[:, :-1], rows[:, 1:]))
    return x, y


@dataclass(frozen=True)
class _EpochOrder:
    """The windows of one epoch: where they are, and in which order."""

    epoch: int
    windows: int
    ends: _Ints  # (shards,): number of windows up to and with each shard
    phase: int
    block_size: int
    keys: list[int] | None  # of the permutation; None is the identity

    @classmethod
    def of(
        cls, dataset: TokenDataset, block_size: int, epoch: int, phase: int, keys: list[int] | None
    ) -> _EpochOrder:
        sizes = np.array([shard.size for shard in dataset.shards], dtype=np.int64)
        ends = np.cumsum(np.maximum((sizes - 1 - phase) // block_size, 0))
        return cls(epoch, int(ends[-1]), ends, phase, block_size, keys)

    def locate(self, position: int, count: int) -> tuple[_Ints, _Ints]:
        """Shard and first token of the windows at ``position`` and on: two of shape (count,)."""
        index = np.arange(position, position + count, dtype=np.int64)
        if self.keys is not None:
            index = _permute(index.astype(np.uint64), self.windows, self.keys).astype(np.int64)
        shard = np.searchsorted(self.ends, index, side="right")
        first = np.concatenate([[0], self.ends])[shard]
        return shard, self.phase + (index - first) * self.block_size


_ROUNDS: Final = 6


def _random_words(seed: int, epoch: int) -> list[int]:
    """A random 64-bit word for the phase and one for each round, from seed and epoch."""
    size = 8 * (_ROUNDS + 1)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=size).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, size, 8)]


def permutation(size: int, seed: int, epoch: int) -> _Ints:
    """The numbers 0 to size - 1 in an order that depends on seed and epoch alone, (size,)."""
    keys = _random_words(seed, epoch)[1:]
    return _permute(np.arange(size, dtype=np.uint64), size, keys).astype(np.int64)


def _permute(index: _Words, size: int, keys: list[int]) -> _Words:
    """Images of ``index`` under a pseudo-random permutation of ``range(size)``.

    A Feistel network is a permutation of the 2^(2h) numbers of 2h bits whatever its round function
    is (Luby and Rackoff, 1988). Numbers that it sends beyond ``size`` are sent again until they
    fall below (cycle walking; Black and Rogaway, 2002): on average fewer than 4 times for large
    ``size``. So any part of the order of 10M windows costs no table of 10M entries, and does not
    depend on the version of a random generator.
    """
    half = np.uint64(max(4, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)

    def network(value: _Words) -> _Words:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
        return (left << half) | right

    image = network(index)
    while (beyond := image >= np.uint64(size)).any():
        image[beyond] = network(image[beyond])
    return image


def _mix(value: _Words) -> _Words:
    """MurmurHash3's 64-bit finaliser: every input bit changes every output bit."""
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))
