"""Small files from the network, checked by sha256: the vocabulary and Tiny Shakespeare."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

__all__ = ["DownloadError", "cache_dir", "download"]

TIMEOUT_SECONDS = 10.0


class DownloadError(RuntimeError):
    """A file could not be fetched, or what came is not the file that was wanted."""


def cache_dir() -> Path:
    """The folder for downloaded files: $GPT2FAST_CACHE_DIR, or gpt2fast in the user's cache."""
    if own := os.environ.get("GPT2FAST_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpt2fast"


def download(url: str, sha256: str, *, timeout: float = TIMEOUT_SECONDS) -> bytes:
    """Fetch ``url`` and return its bytes.

    ``timeout`` (seconds) bounds the connection and every single read, so that a network which
    swallows packets is reported instead of waited for. Proxies are taken from the environment.

    Raises:
        DownloadError: no connection, an HTTP error, or another sha256 than ``sha256``.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data: bytes = response.read()
    except OSError as error:  # URLError, HTTPError, timeouts and TLS failures are all OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DownloadError(f"{url}: {reason}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DownloadError(f"{url}: expected sha256 {sha256}, got {found}")
    return data
