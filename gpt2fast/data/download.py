"""Small files from the network, checked by sha256: the vocabulary, Tiny Shakespeare, HellaSwag."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

__all__ = ["DownloadError", "cache_dir", "download", "fetch", "sha256_of"]

TIMEOUT_SECONDS = 10.0


class DownloadError(RuntimeError):
    """A file could not be fetched, or what came is not the file that was wanted.

    >>> issubclass(DownloadError, RuntimeError)
    True
    """


def cache_dir() -> Path:
    """The folder for downloaded files: $GPT2FAST_CACHE_DIR, or gpt2fast in the user's cache."""
    if own := os.environ.get("GPT2FAST_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpt2fast"


def download(url: str, sha256: str | None, *, timeout: float = TIMEOUT_SECONDS) -> bytes:
    """Fetch ``url`` and return its bytes.

    ``timeout`` (seconds) bounds the connection and every single read, so that a network which
    swallows packets is reported instead of waited for. Proxies are taken from the environment.

    Raises:
        DownloadError: no connection, an HTTP error, or another sha256 than ``sha256`` (None: any).
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data: bytes = response.read()
    except OSError as error:  # URLError, HTTPError, timeouts and TLS failures are all OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DownloadError(f"{url}: {reason}") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise DownloadError(f"{url}: expected sha256 {sha256}, got {found}")
    return data


def fetch(url: str, name: str, sha256: str | None, *, what: str, by_hand: str) -> Path:
    """The file ``name`` in the cache; downloaded if it is not there, or is another file.

    Args:
        url: where it comes from.
        name: its name in `cache_dir`.
        sha256: of the whole file; None where it is not known, then any file is taken.
        what: what it is, for the message.
        by_hand: how the user can pass a file, for the message.

    Raises:
        DownloadError: it could not be fetched; says what was wanted, from where, and what to do.
        OSError: it could not be written.
    """
    path = cache_dir() / name
    if path.exists() and sha256 in (None, sha256_of(path)):
        return path
    try:
        data = download(url, sha256)
    except DownloadError as error:
        raise DownloadError(
            f"{what} is not in {path} and could not be downloaded from {error}. "
            f"Fetch that address on another machine and pass the file: {by_hand}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temp.write_bytes(data)
    temp.replace(path)
    return path


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
