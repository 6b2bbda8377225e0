"""The bigram model: the loss that a table of neighbouring tokens reaches, for comparison.

    p(b | a) = (n(a, b) + alpha p(b)) / (n(a) + alpha),    p(b) = (n(b) + 1) / (N + V)

with the counts n of the training tokens: a Dirichlet prior around the unigram distribution (MacKay
and Peto, 1995), which is add-one smoothed. The weight alpha is the best of a few powers of ten for
the text that is scored: a choice in the baseline's favour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2fast.data import TokenDataset

__all__ = ["Bigram"]

Ints = npt.NDArray[np.int64]

ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0)


class Bigram:
    """Counts of neighbouring tokens.

    Args:
        tokens: arrays of token ids, shape (n,); pairs do not cross from one to the next.
        vocab_size: V.

    Raises:
        ValueError: a token outside of the vocabulary, or no tokens.

    >>> import numpy as np
    >>> Bigram([np.array([0, 1, 0, 1, 0])], vocab_size=2).vocab_size
    2
    """

    def __init__(self, tokens: Iterable[npt.NDArray[np.integer[Any]]], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        unigrams = np.zeros(vocab_size, dtype=np.int64)
        self._first = np.zeros(vocab_size, dtype=np.int64)
        pairs, counts = [], []
        for part in tokens:
            ids = np.asarray(part, dtype=np.int64)
            if ids.size and ids.max() >= vocab_size:
                raise ValueError(f"token {ids.max()} is outside the vocabulary of {vocab_size}")
            unigrams += np.bincount(ids, minlength=vocab_size)
            self._first += np.bincount(ids[:-1], minlength=vocab_size)
            found = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
            pairs.append(found[0])
            counts.append(found[1])
        if not pairs:
            raise ValueError("a bigram model is counted on at least one array of tokens")
        self._pairs, where = np.unique(np.concatenate(pairs), return_inverse=True)
        self._counts = np.bincount(where, weights=np.concatenate(counts)).astype(np.int64)
        self._unigram = (unigrams + 1) / (unigrams.sum() + vocab_size)

    @classmethod
    def count(cls, dataset: TokenDataset, max_tokens: int = 20_000_000) -> Bigram:
        """Counted on the first `max_tokens` of a data set (20 M: some seconds, 500 MB)."""
        parts, left = [], max_tokens
        for shard in dataset.shards:
            if left > 0:
                parts.append(shard[:left])
                left -= shard.size
        return cls(parts, dataset.tokenizer.vocab_size)

    def probabilities(self, previous: Ints, following: Ints, alpha: float) -> npt.NDArray[Any]:
        """p(following | previous), elementwise, float64."""
        key = previous * self.vocab_size + following
        at = np.minimum(np.searchsorted(self._pairs, key), len(self._pairs) - 1)
        seen = np.where(self._pairs[at] == key, self._counts[at], 0)
        return (seen + alpha * self._unigram[following]) / (self._first[previous] + alpha)

    def loss(self, batches: Iterable[tuple[Any, Any]]) -> float:
        """Mean negative log-likelihood in nats a token over (x, y) of `sequential_batches`."""
        pairs = [(np.asarray(x).ravel(), np.asarray(y).ravel()) for x, y in batches]
        previous, following = (np.concatenate(side) for side in zip(*pairs, strict=True))
        return min(
            float(-np.log(self.probabilities(previous, following, alpha)).mean())
            for alpha in ALPHAS
        )
