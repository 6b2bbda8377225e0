"""Sampling: the cache against no cache, the filters against their definitions."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast.data import ByteTokenizer, CharTokenizer
from gpt2fast.generation import filter_logits, generate, prompt_tokens, stream, window_start
from gpt2fast.model import GPT, GPTConfig

V = 61  # padded to 64
BLOCK = 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products on several threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Weights large enough that the logits differ by some units and depend on the whole window."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=V, block_size=BLOCK))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.transformer.wte.weight[V:].fill_(9.0)  # a pad that would win if it were sampled
    return model


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"generator": 5},
        {"generator": 6, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_cache_changes_nothing(model: GPT, length: int, how: dict[str, Any]) -> None:
    """Also far beyond block_size."""
    idx = prompt(3, length)
    cached = generate(model, idx, 3 * BLOCK, **how)
    assert cached.shape == (3, length + 3 * BLOCK)
    assert torch.equal(cached, generate(model, idx, 3 * BLOCK, use_cache=False, **how))
    assert torch.equal(cached[:, :length], idx)
    assert cached.max() < V


@pytest.mark.parametrize("length", [3, BLOCK + 4])
def test_greedy_is_the_argmax_of_the_window(model: GPT, length: int) -> None:
    """The definition, written out: nothing of generation.py but window_start."""
    row = prompt(1, length)
    wanted = row.clone()
    for _ in range(2 * BLOCK):
        start = window_start(wanted.shape[1], length, BLOCK)
        with torch.no_grad():
            token = model.eval()(wanted[:, start:])[:, -1].argmax(-1)
        wanted = torch.cat([wanted, token[:, None]], 1)
    assert torch.equal(generate(model, row, 2 * BLOCK, temperature=0), wanted)


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("given", [1, 2, 8, 9, 30])
def test_window(block_size: int, given: int) -> None:
    """It holds the newest tokens, never more than block_size, never fewer than half, moves on."""
    starts = [window_start(n, given, block_size) for n in range(given, given + 40)]
    for n, start in enumerate(starts, given):
        assert 1 <= n - start <= block_size
        if n > block_size:
            assert n - start >= max(1, block_size // 2)
    assert starts[0] == max(0, given - block_size)
    assert starts == sorted(starts)
    moves = [b - a for a, b in itertools.pairwise(starts) if b > a]
    assert all(move == block_size + 1 - max(1, block_size // 2) for move in moves)


def test_cache_is_refilled_once_in_half_a_block(model: GPT, monkeypatch: Any) -> None:
    lengths: list[int] = []
    original = GPT.forward_cached

    def noted(self: GPT, idx: Tensor, cache: Any) -> Tensor:
        lengths.append(idx.shape[1])
        return original(self, idx, cache)

    monkeypatch.setattr(GPT, "forward_cached", noted)
    generate(model, prompt(1, 4), 40, generator=1)
    assert [n for n in lengths if n > 1] == [4, 8, 8, 8]


def test_the_seed_decides(model: GPT) -> None:
    idx = prompt(2, 4)
    first = generate(model, idx, 20, generator=3)
    assert torch.equal(first, generate(model, idx, 20, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, generate(model, idx, 20, generator=4))
    torch.manual_seed(8)
    before = torch.get_rng_state()
    generate(model, idx, 5, generator=3)
    assert torch.equal(before, torch.get_rng_state())
    generate(model, idx, 5)
    assert not torch.equal(before, torch.get_rng_state())


def test_frequencies_follow_the_model(model: GPT) -> None:
    """Chi-square of 20,000 draws of one token; the 99.99% bound for 60 degrees is 112."""
    idx = prompt(1, 6).expand(20_000, -1)
    with torch.no_grad():
        wanted = (model.eval()(idx[:1])[0, -1].double() / 2.0).softmax(-1)
    drawn = generate(model, idx, 1, temperature=2.0, generator=1)[:, -1]
    counts = torch.bincount(drawn, minlength=V).double()
    expected = 20_000 * wanted
    assert ((counts - expected) ** 2 / expected).sum() < 112


@pytest.mark.parametrize("k", [1, 3, 60, 61, 100])
def test_top_k_by_definition(k: int) -> None:
    logits = torch.randn(7, V)
    kept = filter_logits(logits, top_k=k)
    for row, filtered in zip(logits, kept, strict=True):
        best = set(sorted(range(V), key=lambda i: -row[i])[:k])
        assert set(filtered.isfinite().nonzero()[:, 0].tolist()) == best
        assert all(filtered[i] == row[i] for i in best)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("k", [None, 10])
def test_top_p_by_definition(p: float, k: int | None) -> None:
    logits = 2 * torch.randn(7, V, dtype=torch.float64)
    kept = filter_logits(logits, top_k=k, top_p=p)
    for row, filtered in zip(logits, kept, strict=True):
        order = sorted(range(V), key=lambda i: -row[i])[:k]
        chances = row[order].softmax(0).tolist()
        fewest = next(
            n for n in range(1, V + 1) if sum(chances[:n]) >= p - 1e-12 or n == len(order)
        )
        assert set(filtered.isfinite().nonzero()[:, 0].tolist()) == set(order[:fewest])


def test_ties_keep_exactly_k() -> None:
    assert filter_logits(torch.zeros(2, V), top_k=4).isfinite().sum(1).tolist() == [4, 4]


def test_no_filter_is_the_same_tensor() -> None:
    logits = torch.randn(2, V)
    assert filter_logits(logits) is logits
    torch.testing.assert_close(filter_logits(logits, top_p=1.0), logits)


def test_extreme_temperatures(model: GPT) -> None:
    idx = prompt(2, 4)
    greedy = generate(model, idx, 20, temperature=0)
    assert torch.equal(generate(model, idx, 20, temperature=1e-30, generator=1), greedy)
    assert generate(model, idx, 20, temperature=1e30, generator=1).max() < V


def test_stop_token_ends_when_all_rows_have(model: GPT) -> None:
    idx = prompt(4, 4)
    free = generate(model, idx, 40, generator=2)[:, 4:]
    stop = int(free[0, 3])
    out = generate(model, idx, 40, generator=2, stop_token=stop)[:, 4:]
    for row, own in zip(free.tolist(), out.tolist(), strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert own[:end] == row[: len(own)][:end]
        assert set(own[end:]) <= {stop}
    assert generate(model, idx[:1], 40, temperature=0, stop_token=int(
        generate(model, idx[:1], 1, temperature=0)[0, -1])).shape == (1, 5)  # fmt: skip


def test_streaming_yields_what_generate_returns(model: GPT) -> None:
    idx = prompt(2, 4)
    steps = stream(model, idx, 9, generator=3)
    assert torch.equal(torch.stack(list(steps), 1), generate(model, idx, 9, generator=3)[:, 4:])
    assert list(stream(model, idx, 0)) == []


def test_the_model_is_as_before(model: GPT) -> None:
    model.train()
    tokens = stream(model, prompt(1, 4), 9)
    next(tokens)
    assert torch.is_grad_enabled()
    tokens.close()  # type: ignore[attr-defined]
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda a: a | {"idx": [[1]]}, TypeError, "idx .*list"),
        (lambda a: a | {"idx": torch.zeros(1, 2)}, TypeError, "idx .*float32"),
        (lambda a: a | {"idx": torch.zeros(3, dtype=torch.int64)}, ValueError, r"idx .*\(3,\)"),
        (lambda a: a | {"idx": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "T >= 1"),
        (lambda a: a | {"idx": torch.tensor([[V]])}, ValueError, "idx .*0 to 60, got 61"),
        (lambda a: a | {"idx": torch.tensor([[-1]])}, ValueError, "idx .*-1"),
        (lambda a: a | {"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        (lambda a: a | {"temperature": -0.1}, ValueError, "temperature"),
        (lambda a: a | {"temperature": float("nan")}, ValueError, "temperature"),
        (lambda a: a | {"top_k": 0}, ValueError, "top_k"),
        (lambda a: a | {"top_p": 0.0}, ValueError, "top_p"),
        (lambda a: a | {"top_p": 1.1}, ValueError, "top_p"),
        (lambda a: a | {"stop_token": V}, ValueError, "stop_token"),
    ],
)
def test_wrong_arguments_at_the_call(
    model: GPT,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    error: type[Exception],
    told: str,
) -> None:
    arguments = change({"idx": torch.tensor([[1, 2]]), "max_new_tokens": 2})
    with pytest.raises(error, match=told):
        stream(model, **arguments)


def test_prompts() -> None:
    byte, char = ByteTokenizer(), CharTokenizer("\nab")
    assert prompt_tokens(byte, "é").tolist() == [[0xC3, 0xA9]]
    assert prompt_tokens(byte, "").tolist() == [[256]]
    assert prompt_tokens(char, "").tolist() == [[0]]
    with pytest.raises(ValueError, match="'c'"):
        prompt_tokens(char, "abc")
