"""The public attention functions."""

import torch
from torch import Tensor

from gpt2fast.backends import choose, native
from gpt2fast.ops.attention import autograd, reference
from gpt2fast.ops.checks import (
    autocast,
    check_dropout,
    check_floating,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    distinct,
    dropout_seed,
)
from gpt2fast.ops.registry import apply, call, enter


def _checked(
    tensors: dict[str, Tensor], shape: str, heads_axis: int, time_axis: int, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in autocast's dtype where it is on, and each a tensor of its own."""
    for name, tensor in tensors.items():
        check_floating(name, tensor)
    q, k, v = distinct(*autocast(*tensors.values()))
    tensors = dict(zip(tensors, (q, k, v), strict=True))
    q_name, k_name, v_name = tensors
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions {shape}, got shape {tuple(tensor.shape)}"
            )
        check_same_dtype(name, tensor, q_name, q)
        check_same_device(name, tensor, q_name, q)
    if q.shape[-1] == 0:
        raise ValueError(f"{q_name} must have a head size D of at least one, got {tuple(q.shape)}")
    for axis, letter in ((0, "B"), (heads_axis, "H"), (3, "D")):
        if k.shape[axis] != q.shape[axis]:
            raise ValueError(
                f"{k_name} must have {q_name}'s {letter} = {q.shape[axis]} in {shape},"
                f" got shape {tuple(k.shape)}"
            )
    check_shape(v_name, v, tuple(k.shape), f"that of {k_name}")
    check_dropout(dropout_p)
    return q, k, v


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    seed = dropout_seed(dropout_p, q.device)
    backend = choose(q, "attention")
    if backend == "reference":
        return reference.attention(q, k, v, diagonal, scale, dropout_p, seed)
    options = (diagonal, scale, dropout_p, seed, backend)
    if torch.is_grad_enabled():
        return apply(autograd.Attention, q, k, v, *options)
    # Without the Function a decoding step takes a third less time.
    return call(autograd.attention_forward, q, k, v, *options)[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale query key^T) value, as torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: (B, H, Tq, D), float32, bfloat16 or float16. Any strides; read in place where D is
            contiguous.
        key, value: (B, H, Tk, D), of query's dtype and device.
        dropout_p: probability with which an attention probability is set to 0; the others are
            divided by 1 - dropout_p. The mask follows from one number drawn from torch's generator.
        is_causal: query i sees keys j <= i (counted from the start, as torch does).
        scale: default 1 / sqrt(D).

    Returns:
        (B, H, Tq, D) of query's dtype, a view of (B, Tq, H, D) memory. 0 where there is no key.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; kernel: Dao et al. 2022,
    https://arxiv.org/abs/2205.14135.

    >>> query = torch.zeros(1, 1, 2, 3)  # all scores are equal: the mean of the values seen
    >>> value = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).repeat(1, 1, 1, 2)[..., :3]
    >>> gpt2fast.functional.scaled_dot_product_attention(query, query, value, is_causal=True)
    tensor([[[[1., 2., 1.],
              [2., 3., 2.]]]])
    """
    kernels = native()
    if kernels is not None and (
        way := kernels.attention_way(query, key, value, scale, dropout_p, True)
    ):
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        options = (0 if is_causal else None, scale, 0.0, None, "cpu")
        return enter(way, autograd.Attention, q, k, v, *options).transpose(1, 2)
    check_number("scale", scale, optional=True)
    query, key, value = _checked(
        {"query": query, "key": key, "value": value}, "(B, H, T, D)", 1, 2, dropout_p
    )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return _attention(q, k, v, 0 if is_causal else None, scale, dropout_p).transpose(1, 2)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q k^T) v in flash-attn's layout and meaning.

    Args:
        q: (B, Tq, H, D), float32, bfloat16 or float16. Any strides; read in place where D is
            contiguous, so views of a packed qkv or of a key/value cache cost nothing.
        k, v: (B, Tk, H, D), of q's dtype and device, with as many heads as q.
        dropout_p, softmax_scale: as for :func:`scaled_dot_product_attention`.
        causal: query i sees keys j <= i + Tk - Tq (counted from the end, as for decoding with a
            key/value cache). A query that sees no key gives 0.

    Returns:
        (B, Tq, H, D), contiguous, of q's dtype.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    >>> q, k, v = torch.randn(3, 2, 7, 4, 16).unbind()
    >>> y = gpt2fast.functional.flash_attn_func(q, k, v, causal=True)
    >>> y.shape, torch.allclose(y[:, 0], v[:, 0])  # the first query sees the first key only
    (torch.Size([2, 7, 4, 16]), True)
    """
    kernels = native()
    if kernels is not None and (
        way := kernels.attention_way(q, k, v, softmax_scale, dropout_p, False)
    ):
        options = (k.shape[1] - q.shape[1] if causal else None, softmax_scale, 0.0, None, "cpu")
        return enter(way, autograd.Attention, q, k, v, *options)
    check_number("softmax_scale", softmax_scale, optional=True)
    q, k, v = _checked({"q": q, "k": k, "v": v}, "(B, T, H, D)", 2, 1, dropout_p)
    diagonal = k.shape[1] - q.shape[1] if causal else None
    return _attention(q, k, v, diagonal, softmax_scale, dropout_p)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """:func:`flash_attn_func` on a packed qkv, whose gradient comes out packed: no copies.

    Args:
        qkv: (B, T, 3, H, D), usually a view of the (B, T, 3 C) output of the qkv projection.
        dropout_p, softmax_scale, causal: as for :func:`flash_attn_func`.

    Returns:
        (B, T, H, D), contiguous, of qkv's dtype.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    >>> qkv = torch.randn(2, 7, 3 * 64, dtype=torch.bfloat16).view(2, 7, 3, 4, 16)
    >>> y = gpt2fast.functional.flash_attn_qkvpacked_func(qkv, causal=True)
    >>> y.shape, y.dtype
    (torch.Size([2, 7, 4, 16]), torch.bfloat16)
    """
    kernels = native()
    if kernels is not None and (way := kernels.attention_packed_way(qkv, softmax_scale, dropout_p)):
        options = (0 if causal else None, softmax_scale, 0.0, None, "cpu")
        return enter(way, autograd.PackedAttention, qkv, *options)
    check_floating("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(f"qkv must have shape (B, T, 3, H, D), got {tuple(qkv.shape)}")
    check_dropout(dropout_p)
    check_number("softmax_scale", softmax_scale, optional=True)
    (qkv,) = autocast(qkv)  # type: ignore[assignment]
    seed = dropout_seed(dropout_p, qkv.device)
    diagonal = 0 if causal else None
    backend = choose(qkv, "attention")
    if backend == "reference":
        q, k, v = qkv.unbind(2)
        return reference.attention(q, k, v, diagonal, softmax_scale, dropout_p, seed)
    return apply(autograd.PackedAttention, qkv, diagonal, softmax_scale, dropout_p, seed, backend)


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
) -> Tensor:
    """:func:`flash_attn_func` on documents of different length packed into one row, none of which
    sees another.

    Args:
        q: (total queries, H, D), float32, bfloat16 or float16; read in place where D is contiguous.
        k, v: (total keys, H, D), of q's dtype and device, with as many heads as q.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device: document b has rows
            cu_seqlens[b] to cu_seqlens[b + 1]. They rise from 0 to the number of rows; a document
            may be empty. On a GPU their values are not checked, since that would wait for it.
        max_seqlen_q, max_seqlen_k: no document is longer.
        dropout_p, softmax_scale: as for :func:`scaled_dot_product_attention`.
        causal: query i of a document sees its keys j <= i + keys - queries (counted from the end).

    Returns:
        (total queries, H, D), contiguous, of q's dtype. 0 where there is no key.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    >>> q, k, v = torch.randn(3, 5, 4, 16).unbind()
    >>> starts = torch.tensor([0, 2, 5], dtype=torch.int32)  # two documents, of 2 and 3 tokens
    >>> y = gpt2fast.functional.flash_attn_varlen_func(q, k, v, starts, starts, 3, 3)
    >>> second = gpt2fast.functional.flash_attn_func(q[None, 2:], k[None, 2:], v[None, 2:])
    >>> torch.allclose(y[2:], second[0], atol=1e-6)
    True
    """
    tensors = {"q": q, "k": k, "v": v}
    for name, tensor in tensors.items():
        check_floating(name, tensor)
    q, k, v = distinct(*autocast(q, k, v))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have three dimensions (total, H, D), got shape {tuple(tensor.shape)}"
            )
        check_same_dtype(name, tensor, "q", q)
        check_same_device(name, tensor, "q", q)
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head size D of at least one, got {tuple(q.shape)}")
    check_shape("k", k, (k.shape[0], *q.shape[1:]), "heads and head size as q's")
    check_shape("v", v, tuple(k.shape), "that of k")
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, starts)
        if starts.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {starts.dtype}")
        if starts.dim() != 1 or starts.shape[0] == 0:
            raise ValueError(f"{name} must have shape (B + 1,), got {tuple(starts.shape)}")
        check_same_device(name, starts, "q", q)
    check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "that of cu_seqlens_q")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_number(name, longest, whole=True)
        if longest < 0:
            raise ValueError(f"{name} must not be negative, got {longest}")
    check_dropout(dropout_p)
    check_number("softmax_scale", softmax_scale, optional=True)
    both = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    seed = dropout_seed(dropout_p, q.device)
    backend = choose(q, "attention")
    options = (max_seqlen_q, max_seqlen_k, causal, softmax_scale, dropout_p, seed)
    if backend == "reference":
        return reference.varlen_attention(q, k, v, both[0], both[1], *options)
    return apply(autograd.VarlenAttention, q, k, v, *distinct(*both), *options, backend)
