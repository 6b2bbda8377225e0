"""Documents of many files and formats, processes, formats of shards, and going on after kill -9."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import random
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2fast.cli import main
from gpt2fast.data import (
    ByteTokenizer,
    DownloadError,
    Manifest,
    ShardError,
    TokenDataset,
    prepare,
    read_shard,
    write_shard,
)
from gpt2fast.data.documents import json_lines, text_chunks, text_parts
from gpt2fast.data.encoding import Piece, encode_in_order
from gpt2fast.data.tokenizers import CharTokenizer, Gpt2Tokenizer, tokenizer_from_json

ROOT = Path(__file__).resolve().parents[2]
MODULE = importlib.import_module("gpt2fast.data.prepare")
WORDS = ("die", "Grüße", "", "spät,", "\n\n", "not", "12", "34", "never\t日本", "語", "🙂")
WORDS += ("<|endoftext|>", "it's")


def texts(count: int, seed: int = 1, longest: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, longest))) for _ in range(count)]


def jsonl(documents: list[str], **more: Any) -> bytes:
    lines = [json.dumps({"id": i, "text": d, **more}) for i, d in enumerate(documents)]
    return ("\n".join(lines) + "\n\n").encode()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def stream_of(folder: Path, *splits: str) -> list[int]:
    """Tokens of the splits, shard after shard as the manifest has them."""
    manifest = Manifest.load(folder)
    tokens: list[int] = []
    for shard in manifest.shards:
        if shard.split in splits:
            tokens += read_shard(folder / shard.file, manifest.shard_format).tolist()
    return tokens


def expected(documents: list[str], tokenizer: Any) -> list[int]:
    """End-of-text and the document, for each that is not empty."""
    tokens: list[int] = []
    for document in documents:
        if document:
            tokens += [tokenizer.eot_token, *tokenizer.encode(document).tolist()]
    return tokens


OPENERS: dict[str, Any] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    "": bytes,
}


@pytest.mark.parametrize("end", [*OPENERS, ".zst"])
def test_jsonl_compressed_or_not(tmp_path: Path, gpt2: Gpt2Tokenizer, end: str) -> None:
    documents = texts(200)
    path = tmp_path / f"my data.jsonl{end}"
    if end == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(jsonl(documents)) // 2  # two frames, as parallel compressors make them
        parts = jsonl(documents)[:half], jsonl(documents)[half:]
        path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))
    else:
        path.write_bytes(OPENERS[end](jsonl(documents)))
    manifest = prepare(str(path), tmp_path / "d", shard_tokens=250)
    assert manifest.shards[0].file == "my-data_val_000000.bin"
    assert [shard.file for shard in manifest.shards[1:3]] == [
        "my-data_train_000001.bin", "my-data_train_000002.bin",
    ]  # fmt: skip
    assert {shard.tokens for shard in manifest.shards[:-1]} == {250}
    assert stream_of(tmp_path / "d", "val", "train") == expected(documents, gpt2)
    assert manifest.source.documents == sum(map(bool, documents))
    assert manifest.source.characters == sum(map(len, documents))
    for split in ("val", "train"):
        TokenDataset(tmp_path / "d", split).verify()  # type: ignore[arg-type]
    if end:
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"damaged or cut short|not JSON"):
            prepare(str(path), tmp_path / "e", shard_tokens=10**6)
        assert not (tmp_path / "e").exists()


def test_parquet(tmp_path: Path, gpt2: Gpt2Tokenizer) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    documents = texts(2500, longest=8)
    rows = pyarrow.table({"content": [d or None for d in documents], "n": range(2500)})
    (tmp_path / "in").mkdir()
    parquet.write_table(rows.slice(0, 1300), tmp_path / "in" / "a.parquet", row_group_size=500)
    parquet.write_table(rows.slice(1300), tmp_path / "in" / "b.parquet")
    prepare(str(tmp_path / "in"), tmp_path / "d", shard_tokens=2000, text_field="content")
    assert stream_of(tmp_path / "d", "val", "train") == expected(documents, gpt2)
    for field, told in (("text", "no column 'text', only content, n"), ("n", "holds int")):
        with pytest.raises(ValueError, match=told):
            prepare(str(tmp_path / "in"), tmp_path / "e", shard_tokens=10**6, text_field=field)
    (tmp_path / "in" / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"c\.parquet"):
        prepare(str(tmp_path / "in"), tmp_path / "e", text_field="content")


def test_a_folder_of_all_sorts_and_a_share(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "b").mkdir(parents=True)
    (root / "a.txt").write_text("first document")
    (root / "b" / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(texts(300))))
    (root / "c.md.xz").write_bytes(lzma.compress(b"\xef\xbb\xbflast document"))
    (root / "d.png").write_bytes(b"\xff\xfe")
    manifest = prepare(str(root), tmp_path / "d", tokenizer="byte")
    share = manifest.tokens["val"] / sum(manifest.tokens.values())
    assert 0.08 < share < 0.12
    coder = ByteTokenizer()
    found = [
        document
        for split in ("train", "val")
        for document in documents_of(stream_of(tmp_path / "d", split), coder)
    ]
    wanted = ["first document", "last document", *filter(None, texts(300))]
    assert sorted(found) == sorted(wanted)
    chars = prepare(str(root), tmp_path / "e", tokenizer="char")
    assert chars.tokenizer["chars"] == "".join(sorted(set("".join(wanted))))


def documents_of(tokens: list[int], coder: ByteTokenizer) -> list[str]:
    starts = [i for i, token in enumerate(tokens) if token == coder.eot_token]
    assert starts[0] == 0
    ends = [*starts[1:], len(tokens)]
    return [coder.decode(tokens[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.usefixtures("gpt2")
def test_a_large_text_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(texts(300)) + " " * 5000 + "x" * 3000 + "\r\n Ende 🙂"
    (tmp_path / "t.txt").write_bytes(text.encode())
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    monkeypatch.setattr("gpt2fast.data.documents._CHUNK_BYTES", 997)
    monkeypatch.setattr(MODULE, "_TASK_CHARACTERS", 400)
    assert "".join(text_chunks(tmp_path / "t.txt")) == text
    cut = int(0.9 * len(text))
    coder = Gpt2Tokenizer()
    for name in ("t.txt", "t.txt.gz"):
        out = tmp_path / f"out{name}"
        prepare(str(tmp_path / name), out, shard_tokens=1500)
        assert stream_of(out, "train") == coder.encode(text[:cut]).tolist()
        assert stream_of(out, "val") == coder.encode(text[cut:]).tolist()
    (tmp_path / "t.txt").write_bytes(text.encode() + b"abc\xe9")
    with pytest.raises(ValueError, match=rf"not UTF-8 at byte {len(text.encode()) + 3}"):
        list(text_chunks(tmp_path / "t.txt"))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_parts_of_chunks_encode_like_the_whole(gpt2: Gpt2Tokenizer, size: int) -> None:
    text = "".join(texts(40, seed=size))
    for coder in (gpt2, ByteTokenizer(), CharTokenizer.from_text(text)):
        chunks = [text[i : i + 13] for i in range(0, len(text), 13)]
        parts = list(text_parts(coder, chunks, size))
        assert "".join(parts) == text
        found = np.concatenate([coder.encode(part) for part in parts])
        np.testing.assert_array_equal(found, coder.encode(text))


def test_lines_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2fast.data.documents._CHUNK_BYTES", 5)
    (tmp_path / "x.jsonl").write_bytes(b"abc\n\n  \ndefghijklmno\r\np")
    assert list(json_lines(tmp_path / "x.jsonl")) == [
        (1, b"abc"), (4, b"defghijklmno\r"), (5, b"p"),
    ]  # fmt: skip


@pytest.mark.usefixtures("gpt2")
@pytest.mark.parametrize("processes", [False, True])
def test_workers_keep_the_order(processes: bool) -> None:
    documents = texts(400)
    lines = jsonl(documents).split(b"\n")[:400]
    pieces = [Piece("all", line, True, f"line {i}") for i, line in enumerate(lines)]

    def encoded(pieces: list[Piece], workers: int = 3) -> Iterator[Any]:
        return encode_in_order(
            Gpt2Tokenizer(), pieces, workers=workers, processes=processes, task_size=500
        )

    found = list(encoded(pieces))
    assert [piece for piece, _, _ in found] == pieces
    tokens = [token for _, ids, _ in found for token in ids.tolist()]
    assert tokens == expected(documents, Gpt2Tokenizer())
    pieces[250] = Piece("all", b'{"txt": 1}', True, "x.jsonl, line 251")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 251: no field 'text', only txt"):
        list(encoded(pieces))


def test_a_worker_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def killed(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(subprocess, "Popen", killed)
    pieces = [Piece("all", "x")]
    with pytest.raises(RuntimeError, match="a tokenising process ended with -9"):
        list(encode_in_order(ByteTokenizer(), pieces, workers=2, processes=True, task_size=9))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("3", "no field 'text', int: --text-field"),
        ('{"txt": "a", "n": 1}', "no field 'text', only txt, n: --text-field"),
        ('{"text": 3}', "'text' holds int, not text"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n' + line)
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 3: {told}"):
        prepare(str(path), tmp_path / "d", tokenizer="byte")
    assert not (tmp_path / "d").exists()


def test_odd_texts(tmp_path: Path, gpt2: Gpt2Tokenizer) -> None:
    """Half a surrogate pair is legal JSON; null and "" are no documents."""
    lines = [r'{"text": "a\ud83d b"}', '{"text": null}', '{"text": ""}', '{"text": "c"}'] * 3
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    manifest = prepare(str(path), tmp_path / "d", shard_tokens=7, val_fraction=0.3)
    assert manifest.source.documents == 6
    text = gpt2.decode(stream_of(tmp_path / "d", "train", "val"))
    assert text.count("<|endoftext|>") == 6
    assert text.count("a\ufffd b") == 3


@pytest.mark.parametrize("shard_format", ["llm.c", "npy", "raw"])
def test_formats(tmp_path: Path, shard_format: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(texts(100)))
    out = tmp_path / "d"
    manifest = prepare(
        str(path), out, tokenizer="byte", shard_tokens=1000, shard_format=shard_format
    )
    wanted = expected(texts(100), ByteTokenizer())
    assert stream_of(out, "val", "train") == wanted
    first = out / manifest.shards[0].file
    if shard_format == "npy":
        assert first.suffix == ".npy"
        assert np.load(first).tolist() == wanted[:1000]
    elif shard_format == "raw":
        assert np.fromfile(first, "<u2").tolist() == wanted[:1000]
    else:
        assert np.fromfile(first, "<u2", offset=1024).tolist() == wanted[:1000]
    data = TokenDataset(out, "train")
    assert [t for shard in data.shards for t in shard.tolist()] == wanted[1000:]
    data.verify()
    assert prepare(
        str(path), out, tokenizer="byte", shard_tokens=800, shard_format="npy", overwrite=True
    ).shard_format == "npy"  # fmt: skip
    assert {p.suffix for p in out.iterdir()} == {".json", ".npy"}


def test_foreign_folders(tmp_path: Path) -> None:
    """What build-nanogpt's, nanoGPT's and llm.c's scripts leave."""
    tokens = np.arange(500, dtype=np.uint16)
    (tmp_path / "edu").mkdir()
    for name in ("edufineweb_val_000000", "edufineweb_train_000001", "edufineweb_train_000002"):
        np.save(tmp_path / "edu" / name, tokens)
    assert TokenDataset(tmp_path / "edu", "train").tokens == 1000
    (tmp_path / "nano").mkdir()
    for split in ("train", "val"):
        tokens.tofile(tmp_path / "nano" / f"{split}.bin")
    assert TokenDataset(tmp_path / "nano", "val").shards[0].tolist() == tokens.tolist()
    write_shard(tmp_path / "nano" / "val.bin", tokens[:9])  # llm.c's by its header
    assert TokenDataset(tmp_path / "nano", "val").tokens == 9
    (tmp_path / "nano" / "meta.pkl").touch()
    with pytest.raises(ShardError, match=r"meta\.pkl, a pickle"):
        TokenDataset(tmp_path / "nano", "train")
    bad = tmp_path / "edu" / "edufineweb_val_000000.npy"
    for damaged, told in (
        (bad.read_bytes()[:-3], "truncated"),
        (b"", "truncated"),
        (npy(tokens.astype(np.int32)), r"int32 of shape \(500,\): uint16"),
        (npy(tokens[:0]), "empty"),
    ):
        bad.write_bytes(damaged)
        with pytest.raises(ShardError, match=told):
            TokenDataset(tmp_path / "edu", "val")
    (tmp_path / "nano" / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ShardError, match="3 bytes"):
        read_shard(tmp_path / "nano" / "odd.bin", "raw")


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class StandIn:
    """What `datasets.load_dataset(..., streaming=True)` returns."""

    def __init__(self, rows: list[dict[str, Any]], start: int = 0, fail_at: int | None = None):
        self.rows, self.start, self.fail_at = rows, start, fail_at

    def skip(self, count: int) -> "StandIn":
        return StandIn(self.rows, self.start + count, self.fail_at)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.start, len(self.rows)):
            if i == self.fail_at:
                raise ConnectionError("the line is dead")
            yield self.rows[i]


