"""On a GPU only: real shapes, offsets beyond 2^31, CUDA graphs, determinism, no synchronisation."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import GPT, GPTConfig, functional, use_backend
from gpt2fast.backends import status
from tests.ops.numerics import compare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BF16 = torch.bfloat16


@pytest.fixture(params=("triton", "cuda"), autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on either set of kernels."""
    if not (found := status(request.param)).available:
        pytest.skip(found.detail)
    with use_backend(request.param):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def weights(*shape: int) -> Tensor:
    return (0.02 * randn(*shape)).detach().requires_grad_()


def randint(end: int, *shape: int) -> Tensor:
    return torch.randint(end, shape, device="cuda")


# op -> (function, inputs) at GPT-2 124M's shapes, B 8, T 1024.
def real_cases() -> dict[str, Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]]:
    rows, width = 8192, 768
    return {
        "layer_norm": lambda: (functional.layer_norm, (randn(rows, width), randn(width), randn(width))),
        "add_layer_norm": lambda: (
            functional.add_layer_norm,
            (randn(rows, width), randn(rows, width), randn(width), randn(width)),
        ),
        "gelu": lambda: (functional.gelu, (randn(rows, 4 * width), randn(4 * width))),
        "gelu_mlp": lambda: (
            functional.gelu_mlp,
            (
                randn(rows, width),
                weights(4 * width, width),
                randn(4 * width),
                weights(width, 4 * width),
                randn(width),
            ),
        ),
        "attention": lambda: (
            lambda qkv: functional.flash_attn_qkvpacked_func(qkv, causal=True),
            (randn(8, 1024, 3, 12, 64),),
        ),
        "cross_entropy": lambda: (
            lambda logits, targets: functional.cross_entropy(logits, targets, vocab_size=50257),
            (randn(rows, 50304), randint(50257, rows)),
        ),
        "linear_cross_entropy": lambda: (
            lambda x, weight, targets: functional.linear_cross_entropy(
                x, weight, targets, vocab_size=50257
            ),
            (randn(rows, width), weights(50304, width), randint(50257, rows)),
        ),
        "embedding": lambda: (
            lambda wte, wpe, idx: functional.embedding(idx, wte, wpe),
            (randn(50304, width), randn(1024, width), randint(50257, 8, 1024)),
        ),
    }  # fmt: skip


def gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    result = function(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    leaves = [t for t in inputs if t.requires_grad]
    upstream = [torch.ones_like(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize("op", real_cases())
def test_same_bits_twice(op: str) -> None:
    function, inputs = real_cases()[op]()
    first, second = gradients(function, inputs), gradients(function, inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", real_cases())
def test_cuda_graph(op: str) -> None:
    """Captured once, replayed on other inputs: what eager gives."""
    function, inputs = real_cases()[op]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(function, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(function, inputs)
    others = real_cases()[op]()[1]
    with torch.no_grad():
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
    graph.replay()
    for a, b in zip(captured, gradients(function, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", real_cases())
def test_no_synchronisation(op: str) -> None:
    function, inputs = real_cases()[op]()
    gradients(function, inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(function, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cross_entropy_beyond_32_bit_offsets() -> None:
    rows, columns = 43008, 50304  # 2.16e9 logits
    logits = torch.randn(rows, columns, device="cuda", dtype=BF16).requires_grad_()
    targets = randint(50257, rows)
    loss = functional.cross_entropy(logits, targets, vocab_size=50257)
    (grad,) = torch.autograd.grad(loss, logits)
    last = logits[-1:, :50257].detach().float().requires_grad_()
    expected = F.cross_entropy(last, targets[-1:])
    (expected_grad,) = torch.autograd.grad(expected, last)
    # Half a unit of bf16's 8 bits. In fp32 an absolute error of x - lse is a relative one of its exp:
    # |x - lse| < 32 is rounded by 16 * 2^-24 at most, lse < 32 by as much, on either side.
    ours = grad[-1:, :50257].float() * rows
    torch.testing.assert_close(ours, expected_grad, rtol=2**-9 + 64 * 2**-24, atol=0)
    assert not grad[-1, 50257:].any()


@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_attention_at_real_lengths(length: int) -> None:
    """Error against fp32 attention at most twice that of torch's flash attention in bf16."""
    qkv = randn(1, length, 3, 4, 64)
    dout = torch.randn(1, length, 4, 64, device="cuda", dtype=BF16)

    def torch_attention(packed: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def run(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = qkv.detach().to(dtype).requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out, leaf, dout.to(dtype))]

    truth = run(torch_attention, torch.float64)
    theirs = run(torch_attention, BF16)
    ours = run(lambda x: functional.flash_attn_qkvpacked_func(x, causal=True), BF16)
    for name, true, their, our in zip(("out", "dqkv"), truth, theirs, ours, strict=True):
        compare(name, our, their, true)


def test_model_step_close_to_reference(kernels: str) -> None:
    """Steps of a small GPT-2 in bf16 autocast: the loss falls as on plain PyTorch."""
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256, vocab_size=5000, block_size=256)
    idx = randint(5000, 4, 256)
    curves = []
    for backend, precise in ((kernels, False), ("reference", False), ("reference", True)):
        torch.manual_seed(0)
        model = GPT(config).cuda()
        optimizer = model.configure_optimizer(lr=1e-3, max_norm=1.0)
        losses = []
        with use_backend(backend):
            for _ in range(20):
                with torch.autocast("cuda", dtype=BF16, enabled=not precise):
                    _, loss = model(idx, idx)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        curves.append(torch.tensor(losses))
    ours, theirs, truth = curves
    assert ours[-1] < ours[0] - 1
    # No further from fp32 than twice plain PyTorch in bf16, and an ulp of a loss of bf16 logits.
    bound = 2 * (theirs - truth).abs().max() + torch.finfo(BF16).eps * truth.max()
    assert (ours - truth).abs().max() <= bound
