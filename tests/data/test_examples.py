"""Prompts and responses: what lies on disk, which targets count, packing, and the loader's state."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2fast.data import BatchLoader, ByteTokenizer, TokenDataset, prepare
from gpt2fast.data.batches import ExampleLoader, batches_in_order, make_loader
from gpt2fast.data.examples import IGNORE, encode_example, split_example
from gpt2fast.training import TrainConfig, start_run

EOT = 256
PAIRS = [{"prompt": "ab" * (i % 5), "response": chr(97 + i % 26) * (1 + i % 7)} for i in range(60)]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long"},
        {"role": "user", "content": "not answered"},
    ]
}


def prepared(folder: Path, lines: list[Any], **options: Any) -> Path:
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"tokenizer": "byte", "supervised": True, "progress": False, **options}
    prepare(str(source), folder / "data", **options)
    return folder / "data"


def text(ids: Any) -> str:
    return ByteTokenizer().decode([int(i) for i in ids])


def test_a_conversation_and_what_of_it_counts() -> None:
    stored, characters = encode_example(ByteTokenizer(), CHAT, "here")
    ids, counted = split_example(stored)
    whole = (
        "System: Be brief.\n\nUser: Hi\n\nAssistant: Yo<|endoftext|>"
        "\n\nUser: Bye\n\nAssistant: So long<|endoftext|>"
    )
    assert text(ids) == whole
    assert text(ids[counted]) == " Yo<|endoftext|> So long<|endoftext|>"
    assert characters == len(whole) - 2 * len("<|endoftext|>")


@pytest.mark.parametrize("shard_tokens", [10**8, 50])
def test_targets_are_the_responses_and_end_of_text(tmp_path: Path, shard_tokens: int) -> None:
    """Exactly them, each once an epoch, also of examples that cross the border of shards."""
    folder = prepared(tmp_path, PAIRS, shard_tokens=shard_tokens)
    expected = sorted((p["prompt"], p["response"]) for p in PAIRS)
    found = []
    for split in ("train", "val"):
        data = TokenDataset(folder, split)  # type: ignore[arg-type]
        for x, y, borders in batches_in_order(data, 4, 24):
            assert borders is not None
            for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
                assert start // 24 == (end - 1) // 24  # no document crosses a row
                inputs, targets = x.flatten()[start:end], y.flatten()[start:end]
                counted = targets != IGNORE
                if not counted.any():  # padding
                    assert (inputs == EOT).all()
                    continue
                assert torch.equal(inputs[1:][counted[:-1]], targets[:-1][counted[:-1]])
                first = int(counted.nonzero()[0])
                assert counted[first:].all()
                answer = text(targets[counted])
                if first or inputs[0] == ord("a"):
                    prompt = text(inputs[: first + 1])
                    if (prompt, answer.removesuffix("<|endoftext|>")) not in expected:
                        prompt, answer = "", prompt + answer  # an empty prompt: none predicts it
                else:
                    prompt, answer = "", text(inputs[:1]) + answer
                assert answer.endswith("<|endoftext|>")
                found.append((prompt, answer.removesuffix("<|endoftext|>")))
    assert sorted(found) == expected


def test_what_is_longer_than_a_row_keeps_its_end(tmp_path: Path) -> None:
    folder = prepared(tmp_path, [{"prompt": "p" * 50, "response": "xyz"}] * 12)
    ((x, y, _),) = batches_in_order(TokenDataset(folder, "val"), 4, 8)
    assert text(x[0]) == "ppppp" + "xyz"
    assert y[0].tolist() == [IGNORE] * 4 + [*b"xyz", EOT]
    assert make_loader(TokenDataset(folder, "train"), 1, 8).rows.truncated == 11  # type: ignore[attr-defined]


def test_ranks_share_epochs_and_the_state_is_exact(tmp_path: Path) -> None:
    data = TokenDataset(prepared(tmp_path, PAIRS), "train")
    alone = ExampleLoader(data, 4, 24)
    both = [ExampleLoader(data, 2, 24, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(12):
        expected = next(alone)
        parts = [next(loader) for loader in both]
        assert torch.equal(torch.cat([p.x for p in parts]), expected.x)
        assert torch.equal(torch.cat([p.y for p in parts]), expected.y)
        assert both[0].state_dict()["position"] == alone.state_dict()["position"]
    assert alone.epoch >= 1
    state = json.loads(json.dumps(alone.state_dict()))
    rest = [next(alone) for _ in range(5)]
    again = ExampleLoader(data, 4, 24)
    again.load_state_dict(state)
    for batch in rest:
        assert all(torch.equal(*pair) for pair in zip(next(again), batch, strict=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is 1337 in the state and 5 here"):
        ExampleLoader(data, 4, 24, seed=5).load_state_dict(state)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "a", "response": ""}, "line 2: the response is empty"),
        ({"prompt": "a"}, "line 2: prompt and response, or messages, are wanted, got prompt"),
        ([1], "line 2: .*got list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: no message of an assistant"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "line 2: message 0: role"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "line 2: message 0: role"),
        ({"messages": []}, "line 2: prompt and response"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        prepared(tmp_path, [PAIRS[0], line])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="end-of-text: gpt2 or byte"):
        prepared(tmp_path, PAIRS, tokenizer="char")
    with pytest.raises(ValueError, match="are read from JSONL"):
        prepare("stdlib", tmp_path / "x", supervised=True)
    data = TokenDataset(prepared(tmp_path, PAIRS), "train")
    with pytest.raises(ValueError, match="use ExampleLoader"):
        BatchLoader(data, 1, 4)
    assert max(int(shard.max()) for shard in data.shards) == 65535  # others refuse the shard


def test_training_lowers_the_loss_of_responses(tmp_path: Path) -> None:
    """Responses follow from prompts; prompts are noise, of which nothing is learnt."""
    draw = np.random.default_rng(0)
    lines = [
        {"prompt": "".join(draw.choice(list("uvwxyz"), 12)) + c + ":", "response": c.upper() * 3}
        for c in "abcd" * 40
    ]
    folder = prepared(tmp_path, lines)
    config = TrainConfig(
        model="nano", n_layer=1, n_head=2, n_embd=32, data=str(folder), block_size=40, batch_size=8,
        grad_accum=2, max_steps=60, warmup_steps=5, lr=1e-2, eval_interval=0, sample_tokens=0,
        eval_batches=3, threads=1,
    )  # fmt: skip
    result = start_run(config, tmp_path / "run")
    assert result.bigram_loss is None
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] > 5
    assert result.val_loss is not None
    assert result.val_loss < 1  # the prompts' entropy is log 6 a letter
