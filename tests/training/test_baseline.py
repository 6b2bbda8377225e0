"""The bigram model against counting by hand."""

import math

import numpy as np
import pytest
import torch

from gpt2fast.training.baseline import ALPHAS, Bigram


def test_probabilities_by_hand() -> None:
    bigram = Bigram([np.array([0, 1, 0, 1, 2]), np.array([1, 1])], vocab_size=4)
    # unigram counts 2, 4, 1, 0 of 7; pairs 01: 2, 10: 1, 12: 1, 11: 1; none over the border
    unigram = np.array([3, 5, 2, 1]) / 11
    for alpha in (0.5, 2.0):
        table = np.array([[0, 2, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], float)
        table = (table + alpha * unigram) / (table.sum(1, keepdims=True) + alpha)
        a, b = np.divmod(np.arange(16), 4)
        np.testing.assert_allclose(bigram.probabilities(a, b, alpha), table.ravel())
        np.testing.assert_allclose(table.sum(1), 1)


def test_loss_is_the_mean_over_all_targets_with_the_best_alpha() -> None:
    draw = np.random.default_rng(0)
    train, val = draw.integers(0, 5, 1000), draw.integers(0, 5, 65)
    bigram = Bigram([train.astype(np.uint16)], 5)
    x, y = torch.from_numpy(val[:-1].copy()), torch.from_numpy(val[1:].copy())
    batches = [(x[:40].view(4, 10), y[:40].view(4, 10)), (x[40:].view(1, 24), y[40:].view(1, 24))]
    losses = [-np.log(bigram.probabilities(val[:-1], val[1:], a)).mean() for a in ALPHAS]
    assert bigram.loss(batches) == pytest.approx(min(losses))
    assert bigram.loss(batches) == pytest.approx(math.log(5), abs=0.05)  # uniform text


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Bigram([], 5)
