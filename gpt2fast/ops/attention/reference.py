"""Attention in plain PyTorch: the specification, differentiated by PyTorch."""

import itertools
import math

import torch
from torch import Tensor

from gpt2fast.ops.random import dropout_mask


def _softmax(
    q: Tensor, k: Tensor, diagonal: int | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The scores of (B, H, T, D), -inf where a key is hidden, and their softmax, 0 there."""
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    scores = (q @ k.transpose(-1, -2)) * scale
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if diagonal is None:
        return scores, torch.softmax(scores, -1)
    queries, keys = scores.shape[-2:]
    i = torch.arange(queries, device=q.device)[:, None]
    hidden = torch.arange(keys, device=q.device) > i + diagonal
    scores = scores.masked_fill(hidden, -math.inf)
    # all-hidden rows are nan in the softmax; their gradient ends at the fill above
    return scores, torch.softmax(scores, -1).masked_fill(hidden, 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    first_batch: int = 0,
) -> Tensor:
    """softmax(scale q k^T) v on (B, T, H, D); query i sees keys j <= i + diagonal (None: all).

    The softmax is fp32 for half-precision inputs. A query that sees no key gives 0. Dropout counts
    batch entries from `first_batch` on.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    _, probabilities = _softmax(q, k, diagonal, scale)
    if seed is not None:
        keep = dropout_mask(seed, tuple(probabilities.shape), dropout_p, first_batch)
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        probabilities = (probabilities * factor).masked_fill(~keep, 0.0)
    return (probabilities.to(v.dtype) @ v).transpose(1, 2)


@torch.no_grad()
def lse_and_probabilities(
    q: Tensor,
    k: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """What :func:`attention` makes on its way, to look at: the log of the sum of exponentials of
    each query's scores, (B, H, Tq), and the probabilities (B, H, Tq, Tk), with a minus where
    dropout drops them; fp32."""
    scores, probabilities = _softmax(
        q.transpose(1, 2).float(), k.transpose(1, 2).float(), diagonal, scale
    )
    if seed is not None:
        keep = dropout_mask(seed, tuple(probabilities.shape), dropout_p, first_batch)
        probabilities = torch.where(keep, probabilities, -probabilities)
    return scores.logsumexp(-1), probabilities


def documents(
    q: Tensor, k: Tensor, q_starts: Tensor, k_starts: Tensor, max_queries: int, max_keys: int
) -> list[tuple[slice, slice]]:
    """Which rows of q and of k each document has. Reads the starts, which waits for a GPU.

    Raises:
        ValueError: the starts do not lead from 0 to the last row, or a document is longer than its
            maximum.
    """
    lists: list[list[slice]] = []
    for name, starts, total, longest in (
        ("q", q_starts, q.shape[0], max_queries),
        ("k", k_starts, k.shape[0], max_keys),
    ):
        bounds = starts.tolist()
        pairs = list(itertools.pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairs):
            raise ValueError(
                f"cu_seqlens_{name} must rise from 0 to {total}, the rows of {name}, got {bounds}"
            )
        if any(b - a > longest for a, b in pairs):
            raise ValueError(
                f"max_seqlen_{name} is {longest}, but a document has {max(b - a for a, b in pairs)}"
            )
        lists.append([slice(a, b) for a, b in pairs])
    return list(zip(*lists, strict=True))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """:func:`attention` on every document of (total, H, D); causal counts from a document's end."""
    parts = []
    for b, (queries, keys) in enumerate(documents(q, k, q_starts, k_starts, max_queries, max_keys)):
        diagonal = (keys.stop - keys.start) - (queries.stop - queries.start) if causal else None
        here = (q[queries].unsqueeze(0), k[keys].unsqueeze(0), v[keys].unsqueeze(0))
        parts.append(attention(*here, diagonal, scale, dropout_p, seed, b)[0])
    # The sum ties k and v into the graph where there is no document.
    return torch.cat(parts) if parts else q.clone() + 0 * (k.sum() + v.sum())