def test_hub(tmp_path: Path, gpt2: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text, "id": i} for i, text in enumerate(texts(300))]
    module, asked = types.ModuleType("datasets"), []
    state: dict[str, Any] = {"fail_at": 200}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> StandIn:
        asked.append((name, config, split, streaming))
        return StandIn(rows, fail_at=state["fail_at"])

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    out = tmp_path / "d"
    monkeypatch.setattr(MODULE, "_TASK_CHARACTERS", 300)
    with pytest.raises(DownloadError, match=r"the line is dead.*the same command goes on"):
        prepare("fineweb-edu", out, shard_tokens=1000, workers=1)
    assert (out / "fineweb-edu_val_000000.bin").exists()
    state["fail_at"] = None
    manifest = prepare("fineweb-edu", out, shard_tokens=1000, workers=2)
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)] * 2
    assert stream_of(out, "val", "train") == expected(texts(300), gpt2)
    assert manifest.source.documents == sum(map(bool, texts(300)))
    assert manifest.source.characters == sum(map(len, texts(300)))
    prepare("a/b", tmp_path / "e", val_fraction=0.2, dataset_config="c", dataset_split="s")
    assert asked[-1] == ("a/b", "c", "s", True)
    with pytest.raises(ValueError, match="no column 'txt', only text, id"):
        prepare("a/b", tmp_path / "f", text_field="txt")
    with pytest.raises(ValueError, match=r"in shard 0.*--val-fraction"):
        prepare("a/b", tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_hub_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = ["prepare", "fineweb-edu", "--out", str(tmp_path / "d"), "--tokenizer", "byte"]
    assert main(words) == 1
    told = capsys.readouterr().err
    for part in ("gpt2fast[datasets]", "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
                 "prepare FOLDER"):  # fmt: skip
        assert part in told
    assert not (tmp_path / "d").exists()


SLOW = """
import sys, time
from gpt2fast.data import shards
from gpt2fast.data.prepare import prepare
import importlib
importlib.import_module("gpt2fast.data.prepare")._TASK_CHARACTERS = 2000
write = shards._write_shard
def slow(*arguments):
    time.sleep(0.02)
    found = write(*arguments)
    time.sleep(0.02)
    return found
shards._write_shard = slow
print("go", flush=True)
prepare(sys.argv[1], sys.argv[2], tokenizer="byte", shard_tokens=3000, workers=2,
        val_fraction=float(sys.argv[3]) or None)
"""


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_kill_9_loses_and_doubles_nothing(tmp_path: Path, val_fraction: float) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(texts(1200))))
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(path)]
    subprocess.run([*command, str(whole), str(val_fraction)], cwd=ROOT, check=True)
    assert len(Manifest.load(whole).shards) > 20
    draw, kills, most = random.Random(7), 0, 0
    while not (out / "manifest.json").exists():
        process = subprocess.Popen(
            [*command, str(out), str(val_fraction)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(draw.uniform(0.05, 0.6))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        told = process.communicate()[1]
        assert process.returncode in (0, -9), told.decode()
        if out.exists():
            present = len(list(out.glob("*.bin")))
            assert present >= most - 1  # one that was whole when the marker did not know it yet
            most = max(most, present)
        assert kills < 60, "no headway"
    assert kills >= 3
    assert contents(out) == contents(whole)


def partly(folder: Path, path: Path, **changes: Any) -> Any:
    """A preparation that ends in the middle of the text, and its arguments."""
    arguments = {"source": str(path), "out": folder, "tokenizer": "byte", "shard_tokens": 500,
                 "workers": 1} | changes  # fmt: skip
    stopped = 0

    def until(*_: Any) -> None:
        nonlocal stopped
        stopped += 1
        if stopped == 30:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        from gpt2fast.data.shards import DatasetWriter

        write = DatasetWriter.write
        patch.setattr(DatasetWriter, "write", lambda *a, **k: (until(), write(*a, **k)))
        with pytest.raises(KeyboardInterrupt):
            prepare(**arguments)
    assert (folder / "manifest.partial.json").exists()
    return arguments


def test_going_on_needs_the_same_question(tmp_path: Path) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "d"
    path.write_bytes(jsonl(texts(100)))
    arguments = partly(out, path)
    before = contents(out)
    with pytest.raises(FileExistsError, match="with another shard_tokens: pass --overwrite"):
        prepare(**(arguments | {"shard_tokens": 400}))
    path.write_bytes(jsonl(texts(101)))
    with pytest.raises(FileExistsError, match="with another files"):
        prepare(**arguments)
    path.write_bytes(jsonl(texts(100)))
    with pytest.raises(ShardError, match="give the same command again"):
        TokenDataset(out, "train")
    shard = out / "x_train_000002.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=r"truncated.*--overwrite"):
        prepare(**arguments)
    shard.write_bytes(whole)
    assert contents(out) == before
    (out / ".x_train_000009.bin.77.tmp").write_bytes(b"half")
    (out / "x_train_000009.bin").write_bytes(b"whole, but the marker does not know it")
    (out / "notes.txt").write_text("mine")
    prepare(**arguments)
    straight = prepare(**(arguments | {"out": tmp_path / "e"}))
    assert Manifest.load(out) == straight
    (out / "notes.txt").unlink()
    assert contents(out) == contents(tmp_path / "e")
    assert tokenizer_from_json(straight.tokenizer) == ByteTokenizer()


def test_overwriting_an_interrupted_one_begins_anew(tmp_path: Path) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "d"
    path.write_bytes(jsonl(texts(100)))
    arguments = partly(out, path)
    prepare(**(arguments | {"overwrite": True, "shard_tokens": 700}))
    straight = tmp_path / "e"
    prepare(**(arguments | {"out": straight, "shard_tokens": 700}))
    assert contents(out) == contents(straight)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(texts(100), body="other"))
    out = tmp_path / "d"
    words = ["prepare", str(path), "--out", str(out), "--tokenizer", "byte", "--format", "npy"]
    assert main([*words, "--shard-tokens", "400", "--text-field", "body"]) == 0
    assert "100 documents, 500 characters" in capsys.readouterr().out
    assert main(["prepare", "nowhere", "--out", str(tmp_path / "e")]) == 1
    assert "a file or folder that exists" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """Killed with -9, the main process takes its workers with it."""
    code = (
        "from gpt2fast.data.encoding import *; from gpt2fast.data import ByteTokenizer\n"
        "pieces = (Piece('all', 'x' * 50) for _ in iter(int, 1))\n"
        "for i, _ in enumerate(encode_in_order(ByteTokenizer(), pieces, workers=2,\n"
        "                                      processes=True, task_size=100)):\n"
        "    if i == 200: print('go', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    found = [int(pid) for file in children for pid in file.read_text().split()]
    assert len(found) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in found):
            return
        time.sleep(0.1)
    pytest.fail(f"{found} still run")
