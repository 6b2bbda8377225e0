"""Attention as torch.library ops and the autograd Functions on them. Tensors are (B, T, H, D)."""

import math
from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import load, native
from gpt2fast.ops.registry import call, once_differentiable, register


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with contiguous D: itself wherever its strides allow."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _scale(scale: float | None, q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return load("attention", backend).forward(
        _rows(q), _rows(k), _rows(v), diagonal, _scale(scale, q), dropout_p, seed
    )


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((2, batch, heads, queries), dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    load("attention", backend).backward(
        *(_rows(t) for t in (dout, q, k, v, out)),
        lse,
        dq,
        dk,
        dv,
        diagonal,
        _scale(scale, q),
        dropout_p,
        seed,
    )
    return dq, dk, dv


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    load("attention", backend).backward(
        _rows(dout),
        *_rows(qkv).unbind(2),
        out,
        lse,
        *dqkv.unbind(2),
        diagonal,
        _scale(scale, qkv),
        dropout_p,
        seed,
    )
    return dqkv


def _fake_packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    diagonal: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _varlen_forward(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    return load("attention", backend).varlen_forward(
        _rows(q),
        _rows(k),
        _rows(v),
        q_starts,
        k_starts,
        max_queries,
        max_keys,
        causal,
        _scale(scale, q),
        dropout_p,
        seed,
    )


def _fake_varlen_forward(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    total, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((2, heads, total), dtype=torch.float32)


def _varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    load("attention", backend).varlen_backward(
        *(_rows(t) for t in (dout, q, k, v, out)),
        lse,
        dq,
        dk,
        dv,
        q_starts,
        k_starts,
        max_queries,
        max_keys,
        causal,
        _scale(scale, q),
        dropout_p,
        seed,
    )
    return dq, dk, dv


def _fake_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_OPTIONS = "SymInt? diagonal, float? scale, float dropout_p, Tensor? seed, str backend"
attention_forward = register(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    in_cpp=True,
)
attention_backward = register(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    in_cpp=True,
)
attention_packed_backward = register(
    f"attention_packed_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS})"
    " -> Tensor",
    _packed_backward,
    _fake_packed_backward,
    in_cpp=True,
)

_VARLEN_OPTIONS = (
    "Tensor q_starts, Tensor k_starts, SymInt max_queries, SymInt max_keys, bool causal,"
    " float? scale, float dropout_p, Tensor? seed, str backend"
)
attention_varlen_forward = register(
    f"attention_varlen_forward(Tensor q, Tensor k, Tensor v, {_VARLEN_OPTIONS})"
    " -> (Tensor, Tensor)",
    _varlen_forward,
    _fake_varlen_forward,
)
attention_varlen_backward = register(
    "attention_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_VARLEN_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _varlen_backward,
    _fake_varlen_backward,
)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        diagonal: int | None,
        scale: float | None,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        out, lse = call(attention_forward, q, k, v, diagonal, scale, dropout_p, seed, backend)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.options = (diagonal, scale, dropout_p, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, seed = ctx.saved_tensors
        diagonal, scale, dropout_p, backend = ctx.options
        grads = call(
            attention_backward, dout, q, k, v, out, lse, diagonal, scale, dropout_p, seed, backend
        )
        needed = (
            g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)
        )
        return (*needed, None, None, None, None, None)


class PackedAttention(torch.autograd.Function):
    """`qkv` is (B, T, 3, H, D) and so is its gradient: no split, no concatenation."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        diagonal: int | None,
        scale: float | None,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        options = (diagonal, scale, dropout_p, seed, backend)
        kernels = native()
        found = None if kernels is None else kernels.attention_packed_forward(qkv, *options)
        if found is None:
            found = call(attention_forward, *qkv.unbind(2), *options)
        out, lse = found
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.options = (diagonal, scale, dropout_p, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, seed = ctx.saved_tensors
        diagonal, scale, dropout_p, backend = ctx.options
        dqkv = call(
            attention_packed_backward,
            dout,
            qkv,
            out,
            lse,
            diagonal,
            scale,
            dropout_p,
            seed,
            backend,
        )
        return dqkv, None, None, None, None, None


class VarlenAttention(torch.autograd.Function):
    """Documents in one row of (total, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
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
        backend: str,
    ) -> Tensor:
        longest = (max_queries, max_keys)
        options = (causal, scale, dropout_p, seed, backend)
        out, lse = call(attention_varlen_forward, q, k, v, q_starts, k_starts, *longest, *options)
        ctx.save_for_backward(q, k, v, out, lse, q_starts, k_starts, seed)
        ctx.options = (*longest, causal, scale, dropout_p, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, q_starts, k_starts, seed = ctx.saved_tensors
        *options, backend = ctx.options
        grads = call(
            attention_varlen_backward,
            dout,
            q,
            k,
            v,
            out,
            lse,
            q_starts,
            k_starts,
            *options,
            seed,
            backend,
        )
        needed = (
            g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)
        )
        return (*needed, *(None,) * 9)
