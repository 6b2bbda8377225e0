"""flash-attn's names: attention, layer norm with residual, cross-entropy, the MLP.

The originals are described at https://github.com/Dao-AILab/flash-attention; the arguments are
theirs, in their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2fast import functional
from gpt2fast.ecosystem._refuse import refuse
from gpt2fast.ops.attention import reference
from gpt2fast.ops.checks import (
    check_dropout,
    check_floating,
    check_number,
    check_shape,
    dropout_seed,
)
from gpt2fast.ops.layer_norm import reference as layer_norm_reference

__all__ = [
    "CrossEntropyLoss",
    "FusedMLP",
    "cross_entropy_loss",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "layer_norm_fn",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """softmax(softmax_scale q k^T) v, see :func:`gpt2fast.functional.flash_attn_func`.

    Args:
        q: (B, Tq, H, D), float32, bfloat16 or float16.
        k, v: (B, Tk, H, D): as many heads as q (no grouped-query attention).
        dropout_p, softmax_scale, causal: supported; causal counts from the end of the keys.
        deterministic: either; the kernels always are.
        return_attn_probs: for tests, as in the original: return the Tq x Tk matrix, too.
        window_size, softcap, alibi_slopes: only their defaults.

    Returns:
        (B, Tq, H, D) of q's dtype. With return_attn_probs a tuple of that and two fp32 tensors without
        gradient, computed in plain PyTorch: the log of the sum of exponentials of each query's
        scores, (B, H, Tq), and the probabilities (B, H, Tq, Tk), with a minus where dropout drops
        them. The original's come with another factor; with documents they are (H, total queries)
        and (documents, H, max_seqlen_q, max_seqlen_k).

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> q = torch.randn(1, 5, 2, 8)
    >>> flash_attn_func(q, q, q, causal=True).shape
    torch.Size([1, 5, 2, 8])
    """
    _refuse_masks("flash_attn_func", window_size, softcap, alibi_slopes)
    return _attend("flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` on qkv (B, T, 3, H, D), whose gradient comes out packed.

    Returns:
        (B, T, H, D) of qkv's dtype.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> flash_attn_qkvpacked_func(torch.randn(1, 5, 3, 2, 8)).shape
    torch.Size([1, 5, 2, 8])
    """
    _refuse_masks("flash_attn_qkvpacked_func", window_size, softcap, alibi_slopes)
    options = (dropout_p, softmax_scale, causal)
    if not return_attn_probs:
        return functional.flash_attn_qkvpacked_func(qkv, *options)
    seed = _coming_seed(dropout_p, qkv.device)
    out = functional.flash_attn_qkvpacked_func(qkv, *options)
    return out, *_seen(qkv[:, :, 0], qkv[:, :, 1], *options, seed)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with keys and values in one kv (B, Tk, 2, H, D).

    Returns:
        (B, Tq, H, D) of q's dtype.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> flash_attn_kvpacked_func(torch.randn(1, 5, 2, 8), torch.randn(1, 7, 2, 2, 8)).shape
    torch.Size([1, 5, 2, 8])
    """
    _refuse_masks("flash_attn_kvpacked_func", window_size, softcap, alibi_slopes)
    check_floating("kv", kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must have shape (B, T, 2, H, D), got {tuple(kv.shape)}")
    options = (dropout_p, softmax_scale, causal, return_attn_probs)
    k, v = kv.unbind(2)
    return _attend("flash_attn_kvpacked_func", q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """:func:`flash_attn_func` on documents packed into one row of (total, H, D), document b from
    cu_seqlens[b] to cu_seqlens[b + 1]; see :func:`gpt2fast.functional.flash_attn_varlen_func`.

    Returns:
        (total queries, H, D) of q's dtype.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> q, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, q, q, starts, starts, 3, 3, causal=True).shape
    torch.Size([5, 2, 8])
    """
    name = "flash_attn_varlen_func"
    _refuse_masks(name, window_size, softcap, alibi_slopes)
    refuse(name, block_table=(block_table, None))
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, return_attn_probs)
    return _attend_documents(name, q, k, v, lengths, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` on qkv (total, 3, H, D).

    Returns:
        (total, H, D) of qkv's dtype.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> qkv, starts = torch.randn(5, 3, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> flash_attn_varlen_qkvpacked_func(qkv, starts, 3, causal=True).shape
    torch.Size([5, 2, 8])
    """
    name = "flash_attn_varlen_qkvpacked_func"
    _refuse_masks(name, window_size, softcap, alibi_slopes)
    check_number("max_seqlen", max_seqlen, whole=True)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, return_attn_probs)
    q, k, v = _unpacked("qkv", qkv, 3)
    return _attend_documents(name, q, k, v, lengths, *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one kv (total keys, 2, H, D).

    Returns:
        (total queries, H, D) of q's dtype.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    >>> q, kv = torch.randn(5, 2, 8), torch.randn(5, 2, 2, 8)
    >>> starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 3, 3).shape
    torch.Size([5, 2, 8])
    """
    name = "flash_attn_varlen_kvpacked_func"
    _refuse_masks(name, window_size, softcap, alibi_slopes)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, return_attn_probs)
    k, v = _unpacked("kv", kv, 2)
    return _attend_documents(name, q, k, v, lengths, *options)


def _attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    causal: bool,
    with_probs: bool,
) -> Any:
    _refuse_grouped(function, q, k)
    options = (dropout_p, scale, causal)
    if not with_probs:
        return functional.flash_attn_func(q, k, v, *options)
    seed = _coming_seed(dropout_p, q.device)
    out = functional.flash_attn_func(q, k, v, *options)
    return out, *_seen(q, k, *options, seed)


def _attend_documents(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    dropout_p: float,
    scale: float | None,
    causal: bool,
    with_probs: bool,
) -> Any:
    _refuse_grouped(function, q, k)
    options = (dropout_p, scale, causal)
    if not with_probs:
        return functional.flash_attn_varlen_func(q, k, v, *lengths, *options)
    seed = _coming_seed(dropout_p, q.device)
    out = functional.flash_attn_varlen_func(q, k, v, *lengths, *options)
    documents = reference.documents(q, k, *lengths)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    shape = (len(documents), q.shape[1], *lengths[2:])
    probabilities = q.new_zeros(shape, dtype=torch.float32)
    for b, (queries, keys) in enumerate(documents):
        here, whole = _seen(q[None, queries], k[None, keys], *options, seed, b)
        lse[:, queries] = here[0]
        probabilities[b, :, : whole.shape[2], : whole.shape[3]] = whole[0]
    return out, lse, probabilities


def _coming_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed that the next call draws."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return dropout_seed(dropout_p, device)


def _seen(
    q: Tensor,
    k: Tensor,
    dropout_p: float,
    scale: float | None,
    causal: bool,
    seed: Tensor | None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    diagonal = k.shape[1] - q.shape[1] if causal else None
    return reference.lse_and_probabilities(q, k, diagonal, scale, dropout_p, seed, first_batch)


def _refuse_grouped(function: str, q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        check_floating(name, tensor)
    if q.dim() == k.dim() > 2 and q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"k with {k.shape[-2]} heads for q's {q.shape[-2]} is not supported by gpt2fast's"
            f" {function}, only as many heads as q has are"
        )


def _unpacked(name: str, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
    check_floating(name, packed)
    if packed.dim() != 4 or packed.shape[1] != parts:
        raise ValueError(
            f"{name} must have shape (total, {parts}, H, D), got {tuple(packed.shape)}"
        )
    return packed.unbind(1)


def _refuse_masks(
    function: str, window_size: Any, softcap: float, alibi_slopes: Tensor | None
) -> None:
    refuse(
        function,
        window_size=(window_size, (-1, -1)),
        softcap=(softcap, 0.0),
        alibi_slopes=(alibi_slopes, None),
    )


def _integers(name: str, value: int | Tensor | None, batch: int, missing: int) -> list[int]:
    if value is None:
        return [missing] * batch
    if isinstance(value, int):
        return [value] * batch
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an int or an integer tensor, got {type(value).__name__}")
    check_shape(name, value, (batch,), "the batch size of q")
    return value.tolist()


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Attention of new queries over a key/value cache, which takes in the new keys and values.

    Without gradients. Lengths in tensors are read by the host, which on a GPU waits for it; where
    they differ in the batch, each sequence is a call of the kernel.

    Args:
        q: (B, Tq, H, D), float32, bfloat16 or float16.
        k_cache, v_cache: (B_cache, T_cache, H, D). Written in place where k and v are given.
        k, v: (B, T_new, H, D) or None: put behind the first `cache_seqlens` positions.
        cache_seqlens: int or (B,) integers: how much of the cache is filled. None: all of it,
            or, with k and v, nothing.
        cache_batch_idx: (B,) integers: the row of the cache for each row of q; None: the same.
        cache_leftpad: (B,) integers: where in the cache each sequence begins; None: at 0.
        softmax_scale: default 1 / sqrt(D).
        causal: the last query sees all keys, the one before all but the last, and so on.
        num_splits: any; a hint that has no meaning here.
        rotary_cos, rotary_sin, block_table, window_size, softcap, alibi_slopes,
        return_softmax_lse: only their defaults. rotary_interleaved: without rotary it means nothing.

    Returns:
        (B, Tq, H, D) of q's dtype.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    Source: :func:`gpt2fast.functional.flash_attn_func`; the original, flash_attn_interface.py.

    >>> cache = torch.zeros(2, 1, 16, 4, 8)
    >>> q, k, v = torch.randn(3, 1, 1, 4, 8)
    >>> flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=3, causal=True).shape
    torch.Size([1, 1, 4, 8])
    """
    name = "flash_attn_with_kvcache"
    _refuse_masks(name, window_size, softcap, alibi_slopes)
    refuse(
        name,
        rotary_cos=(rotary_cos, None),
        rotary_sin=(rotary_sin, None),
        block_table=(block_table, None),
        return_softmax_lse=(return_softmax_lse, False),
    )
    for what, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_floating(what, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{what} must have shape (B, T, H, D), got {tuple(tensor.shape)}")
    check_shape("v_cache", v_cache, tuple(k_cache.shape), "that of k_cache")
    _refuse_grouped(name, q, k_cache)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    batch, capacity = q.shape[0], k_cache.shape[1]
    new = 0
    if k is not None and v is not None:
        check_floating("k", k)
        if k.dim() != 4:
            raise ValueError(f"k must have shape (B, T, H, D), got {tuple(k.shape)}")
        new = k.shape[1]
        check_shape("k", k, (batch, new, *k_cache.shape[2:]), "q's batch, k_cache's H and D")
        check_shape("v", v, tuple(k.shape), "that of k")
    filled = _integers("cache_seqlens", cache_seqlens, batch, capacity if k is None else 0)
    begins = _integers("cache_leftpad", cache_leftpad, batch, 0)
    rows = list(range(batch))
    if cache_batch_idx is not None:
        rows = _integers("cache_batch_idx", cache_batch_idx, batch, 0)
    if max(rows, default=0) >= k_cache.shape[0] or min(rows, default=0) < 0:
        raise ValueError(
            f"k_cache has {k_cache.shape[0]} rows, too few for q's batch of {batch}"
            if cache_batch_idx is None
            else f"cache_batch_idx must be between 0 and {k_cache.shape[0] - 1}, got {rows}"
        )
    for length, begin in zip(filled, begins, strict=True):
        if not 0 <= length <= capacity - new:
            raise ValueError(
                f"cache_seqlens must be between 0 and {capacity - new} ({capacity} positions in"
                f" k_cache, {new} new), got {length}"
            )
        if not 0 <= begin <= length + new:
            raise ValueError(
                f"cache_leftpad must be between 0 and the {length + new} positions that are"
                f" filled, got {begin}"
            )
    alike = len(set(filled)) <= 1 and len(set(begins)) <= 1 and rows == list(range(batch))
    if alike and batch:
        parts = [(slice(0, batch), slice(0, batch), filled[0], begins[0])]
    else:
        parts = [
            (slice(i, i + 1), slice(row, row + 1), filled[i], begins[i])
            for i, row in enumerate(rows)
        ]
    out = []
    for here, there, length, begin in parts:
        end = length + new
        if k is not None and v is not None:
            k_cache[there, length:end] = k[here]
            v_cache[there, length:end] = v[here]
        out.append(
            functional.flash_attn_func(
                q[here],
                k_cache[there, begin:end],
                v_cache[there, begin:end],
                softmax_scale=softmax_scale,
                causal=causal,
            )
        )
    return out[0] if len(out) == 1 else torch.cat(out) if out else torch.empty_like(q)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Layer norm of s = dropout(rowscale x) + residual; with `prenorm` also s.

    Dropout, the addition and the norm are one pass over memory; rowscale and a residual in another
    dtype than x take a pass each.

    Args:
        x: (..., C), float32, bfloat16 or float16.
        weight, bias: (C,); bias may be None.
        residual: of x's shape, or None. s has its dtype.
        eps: added to the variance.
        dropout_p: drawn from torch's generator, other numbers than flash-attn's.
        rowscale: x's shape without the last dimension: a factor of each row of x.
        prenorm: return s too, for the next residual.
        residual_in_fp32: where there is no residual yet, s is fp32.
        zero_centered_weight: weight + 1 is the weight.
        return_dropout_mask: for tests, as in the original: return the mask, too, which is computed
            once more in plain PyTorch.
        out_dtype: of y; default x's.
        x1, weight1, bias1, is_rms_norm, out, residual_out: only their defaults.

    Returns:
        y of x's shape and dtype (or out_dtype), or (y, s). With return_dropout_mask two more: a bool
        tensor of x's shape, True where x is kept, or None without dropout; and None, for x1.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    Source: :func:`gpt2fast.functional.add_layer_norm`; the original, ops/triton/layer_norm.py.

    >>> x = torch.randn(2, 5, 8)
    >>> y, s = layer_norm_fn(x, torch.ones(8), None, residual=x, prenorm=True)
    """
    refuse(
        "layer_norm_fn",
        x1=(x1, None),
        weight1=(weight1, None),
        bias1=(bias1, None),
        is_rms_norm=(is_rms_norm, False),
        out=(out, None),
        residual_out=(residual_out, None),
    )
    check_floating("x", x)
    wanted = x.dtype if out_dtype is None else out_dtype
    if not isinstance(wanted, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype or None, got {out_dtype!r}")
    check_dropout(dropout_p)
    if rowscale is not None:
        check_shape("rowscale", rowscale, tuple(x.shape[:-1]), "x's without its last dimension")
        x = x * rowscale.unsqueeze(-1).to(x.dtype)
    if zero_centered_weight:
        weight = weight + 1
    if residual is None and residual_in_fp32:
        x = x.float()
    if residual is None and dropout_p:
        residual = x.new_zeros(x.shape[-1]).expand_as(x)  # one row, read again and again
    seed = _coming_seed(dropout_p, x.device) if return_dropout_mask else None
    if residual is None:
        total, y = x, functional.layer_norm(x, weight, bias, eps)
    else:
        total, y = functional.add_layer_norm(x, residual, weight, bias, eps, dropout_p)
        total = total.to(residual.dtype)
    y = y.to(wanted)
    results = (y, total) if prenorm else (y,)
    if return_dropout_mask:
        mask = None if seed is None else layer_norm_reference.kept(x.shape, dropout_p, seed)
        return *results, mask, None
    return results if prenorm else y


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row, z-loss included, and the z-loss by itself.

    Args:
        logits: (N, V), float32, bfloat16 or float16.
        labels: (N,) class indices, or `ignore_index`: loss 0.
        label_smoothing: between 0 and 1.
        logit_scale: factor of the logits, applied in fp32; other than 1 it costs a copy of them.
        lse_square_scale: weight of lse^2.
        inplace_backward: the gradient overwrites the logits, if they are the result of an operation.
            A leaf that requires gradients, or a view of one, stays as it is.
        precomputed_lse, process_group: only None.

    Returns:
        (losses, z_losses): (N,) in fp32; z_losses carry no gradient.

    Raises:
        TypeError, ValueError: a wrong or unsupported argument, named.

    Source: :func:`gpt2fast.functional.cross_entropy`; the original, losses/cross_entropy.py.

    >>> losses, z = cross_entropy_loss(torch.randn(4, 9), torch.tensor([1, 2, -100, 8]))
    """
    refuse(
        "cross_entropy_loss",
        precomputed_lse=(precomputed_lse, None),
        process_group=(process_group, None),
    )
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, V), got {tuple(logits.shape)}")
    check_shape("labels", labels, tuple(logits.shape[:1]), "logits' rows")
    check_number("logit_scale", logit_scale)
    check_number("lse_square_scale", lse_square_scale)
    base = logits if logits._base is None else logits._base
    if logit_scale != 1.0:  # in fp32, as the original: rounding to half precision is the loss's
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    losses = functional.cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        reduction="none",
        inplace_backward=inplace_backward and not (base.is_leaf and base.requires_grad),
    )
    return losses, z_losses(logits, labels, ignore_index, lse_square_scale)


