"""Whether a replacement computes what the original does: on a probe batch, outputs and gradients.

Two questions. Is it the same mathematics? Both run in fp64, where ours is the reference
implementation, and must agree to 1e-9 of the largest value: an erf-GELU, another epsilon, another
order of q, k and v stand out by many powers of ten. Is the kernel accurate? Both run in the module's
own dtype, and the kernel's error against the original in fp64 may be twice the original's, plus
three units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAME = 1e-9
ULPS = 3


def is_tanh_gelu(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether `function` is the tanh form of GELU, to 1e-9, over [-8, 8]."""
    x = torch.linspace(-8, 8, 201, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return False
    return bool((y - F.gelu(x, approximate="tanh")).abs().max() < SAME)


class _Caller(nn.Module):
    """Calls a function of a module, past the module's own forward and hooks."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module, x)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = {part: part.training for part in module.modules()}
    for part in before:
        part.training = training
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode


def _run(
    module: nn.Module,
    function: Callable[..., Tensor],
    x: Tensor,
    upstream: Tensor | None,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Tensor]:
    """Output and gradients of `function(module, x)` with x, parameters and buffers in `dtype`.

    The parameters are the module's with a little noise that `seed` determines.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = {}
    for name, parameter in module.named_parameters():
        # Fresh weights have ones and zeros that hide much: an unused bias, a factor of a sum.
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        moved = parameter.detach() + noise.to(parameter)
        leaves[f"module.{name}"] = moved.to(dtype, copy=True).requires_grad_()
    state: dict[str, Tensor] = leaves | {
        f"module.{name}": buffer.to(dtype) if buffer.is_floating_point() else buffer
        for name, buffer in module.named_buffers()
    }
    given = x.to(dtype, copy=True).requires_grad_()
    devices = [x.device] if x.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autocast(x.device.type, enabled=False),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        y = torch.func.functional_call(_Caller(module, function), state, (given,))
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns a {type(y).__name__}, not a tensor")
        if upstream is None:
            return {"output": y.detach()}
        gradients = torch.autograd.grad(
            y, [given, *leaves.values()], upstream.to(y.dtype), allow_unused=True
        )
    found = {"output": y.detach(), "gradient of its input": gradients[0]}
    for name, gradient in zip(leaves, gradients[1:], strict=True):
        if gradient is not None:
            found[f"gradient of {name.removeprefix('module.')}"] = gradient
    return found


def _scales(truth: dict[str, Tensor]) -> dict[str, float]:
    # A key bias has gradient zero but for rounding: its scale is that of the other gradients.
    largest = {name: t.abs().max().item() if t.numel() else 0.0 for name, t in truth.items()}
    gradients = max((v for name, v in largest.items() if name != "output"), default=0.0)
    return {
        name: value if name == "output" else max(value, 0.1 * gradients)
        for name, value in largest.items()
    }


def _different(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> str | None:
    if ours.keys() != truth.keys():
        missing = sorted(ours.keys() ^ truth.keys())
        return f"one of the two has no {missing[0]}"
    scales = _scales(truth)
    for name, true in truth.items():
        if ours[name].shape != true.shape:
            return f"{name} has shape {tuple(true.shape)}, ours {tuple(ours[name].shape)}"
        error = (ours[name] - true).abs().max().item() if true.numel() else 0.0
        if not error <= SAME * max(scales[name], 1e-30):
            return f"{name} differs by {error:.1e} in fp64"
    return None


def _inaccurate(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]
) -> str | None:
    scales = _scales(truth)
    for name, true in truth.items():
        dtype = theirs[name].dtype
        if ours[name].dtype != dtype:
            return f"{name} is {dtype}, ours {ours[name].dtype}"
        error, reference = (
            (t[name].double() - true).abs().max().item() if true.numel() else 0.0
            for t in (ours, theirs)
        )
        bound = 2 * reference + ULPS * torch.finfo(dtype).eps * scales[name]
        if not error <= bound:
            return f"{name} has error {error:.1e}, allowed is {bound:.1e}"
    return None


def _stored(module: nn.Module, before: dict[str, object]) -> bool:
    """Whether the module's attributes are others than before; puts them back."""
    now = module.__dict__
    changed = now.keys() != before.keys() or any(now[n] is not v for n, v in before.items())
    if changed:
        for name in now.keys() - before.keys():
            del now[name]
        now.update(before)
    return changed


def why_not_equal(
    module: nn.Module,
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    inputs: Tensor,
) -> str | None:
    """None where `ours(module, x)` is proven to be `theirs(module, x)`, else what is different.

    In fp64 they are compared in evaluation and, with the same random numbers, in training; then in
    inputs' dtype in evaluation.
    """
    from gpt2fast.backends import use_backend

    if any(p.is_meta for p in module.parameters()):
        return "its parameters have no values yet (meta device)"
    reason = None
    for seed in range(3):  # an unlucky rounding is no reason to leave a module alone
        generator = torch.Generator().manual_seed(seed)
        for training in (False, True):
            with _mode(module, training):
                before = dict(module.__dict__)
                try:
                    y = _run(module, theirs, inputs, None, torch.float64, seed)["output"]
                    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
                    upstream = upstream.to(inputs.dtype).to(inputs.device)
                    truth = _run(module, theirs, inputs, upstream, torch.float64, seed)
                except Exception as error:
                    return f"a probe batch of {tuple(inputs.shape)} fails in it: {error}"
                if _stored(module, before):
                    return "its forward stores attributes"
                try:
                    with use_backend("reference"):
                        exact = _run(module, ours, inputs, upstream, torch.float64, seed)
                    if (why := _different(exact, truth)) is not None:
                        return why + (" in training" if training else "")
                    if training:
                        continue
                    measured = _run(module, ours, inputs, upstream, inputs.dtype, seed)
                except Exception as error:
                    return f"our form of it fails: {error}"
                expected = _run(module, theirs, inputs, upstream, inputs.dtype, seed)
                reason = _inaccurate(measured, expected, truth)
        if reason is None:
            return None
    return reason
