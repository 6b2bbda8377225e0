"""One switch for runs that repeat to the bit: seeds, and PyTorch's deterministic algorithms."""

from __future__ import annotations

import os
import random
from types import TracebackType

import numpy as np
import torch

__all__ = ["Deterministic"]


class Deterministic:
    """Within the block every random generator begins at `seed`, and an operation of PyTorch that
    has no deterministic form raises an error. Afterwards PyTorch's setting is what it was.

    On a GPU cuBLAS needs CUBLAS_WORKSPACE_CONFIG, which is set here unless it is already: it has an
    effect before the first matrix product of the process.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._before = (False, False)

    def __enter__(self) -> None:
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)  # noqa: NPY002 - others may draw from the global one
        torch.manual_seed(self._seed)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        enabled, warn_only = self._before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
