"""Text to tokens, tokens to shards on disk, shards to batches."""

import importlib
from typing import TYPE_CHECKING, Any

from gpt2fast.data.download import DownloadError
from gpt2fast.data.prepare import SOURCES, Source, prepare
from gpt2fast.data.shards import (
    DatasetWriter,
    Manifest,
    ShardError,
    ShardInfo,
    ShardWriter,
    SourceInfo,
    Split,
    read_shard,
    write_shard,
)
from gpt2fast.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    TokenizerUnavailable,
    get_tokenizer,
    tokenizer_from_json,
)

if TYPE_CHECKING:
    from gpt2fast.data.loader import BatchLoader, TokenDataset, sequential_batches

__all__ = [
    "SOURCES",
    "BatchLoader",
    "ByteTokenizer",
    "CharTokenizer",
    "DatasetWriter",
    "DownloadError",
    "Gpt2Tokenizer",
    "Manifest",
    "ShardError",
    "ShardInfo",
    "ShardWriter",
    "Source",
    "SourceInfo",
    "Split",
    "TokenDataset",
    "Tokenizer",
    "TokenizerUnavailable",
    "get_tokenizer",
    "prepare",
    "read_shard",
    "sequential_batches",
    "tokenizer_from_json",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    # Batches are tensors: preparing, and its processes, do without PyTorch.
    if name not in ("BatchLoader", "TokenDataset", "sequential_batches"):
        raise AttributeError(f"module 'gpt2fast.data' has no attribute {name!r}")
    return getattr(importlib.import_module("gpt2fast.data.loader"), name)