@torch.no_grad()
def z_losses(logits: Tensor, labels: Tensor, ignore_index: int, scale: float) -> Tensor:
    """scale * lse^2 of each row of logits (N, V); 0 where labels (N,) are ignored."""
    if scale == 0.0:
        return torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
    kept = labels != ignore_index
    index = torch.where(kept, labels, 0).long()
    losses = functional.cross_entropy(logits.detach(), index, reduction="none")
    lse = losses + logits.detach().gather(1, index[:, None])[:, 0].to(losses.dtype)
    return torch.where(kept, scale * lse.square(), 0.0)


class CrossEntropyLoss(nn.Module):
    """flash-attn's module on :func:`cross_entropy_loss`.

    Takes logits (N, V) of float32, bfloat16 or float16 and targets (N,), int64.

    Args:
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward: as there.
        reduction: "mean" over the targets that are not ignored, "sum" or "none".
        process_group: only None.
        return_z_loss: return (loss, z_loss), both reduced.

    Raises:
        ValueError: a wrong or unsupported argument, named.

    >>> CrossEntropyLoss(reduction="sum")(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(2.7726)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        refuse("CrossEntropyLoss", process_group=(process_group, None))
        if reduction not in ("mean", "none", "sum"):
            raise ValueError(f'reduction must be "mean", "none" or "sum", got {reduction!r}')
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input (N, V), target (N,) -> the loss, or (loss, z_loss)."""
        pair = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
        )
        loss, z_loss = (reduce(part, target, self.ignore_index, self.reduction) for part in pair)
        return (loss, z_loss) if self.return_z_loss else loss


