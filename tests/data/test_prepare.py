"""Preparing: known counts, documents and their splits, the same bytes always, clear refusals."""

import argparse
import hashlib
import importlib
import io
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2fast.cli import prepare as cli
from gpt2fast.data.download import DownloadError
from gpt2fast.data.loader import TokenDataset
from gpt2fast.data.prepare import assign_splits, prepare
from gpt2fast.data.shards import DatasetWriter, Manifest, read_shard
from gpt2fast.data.tokenizers import Gpt2Tokenizer, tokenizer_from_json

# By its full name, as the package exports the function under the same one.
MODULE = importlib.import_module("gpt2fast.data.prepare")


def tokens_of(folder: Path, split: str) -> list[int]:
    files = [s.file for s in Manifest.load(folder).shards if s.split == split]
    return [token for file in files for token in read_shard(folder / file).tolist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Thirty documents in nested folders, some of them odd."""
    root = tmp_path / "corpus"
    for i in range(30):
        path = root / f"part{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((f"Document {i}:\r\n" + "Grüße  \n\n" * (i + 1)).encode())
    (root / "empty.txt").write_bytes(b"")
    (root / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (root / "notes.md").write_text("not a text file")
    return root


@pytest.mark.usefixtures("gpt2")
def test_shakespeare_counts(tmp_path: Path, shakespeare: Path) -> None:
    manifest = prepare("shakespeare", tmp_path / "d", input=shakespeare, progress=False)
    assert manifest.tokens == {"train": 301_966, "val": 36_059}
    assert manifest.source.characters == 1_115_394
    # The validation part decodes to the last tenth of the characters.
    text = shakespeare.read_text()
    tail = Gpt2Tokenizer().decode(tokens_of(tmp_path / "d", "val"))
    assert tail == text[int(0.9 * len(text)) :]


def test_shakespeare_by_characters(tmp_path: Path, shakespeare: Path) -> None:
    manifest = prepare("shakespeare", tmp_path / "d", input=shakespeare, tokenizer="char")
    tokenizer = tokenizer_from_json(manifest.tokenizer)
    assert tokenizer.vocab_size == 65
    assert manifest.tokens == {"train": 1_003_854, "val": 111_540}
    assert tokenizer.decode(tokens_of(tmp_path / "d", "train")[:14]) == "First Citizen:"


@pytest.mark.usefixtures("gpt2")
def test_same_bytes_whatever_the_workers(tmp_path: Path, shakespeare: Path, corpus: Path) -> None:
    for source, path in (("shakespeare", shakespeare), ("text", corpus)):
        folders: list[Path] = []
        for workers in (1, 2, 2, 5):
            folders.append(tmp_path / f"{source}{len(folders)}")
            prepare(
                source,  # type: ignore[arg-type]
                folders[-1],
                input=path,
                shard_tokens=1000,
                workers=workers,
            )
        first, *others = map(contents, folders)
        assert len(first) > 2
        assert all(other == first for other in others)


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte", "char"])
def test_documents(tmp_path: Path, corpus: Path, gpt2: Gpt2Tokenizer, tokenizer: str) -> None:
    manifest = prepare("text", tmp_path / "d", input=corpus, tokenizer=tokenizer)
    coder = tokenizer_from_json(manifest.tokenizer)
    assert manifest.source.documents == 31
    documents = {}
    for path in sorted(corpus.rglob("*.txt"), key=lambda p: p.relative_to(corpus).as_posix()):
        if text := path.read_bytes().decode("utf-8-sig"):
            documents[text] = path
    # Every document is whole in exactly one split, in the order of the paths.
    prefix = "" if tokenizer == "char" else "<|endoftext|>"
    found: list[str] = []
    for split in ("train", "val"):
        tokens = tokens_of(tmp_path / "d", split)
        text = coder.decode(tokens)
        parts = [document for document in documents if prefix + document in text]
        parts.sort(key=text.index)
        assert "".join(prefix + part for part in parts) == text
        order = [documents[part].relative_to(corpus).as_posix() for part in parts]
        assert order == sorted(order)
        if coder.eot_token is not None:
            assert tokens[0] == coder.eot_token
            assert tokens.count(coder.eot_token) == len(parts)
        found += parts
    assert sorted(found) == sorted(documents)


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=200), st.floats(0.01, 0.99))
def test_assigned_share(sizes: list[int], val_fraction: float) -> None:
    splits = assign_splits(sizes, val_fraction)
    assert set(splits) == {"train", "val"}
    val = sum(size for size, split in zip(sizes, splits, strict=True) if split == "val")
    assert abs(val - val_fraction * sum(sizes)) <= max(sizes)


def test_assignment_is_spread() -> None:
    splits = assign_splits([100] * 1000, 0.1)
    val = np.flatnonzero([split == "val" for split in splits])
    assert len(val) == 100
    assert np.diff(val).max() <= 11
    with pytest.raises(ValueError, match="at least 2"):
        assign_splits([1], 0.1)


@pytest.mark.usefixtures("gpt2")
def test_stdlib(tmp_path: Path) -> None:
    manifest = prepare("stdlib", tmp_path / "d", max_bytes=1_000_000, tokenizer="byte")
    again = prepare("stdlib", tmp_path / "e", max_bytes=1_000_000, tokenizer="byte", workers=1)
    assert again == manifest
    total = sum(manifest.tokens.values())
    assert 800_000 < total <= 1_000_000 + manifest.source.documents
    assert 0.07 < manifest.tokens["val"] / total < 0.13
    text = tokenizer_from_json(manifest.tokenizer).decode(tokens_of(tmp_path / "d", "train"))
    assert "class ArgumentParser" in text


@pytest.mark.usefixtures("gpt2")
def test_single_file_in_a_folder_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("0123456789" * 10)
    manifest = prepare("text", tmp_path / "d", input=tmp_path / "in", val_fraction=0.25)
    assert manifest.source.documents == 1
    assert Gpt2Tokenizer().decode(tokens_of(tmp_path / "d", "train")) == "0123456789" * 7 + "01234"


@pytest.mark.parametrize("name", ["a.txt", "b.txt"])
def test_undecodable_byte_is_named(tmp_path: Path, name: str) -> None:
    for file in ("a.txt", "b.txt"):
        (tmp_path / file).write_bytes(b"plain text " * 10)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfcaf\xe9 au lait")
    with pytest.raises(ValueError, match=rf"{name}: not UTF-8 at byte 6: invalid"):
        prepare("text", tmp_path / "d", input=tmp_path, tokenizer="byte")
    assert not (tmp_path / "d").exists()


def test_another_shakespeare(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text("To be")
    digest = hashlib.sha256(b"To be").hexdigest()
    with pytest.raises(ValueError, match=f"expected sha256 86c4e6aa.*, got {digest}"):
        prepare("shakespeare", tmp_path / "d", input=path)


@pytest.mark.usefixtures("no_network")
def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2FAST_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(DownloadError) as error:
        prepare("shakespeare", tmp_path / "d")
    for part in (
        "Tiny Shakespeare",
        str(tmp_path / "cache"),
        "https://raw.githubusercontent.com/karpathy/char-rnn/",
        "Name or service not known",
        "--input PATH",
    ):
        assert part in str(error.value)


def test_download_is_cached(
    tmp_path: Path, shakespeare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2FAST_CACHE_DIR", str(tmp_path / "cache"))
    calls: list[str] = []

    def serve(url: str, **_: Any) -> io.BytesIO:
        calls.append(url)
        return io.BytesIO(shakespeare.read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    for i in range(2):
        prepare("shakespeare", tmp_path / f"d{i}", tokenizer="byte")
    assert len(calls) == 1
    (tmp_path / "cache" / "tinyshakespeare.txt").write_text("damaged")
    prepare("shakespeare", tmp_path / "d2", tokenizer="byte")
    assert len(calls) == 2
    assert contents(tmp_path / "d0") == contents(tmp_path / "d2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "wiki"}, "unknown source 'wiki': choose shakespeare, text, stdlib"),
        ({"source": "text"}, "--input"),
        ({"source": "text", "input": "missing"}, "no such file or folder"),
        ({"source": "text", "input": "."}, "no text files"),
        ({"source": "text", "input": "empty"}, "no tokens"),
        ({"source": "stdlib", "input": "a"}, "takes no --input"),
        ({"source": "stdlib", "val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"source": "stdlib", "val_fraction": float("nan")}, "val_fraction"),
        ({"source": "stdlib", "workers": 0}, "workers must be at least 1"),
        ({"source": "stdlib", "max_bytes": 3}, "within max_bytes=3"),
        ({"source": "stdlib", "shard_tokens": 0}, "shard_tokens"),
        ({"source": "text", "input": "short", "tokenizer": "bpe"}, "unknown tokenizer"),
        ({"source": "text", "input": "short", "val_fraction": 0.99}, "train split has no tokens"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("short").write_text("abc")
    with pytest.raises((ValueError, OSError), match=message):
        prepare(**({"out": "d", "tokenizer": "byte"} | arguments))
    assert not Path("d").exists()


def test_output_is_protected_before_any_work(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"
    first = prepare("text", out, input=corpus, tokenizer="byte")
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "_find_corpus", lambda *_: pytest.fail("worked"))
        with pytest.raises(FileExistsError, match="--overwrite"):
            prepare("text", out, input=corpus, tokenizer="byte")
    # A mistake in the new arguments costs nothing of the old data.
    with pytest.raises(FileNotFoundError):
        prepare("text", out, input=tmp_path / "missing", overwrite=True)
    assert contents(out) == before
    assert prepare("text", out, input=corpus, tokenizer="byte", overwrite=True) == first
    assert contents(out) == before


def test_interrupt_stops_the_workers(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DatasetWriter, "write", interrupt)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        prepare("text", tmp_path / "d", input=corpus, tokenizer="byte", workers=4)
    assert threading.active_count() == threads
    assert not (tmp_path / "d").exists()


def run_cli(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    return cli.run(parser.parse_args(arguments))


def test_cli(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my data"
    code = run_cli("text", "--input", str(corpus), "--tokenizer", "byte", "--out", str(out))
    printed = capsys.readouterr()
    assert code == 0
    train, val = (TokenDataset(out, split).tokens for split in ("train", "val"))
    assert f"{train:,} tokens in 1 shard\n" in printed.out
    assert f"{val:,} tokens" in printed.out
    assert "31 documents" in printed.out
    assert f"gpt2fast train --data '{out}'" in printed.out
    assert printed.err == ""  # no progress bar where there is no terminal
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_cli("text", "--input", str(corpus), "--out", str(out))
    assert not run_cli(
        "text", "--input", str(corpus), "--tokenizer", "char", "--val-fraction", "0.3",
        "--shard-tokens", "100", "--workers", "2", "--overwrite", "--out", str(out),
    )  # fmt: skip
    assert len(Manifest.load(out).shards) > 10


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("some text to learn from " * 50)
    prepare("text", out, input=text, tokenizer="byte", progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"good so far \xff\xfe")
    for bad in ("empty.txt", "binary.txt"):
        with pytest.raises(ValueError, match=r"too small|not UTF-8"):
            prepare(
                "text", out, input=tmp_path / bad, tokenizer="byte", overwrite=True, progress=False
            )
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    text.write_text("another text " * 90)
    manifest = prepare("text", out, input=text, tokenizer="byte", overwrite=True, progress=False)
    assert sum(manifest.tokens.values()) == 13 * 90
    assert {p.name for p in out.iterdir()} == {"manifest.json", *(s.file for s in manifest.shards)}
