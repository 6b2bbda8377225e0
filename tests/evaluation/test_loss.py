"""The loss on shards against plain cross-entropy over the same windows."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2fast import GPT, GPTConfig
from gpt2fast.cli import main
from gpt2fast.data import ByteTokenizer, CharTokenizer, DatasetWriter, SourceInfo, TokenDataset
from gpt2fast.data.tokenizers import Tokenizer
from gpt2fast.decoding import pack
from gpt2fast.evaluation import evaluate_loss


def data_of(folder: Path, tokenizer: Tokenizer) -> Path:
    tokens = np.random.default_rng(1).integers(tokenizer.vocab_size, size=500)
    with DatasetWriter(folder, "x", tokenizer=tokenizer, shard_tokens=200) as writer:
        writer.write("train", tokens)
        writer.write("val", tokens)
        writer.finish(SourceInfo(kind="test", location="here", documents=1, characters=1))
    return folder


def tiny(vocab_size: int = 257) -> GPT:
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=vocab_size, block_size=16))


def test_equals_plain_cross_entropy(tmp_path: Path) -> None:
    dataset = TokenDataset(data_of(tmp_path, ByteTokenizer()), "val")
    model = tiny()
    losses = []
    for shard in dataset.shards:
        tokens = torch.from_numpy(shard.astype(np.int64))
        for start in range(0, len(tokens) - 10, 10):
            row = tokens[start : start + 11]
            with torch.no_grad():
                losses.append(F.cross_entropy(model(row[None, :-1])[0], row[1:]).item())
    for batch_size in (1, 7, 100):
        found = evaluate_loss(model, dataset, batch_size=batch_size, block_size=10)
        assert found.tokens == 10 * len(losses)
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert evaluate_loss(model, dataset, batch_size=2, max_batches=3).tokens == 6 * 16
    assert model.training
    with pytest.raises(ValueError, match="block_size=17 is more than the model's 16"):
        evaluate_loss(model, dataset, block_size=17)
    with pytest.raises(ValueError, match="vocab_size=99"):
        evaluate_loss(tiny(99), dataset)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(tmp_path / "data", ByteTokenizer())
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "gpt2fast_tokenizer.json").write_text('{"name": "byte"}')
    words = ["eval", "loss", str(tmp_path / "model"), "--threads", "1"]
    file = tmp_path / "r.json"
    assert main([*words, "--data", str(data), "--json", str(file)]) == 0
    expected = evaluate_loss(model, TokenDataset(data, "val"))
    assert f"loss        {expected.loss:.4f} nats" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert (result["loss"], result["tokens"]) == (expected.loss, expected.tokens)
    other = data_of(tmp_path / "other", CharTokenizer("".join(map(chr, range(257)))))
    assert main([*words, "--data", str(other)]) == 1
    assert "prepared with the char tokenizer, the model has byte" in capsys.readouterr().err
    assert main([*words, "--data", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_command_with_int8_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both losses and their change; the same loss as of a model with the rounded weights."""
    data, out = data_of(tmp_path / "data", ByteTokenizer()), tmp_path / "out.json"
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "gpt2fast_tokenizer.json").write_text('{"name": "byte"}')
    words = ["eval", "loss", str(tmp_path / "model"), "--data", str(data), "--json", str(out)]
    assert main([*words, "--weights", "int8"]) == 0
    found = json.loads(out.read_text())
    assert found["change"] == found["loss_with_weights"] - found["loss"] != 0
    assert f"{found['change']:+.5f}" in capsys.readouterr().out
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "wpe" not in name:
                parameter.copy_(pack(parameter, "int8").dequantize())
    rounded = evaluate_loss(model, TokenDataset(data, "val")).loss
    assert abs(found["loss_with_weights"] - rounded) < abs(found["change"]) / 20
    assert main([*words, "--weights", "int8", "--dtype", "bfloat16"]) == 1
