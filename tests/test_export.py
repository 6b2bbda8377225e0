"""Exports: llm.c files against bytes packed here, Hugging Face folders against transformers."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT, GPTConfig, llmc
from gpt2fast.cli import main
from gpt2fast.data import Gpt2Tokenizer, prepare
from gpt2fast.data.tokenizers import _packaged_vocabulary, huggingface_vocabulary
from tests.data.conftest import gpt2 as gpt2  # the fixture

SHAPE = GPTConfig(n_layer=2, n_head=3, n_embd=12, vocab_size=131, block_size=10)


def random_model(config: GPTConfig = SHAPE) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model.eval()


def packed(model: GPT, version: int) -> bytes:
    """The file as llm.c's train_gpt2.cu reads it, value by value."""
    c = model.config
    padded = (c.vocab_size + 127) // 128 * 128
    header = [20240326, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded]
    data = struct.pack("<256i", *header, *[0] * 248)

    def put(values: list[float]) -> bytes:
        if version == 3:
            return struct.pack(f"<{len(values)}f", *values)
        halves = b""
        for value in values:  # round to nearest even in the upper half of an fp32
            (bits,) = struct.unpack("<I", struct.pack("<f", value))
            halves += struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
        return halves

    state = {name: t.flatten().tolist() for name, t in model.state_dict().items()}
    wte = state["transformer.wte.weight"][: c.vocab_size * c.n_embd]
    data += put(wte + [0.0] * ((padded - c.vocab_size) * c.n_embd))
    data += put(state["transformer.wpe.weight"])
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            for layer in range(c.n_layer):
                data += put(state[f"transformer.h.{layer}.{part}.{kind}"])
    return data + put(state["transformer.ln_f.weight"]) + put(state["transformer.ln_f.bias"])


def same_bits(a: GPT, b: GPT) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8))
        for n in left
    )


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc_file_has_the_bytes_of_the_format(
    tmp_path: Path, version: int, dtype: torch.dtype
) -> None:
    model, path = random_model(), tmp_path / "m.bin"
    llmc.save(model, path, dtype)
    data = path.read_bytes()
    assert data == packed(model, version)
    again = GPT.from_pretrained(path)
    assert same_bits(again, model.to(dtype))
    assert not again.training
    assert again.config == SHAPE
    llmc.save(again, tmp_path / "n.bin", dtype)
    assert (tmp_path / "n.bin").read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "n.bin"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "cut short: 28,959 bytes, its header implies 28,960"),
        (lambda data: data[:1024], "cut short"),
        (lambda data: data[:100], "100 bytes, too short"),
        (lambda data: data + b"x", "too long"),
        (lambda data: b"\0" * 4 + data[4:], "magic number 0, an llm.c GPT-2 has 20240326"),
        (lambda data: data[:4] + struct.pack("<i", 1) + data[8:], "version 1, known are 3"),
        (lambda data: data[:20] + struct.pack("<i", 5) + data[24:], "not divisible by n_head=5"),
        (lambda data: data[:28] + struct.pack("<i", 5) + data[32:], "5 embedding rows"),
    ],
)
def test_damaged_llmc_files_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "m.bin"
    llmc.save(random_model(), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(path)
    assert str(path) in str(error.value)


def test_llmc_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not torch\.float16"):
        llmc.save(random_model(), tmp_path / "m.bin", torch.float16)
    odd = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, layer_norm_epsilon=1e-6)
    with pytest.raises(ValueError, match="layer_norm_epsilon"):
        llmc.save(GPT(odd), tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


def test_vocabulary_is_the_published_one(gpt2: Gpt2Tokenizer) -> None:
    vocabulary, merges = huggingface_vocabulary()
    assert len(vocabulary) == 50257
    assert vocabulary["\u0120Michael"] == 3899
    assert vocabulary["<|endoftext|>"] == 50256
    assert len(merges) == 50000
    assert merges[:2] == [("\u0120", "t"), ("\u0120", "a")]
    published = _packaged_vocabulary()
    if published is not None and published.is_file():
        lines = published.read_text(encoding="utf-8").splitlines()[1:]
        assert lines == [" ".join(pair) for pair in merges]


@pytest.mark.usefixtures("gpt2")
def test_hugging_face_folder_opens_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel

    model = random_model(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=32))
    model.save_pretrained(tmp_path / "in")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "in"), "--out", str(out)]) == 0
    assert "note" not in capsys.readouterr().out
    theirs = GPT2LMHeadModel.from_pretrained(out).eval()
    idx = torch.randint(50257, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "Hello, I am an language model, Michael\n\n  ça 12 <|endoftext|>"
    ours = Gpt2Tokenizer().encode(text[:-13]).tolist()
    assert tokenizer(text).input_ids == [*ours, 50256]
    assert tokenizer.decode(ours) == text[:-13]
    assert tokenizer.model_max_length == 32
    assert GenerationConfig.from_pretrained(out).eos_token_id == 50256
    assert same_bits(GPT.from_pretrained(out), model)


def test_command_and_model_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("ein kleines Kind lief. " * 300)
    data, run = tmp_path / "data", tmp_path / "run"
    prepare("text", data, input=tmp_path / "text.txt", tokenizer="byte", progress=False)
    flags = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"]
    flags += ["--max-steps", "3", "--eval-batches", "1", "--sample-tokens", "0", "--threads", "1"]
    assert main(["train", "--data", str(data), "--out", str(run), *flags]) == 0
    out = tmp_path / "my-model"
    assert main(["export", str(run), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert "no byte tokenizer: gpt2fast_tokenizer.json" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for part in (
        "library_name: transformers", "# my-model", "| layers | 1 |", "| vocabulary | 257 tokens",
        "| steps | 3 |", "| tokens | 192 |", "AdamW", "| validation loss | ", "nats a token",
        f"text: {tmp_path / 'text.txt'}", "6,210 train",
    ):  # fmt: skip
        assert part in card, part
    newest = sorted((run / "checkpoints").iterdir())[-1]
    trained = GPT.from_pretrained(newest).to(torch.bfloat16)
    assert same_bits(GPT.from_pretrained(out), trained)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 256
    assert main(["sample", str(out), "--max-new-tokens", "3"]) == 0

    # To llm.c's and back: the same bits.
    file = tmp_path / "files" / "m.bin"
    assert main(["export", str(out), "--out", str(file)]) == 0
    assert "llm.c version 5 (bfloat16)" in capsys.readouterr().out
    assert main(["export", str(file), "--out", str(tmp_path / "back")]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert same_bits(GPT.from_pretrained(tmp_path / "back"), trained)

    # What is there is kept.
    for words, told in (
        (["--out", str(out)], "--overwrite"),
        (["--out", str(file)], "--overwrite"),
        (["--out", str(run), "--overwrite"], "more than an exported model"),
        (["--out", str(file), "--format", "huggingface"], "a folder is wanted"),
        (["--out", str(out), "--format", "llmc"], "an llm.c file is wanted"),
    ):
        assert main(["export", str(newest), *words]) == 1
        assert told in capsys.readouterr().err
    assert main(["export", str(newest), "--out", str(out), "--overwrite"]) == 0
    assert same_bits(GPT.from_pretrained(out), GPT.from_pretrained(newest))
