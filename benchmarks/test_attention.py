"""Causal attention from packed qkv at the shape of GPT-2 124M (12 heads of 64)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, cases, compiled, cpu
from gpt2fast.functional import flash_attn_func, flash_attn_qkvpacked_func

HEADS, SIZE = 12, 64


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
    size = 4 * batch * length * HEADS * SIZE
    flops = 2 * batch * HEADS * SIZE * length * (length + 1)  # the causal half of QK and PV
    return Case(
        "attention",
        f"B{batch} T{length} H{HEADS} D{SIZE} fp32",
        {"qkv": torch.randn(batch, length, 3, HEADS, SIZE)},
        {
            "torch eager": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
            "torch math": partial(sdpa, backend=SDPBackend.MATH),
            "torch.compile": compiled(sdpa_plain),
            "gpt2fast cpu": cpu(partial(flash_attn_qkvpacked_func, causal=True)),
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
    size = 4 * batch * length * HEADS * SIZE
    return Case(
        "attention, one new token",
        f"B{batch} cache {length} H{HEADS} D{SIZE} fp32",
        {
            "query": torch.randn(batch, 1, HEADS, SIZE),
            "cache": torch.randn(batch, length, 2, HEADS, SIZE),
        },
        {
            "torch eager": decode_eager,
            "torch.compile": compiled(decode_eager),
            "gpt2fast cpu": cpu(decode_ours),
        },
        forward=(2 * size, 4 * batch * HEADS * SIZE * length),
        backward=None,
    )


@cases(
    *(partial(case, *shape) for shape in ((4, 64), (4, 256), (1, 1024))),
    variants=("torch eager", "torch math", "torch.compile", "gpt2fast cpu"),
)
def test_attention(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)


@cases(partial(decode_case, 1, 1024), partial(decode_case, 8, 256), directions=("forward",))
def test_decode(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
