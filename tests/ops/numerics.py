"""The proof that a kernel is right: its error is at most twice the reference's in the same dtype.

Truth is the reference in fp64 on the same (rounded) inputs and upstream gradients. Errors of every
output and of every gradient are measured twice, as the largest absolute error and as the relative
norm, and `ULPS` units of the dtype's precision are allowed beside twice the reference's error, for
the cases in which the reference happens to be exact.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import gpt2fast

ULPS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def device_of(backend: str) -> torch.device:
    """Where the tests of a backend have their tensors."""
    on_cpu = backend not in ("triton", "cuda") or is_slow(backend)
    return torch.device("cpu" if on_cpu else "cuda")


def is_slow(backend: str) -> bool:
    """Whether it is a GPU's, interpreted or emulated here: shapes are to be small."""
    return backend in ("triton", "cuda") and not torch.cuda.is_available()


def _run(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    upstream: list[Tensor] | None,
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Outputs and gradients by name; `dtype` replaces the floating dtype of the inputs."""
    leaves = {}
    arguments = dict(inputs)
    device = device_of(backend)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # the layout is part of the input: a leaf keeps its strides
            leaf = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device)
            leaf.copy_(value.detach())
            arguments[name] = leaves[name] = leaf.requires_grad_(name in wanted)
        elif isinstance(value, Tensor):
            arguments[name] = value.to(device)
    with gpt2fast.use_backend(backend):
        results = function(**arguments)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    measured = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    differentiable = [out for out in outputs if out.requires_grad]
    if wanted and upstream is not None:
        grads = [
            g.to(device, out.dtype)
            for g, out in zip(upstream, outputs, strict=True)
            if out.requires_grad
        ]
        torch.autograd.backward(differentiable, grads)
        for name in wanted:
            assert leaves[name].grad is not None, f"no gradient reached {name}"
            measured[f"gradient of {name}"] = leaves[name].grad
    return {name: tensor.cpu() for name, tensor in measured.items()}


def assert_accurate(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "cpu",
    wanted: Sequence[str] | None = None,
    upstream_scale: float = 1.0,
    keep_fp32: Sequence[str] = (),
) -> None:
    """Asserts the rule for `function(**inputs)`, whose tensors are rounded to `dtype` first.

    `wanted` names the inputs whose gradients are checked (default: all floating-point tensors).
    The function must return floating-point tensors and reach the kernels through gpt2fast's public
    functions, so that `use_backend` switches it between kernel and reference. Output dtypes must
    agree with the reference's. The reference runs on the CPU.
    """
    rounded = {
        name: (
            torch.empty_strided(value.shape, value.stride(), dtype=dtype).copy_(value)
            if isinstance(value, Tensor) and value.is_floating_point() and name not in keep_fp32
            else value
        )
        for name, value in inputs.items()
    }
    if wanted is None:
        wanted = [n for n, v in rounded.items() if isinstance(v, Tensor) and v.is_floating_point()]
    probe = _run(function, rounded, torch.float64, "reference", None, ())
    upstream = [
        (torch.randn(out.shape) * upstream_scale).to(dtype).double() for out in probe.values()
    ]
    truth = _run(function, rounded, torch.float64, "reference", upstream, wanted)
    expected = _run(function, rounded, dtype, "reference", upstream, wanted)
    measured = _run(function, rounded, dtype, backend, upstream, wanted)
    assert measured.keys() == truth.keys()
    for name, true in truth.items():
        assert measured[name].shape == true.shape, name
        assert measured[name].dtype == expected[name].dtype, name
        compare(name, measured[name], expected[name], true)


def compare(name: str, measured: Tensor, expected: Tensor, truth: Tensor) -> None:
    """Asserts error(measured) <= 2 error(expected) + a few ulp, by largest error and by norm."""
    if truth.numel() == 0:
        return
    eps = torch.finfo(measured.dtype).eps
    assert torch.isfinite(measured).all(), f"{name} has values that are not finite"
    ours, theirs = measured.double() - truth, expected.double() - truth
    largest, norm = truth.abs().max().item(), truth.norm().item()
    for what, error, reference, scale in (
        ("largest error", ours.abs().max().item(), theirs.abs().max().item(), largest),
        ("error norm", ours.norm().item(), theirs.norm().item(), norm),
    ):
        bound = 2 * reference + ULPS * eps * scale
        assert error <= bound, (
            f"{name}: {what} {error:.3e} exceeds {bound:.3e}"
            f" (reference {reference:.3e}, scale {scale:.3e}, {measured.dtype})"
        )


def assert_deterministic(run: Callable[[], Sequence[Tensor]]) -> None:
    """Two calls give the same bits."""
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def assert_compiles(function: Callable[..., Any], inputs: dict[str, Any], backend: str) -> None:
    """torch.compile(fullgraph=True), static and dynamic, gives what eager gives, with gradients."""
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        results = []
        for call in (function, compiled):
            leaves = {
                n: v.detach()
                .to(device_of(backend), copy=True)
                .requires_grad_(v.is_floating_point())
                if isinstance(v, Tensor)
                else v
                for n, v in inputs.items()
            }
            with gpt2fast.use_backend(backend):
                out = call(**leaves)
            outs = [out] if isinstance(out, Tensor) else list(out)
            sum(o.double().square().sum() for o in outs if o.requires_grad).backward()
            grads = [
                v.grad for v in leaves.values() if isinstance(v, Tensor) and v.grad is not None
            ]
            results.append([*outs, *grads])
        for eager, graph in zip(*results, strict=True):
            # A graph has the BLAS's products where eager mode has ours: sums in another order.
            atol = 1e-5 + 8 * torch.finfo(eager.dtype).eps * eager.abs().max().item()
            torch.testing.assert_close(graph, eager, atol=atol, rtol=1.3e-6)
