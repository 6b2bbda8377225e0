"""Causal attention from packed qkv at the shape of GPT-2 124M (12 heads of 64)."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import (
    DTYPE,
    DTYPE_NAME,
    GPU,
    OURS,
    REHEARSAL,
    Case,
    cases,
    compiled,
    ours,
    pick,
    randn,
)
from gpt2fast.functional import flash_attn_func, flash_attn_qkvpacked_func

HEADS, SIZE = 12, 64
SHAPES = pick(
    ((4, 64), (4, 256), (1, 1024)),
    ((64, 1024), (32, 2048), (16, 4096), (8, 8192)),
    ((1, 16),),
)
#: torch's own kernels by name; the first is the base of the ratios.
PEERS = {"torch eager": SDPBackend.FLASH_ATTENTION, "torch math": SDPBackend.MATH}
if GPU:
    PEERS = {"torch eager": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}
    PEERS["torch efficient"] = SDPBackend.EFFICIENT_ATTENTION
if REHEARSAL:
    PEERS = {"torch eager": SDPBackend.MATH}


def sdpa(qkv: Tensor, backend: SDPBackend) -> Tensor:
    """What nanoGPT does: split heads, scaled_dot_product_attention, heads back into the width."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return y.transpose(1, 2).contiguous()


def sdpa_plain(qkv: Tensor) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return y.transpose(1, 2).contiguous()


def case(batch: int, length: int) -> Case:
    size = DTYPE.itemsize * batch * length * HEADS * SIZE
    flops = 2 * batch * HEADS * SIZE * length * (length + 1)  # the causal half of QK and PV
    return Case(
        "attention",
        f"B{batch} T{length} H{HEADS} D{SIZE} {DTYPE_NAME}",
        {"qkv": randn(batch, length, 3, HEADS, SIZE)},
        {
            **{name: partial(sdpa, backend=backend) for name, backend in PEERS.items()},
            "torch.compile": compiled(sdpa_plain),
            **ours(partial(flash_attn_qkvpacked_func, causal=True)),
        },
        forward=(4 * size, flops),
        backward=(8 * size, 2.5 * flops),
    )


def decode_eager(query: Tensor, cache: Tensor) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query, *cache.unbind(2)))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def decode_ours(query: Tensor, cache: Tensor) -> Tensor:
    return flash_attn_func(query, *cache.unbind(2), causal=True)


def decode_case(batch: int, length: int) -> Case:
    size = DTYPE.itemsize * batch * length * HEADS * SIZE
    return Case(
        "attention, one new token",
        f"B{batch} cache {length} H{HEADS} D{SIZE} {DTYPE_NAME}",
        {
            "query": randn(batch, 1, HEADS, SIZE),
            "cache": randn(batch, length, 2, HEADS, SIZE),
        },
        {
            "torch eager": decode_eager,
            "torch.compile": compiled(decode_eager),
            **ours(decode_ours),
        },
        forward=(2 * size, 4 * batch * HEADS * SIZE * length),
        backward=None,
    )


@cases(
    *(partial(case, *shape) for shape in SHAPES),
    variants=(*PEERS, "torch.compile", *OURS),
)
def test_attention(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)


@cases(
    *(
        partial(decode_case, *shape)
        for shape in pick(((1, 1024), (8, 256)), ((64, 1024),), ((1, 16),))
    ),
    directions=("forward",),
)
def test_decode(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