def reduce(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """losses (N,) as they are, their sum, or their mean over the targets that are not ignored."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


class FusedMLP(nn.Module):
    """flash-attn's fc2(gelu(fc1(x))), on :func:`gpt2fast.functional.gelu_mlp`.

    Args:
        in_features: C.
        hidden_features: default 4 C. out_features: default C.
        bias1, bias2: whether fc1 and fc2 have a bias.
        activation: only "gelu_approx", the tanh form.
        return_residual: forward returns (y, x).
        checkpoint_lvl: 0, 1 or 2; the activation is always computed again in backward, as at 1.
        heuristic: any; a hint to cuBLAS that has no meaning here.
        device, dtype: of the parameters.

    Raises:
        ValueError: a wrong or unsupported argument, named.

    >>> FusedMLP(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: str | int = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse("FusedMLP", activation=(activation, "gelu_approx"))
        if checkpoint_lvl not in (0, 1, 2):
            raise ValueError(f"checkpoint_lvl must be 0, 1 or 2, got {checkpoint_lvl}")
        check_number("in_features", in_features, whole=True)
        check_number("hidden_features", hidden_features, whole=True, optional=True)
        check_number("out_features", out_features, whole=True, optional=True)
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: Any = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., C) -> (..., out_features), or that and x."""
        refuse("FusedMLP", process_group=(process_group, None))
        check_floating("x", x)
        if x.dim() < 1 or x.shape[-1] != self.fc1.in_features:
            raise ValueError(
                f"x must have shape (..., {self.fc1.in_features}), got {tuple(x.shape)}"
            )
        y = functional.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return (y, x) if self.return_residual else y
