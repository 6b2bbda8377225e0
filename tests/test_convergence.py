"""Training on our kernels follows plain PyTorch's curve; the long form is benchmarks/convergence.py."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2fast
from benchmarks import convergence
from gpt2fast.functional import flash_attn_func
from tests.ops.numerics import device_of


def test_curves_are_as_near_to_fp64_as_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "--steps 60 --layers 2 --heads 2 --width 32 --batch 4 --length 48"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "curves"), *sizes.split()])
    convergence.main()
    found = json.loads((tmp_path / "curves.json").read_text())
    truth = found["losses"]["fp64 reference"]
    assert truth[-1] < truth[0] - 1.0  # it learns
    for precision, distance in found["distances"].items():
        assert 0 < distance["gpt2fast"] <= 2 * distance["reference"], precision
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_wrong_kernel_leaves_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound sees a block whose layer norms take eps 1e-3 instead of 1e-5."""
    from gpt2fast.ops.block import cpu

    right = cpu.forward

    def wrong(*args: Any) -> object:
        *before, eps_1, eps_2, dropouts, save = args
        assert eps_1 == eps_2 == 1e-5
        return right(*before, 1e-3, 1e-3, dropouts, save)

    monkeypatch.setattr(cpu, "forward", wrong)
    shape = {"layers": 1, "heads": 2, "width": 32, "batch": 2, "length": 32}
    found = convergence.curves(convergence.python_source(100_000), steps=10, **shape)
    far = convergence.distances(found)["fp32"]
    assert far["gpt2fast"] > 2 * far["reference"]


@pytest.mark.parametrize("direction", ["values", "gradients"])
def test_bf16_attention_does_not_drift_where_many_probabilities_are_one(
    backend: str, direction: str
) -> None:
    """Keys with the same largest logit give unnormalised probabilities of exactly 1, whose sums with
    values of one sign round to bf16 to the same side again and again. Sums must be fp32, rounded once.

    Source of the idea: Qiu and Yao 2025, https://arxiv.org/abs/2510.04212. The bias is the mean of the
    error: of roundings to nearest it is a small part of one unit, of a drift several.
    """
    torch.manual_seed(0)
    length, heads, size = 96, 2, 16
    device = device_of(backend)
    # logits are the sums over the first half; the second half of k gives q a gradient
    q = torch.cat(
        [torch.ones(2, length, heads, size // 2), torch.zeros(2, length, heads, size // 2)], 3
    )
    k = torch.where(torch.rand(2, length, 1, 1) < 0.7, 2.0, -2.0).repeat(1, 1, heads, size)
    k[..., size // 2 :] = 1.0 + torch.rand(2, length, heads, size // 2)
    v = -1.0 - 0.25 * torch.rand(2, length, heads, size)
    upstream = 1.0 + 0.25 * torch.rand_like(v)

    def run(dtype: torch.dtype, name: str) -> list[torch.Tensor]:
        where = device if name == backend else torch.device("cpu")
        given = [t.bfloat16().to(where, dtype).requires_grad_() for t in (q, k, v)]
        with gpt2fast.use_backend(name):
            out = flash_attn_func(*given, causal=True)
            gradients = torch.autograd.grad(out, given, upstream.bfloat16().to(where, dtype))
        chosen = [out.detach()] if direction == "values" else list(gradients)
        return [t.cpu().double() for t in chosen]

    truth, measured = run(torch.float64, "reference"), run(torch.bfloat16, backend)
    # Rows round independently, each to nearest: their mean has a deviation of unit / sqrt(12 rows),
    # and six of them are allowed. dq and dk carry delta = rowsum(upstream * out), out rounded, which a
    # row's weights, whose sum is 1, share out: scale * |k| times the deviation of delta.
    eps, rows = torch.finfo(torch.bfloat16).eps, q.numel() // size
    delta = eps * v.abs().max() * upstream.max() * size**0.5
    shared = size**-0.5 * k.abs().max() * delta
    extra = [0.0] if direction == "values" else [shared, shared, 0.0]
    for ours, true, more in zip(measured, truth, extra, strict=True):
        bias = (ours - true).mean().abs()
        assert bias <= 6 * (eps * true.abs().max() + more) / (12 * rows) ** 0.5
