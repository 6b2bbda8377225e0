"""quack's names for what gpt2fast has, for tests.peers.run_kernels; they are no part of gpt2fast.

quack itself cannot be imported without CUTLASS's compiler, so that its modules are made here, of our
functions and, where a test takes its yardstick from quack, of plain PyTorch.
"""

import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import functional
from gpt2fast.backends import choose
from gpt2fast.ecosystem._refuse import refuse
from gpt2fast.ops.layer_norm import autograd

#: quack's test files of these functions.
FILES = ("cross_entropy", "linear_cross_entropy", "layernorm")


def cross_entropy(
    x: Tensor,
    target: Tensor,
    lse_partial: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    refuse("cross_entropy", lse_partial=(lse_partial, None), weight=(weight, None))
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    return functional.cross_entropy(x, target, inplace_backward=inplace_backward, **options)


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    return_lse: bool = False,
    return_dx: bool = False,
    inplace_backward: bool = False,
) -> Any:
    refuse(
        "cross_entropy_fwd",
        target_logit=(target_logit, None),
        weight=(weight, None),
        return_lse=(return_lse, False),
        return_dx=(return_dx, False),
    )
    return cross_entropy(x, target, None, None, ignore_index, "none")


def cross_entropy_bwd(*args: Any, **kwargs: Any) -> None:
    refuse("cross_entropy_bwd", lse=("given", None))


def chunked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    chunk_size: int = 4096,
    ignore_index: int = -100,
    reduction: str = "mean",
    tuned: bool = True,
    use_scaled_exp: bool | None = None,
) -> Tensor:
    return functional.linear_cross_entropy(
        x, weight, target, ignore_index=ignore_index, reduction=reduction
    )


def linear_cross_entropy_func_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    return_rstd: bool = False,
    return_mean: bool = False,
) -> Any:
    y = functional.layer_norm(x, weight, bias, eps)  # which checks the arguments
    wanted = return_rstd, return_mean
    mean, rstd = autograd.layer_norm_forward(x, weight, bias, eps, choose(x, "layer_norm"))[1]
    seen = [part for part, want in zip((rstd, mean), wanted, strict=True) if want]
    return (y, *seen) if seen else y


def layernorm_bwd(
    x: Tensor, weight: Tensor, dout: Tensor, rstd: Tensor, mean: Tensor, has_bias: bool = False
) -> Any:
    backend = choose(x, "layer_norm")
    dx, dweight, dbias = autograd.layer_norm_backward(
        dout, None, x, weight, torch.stack([mean, rstd]), True, True, backend
    )
    return dx, dweight, dbias if has_bias else None


MODULES: dict[str, dict[str, Any]] = {
    "quack": {},
    "quack.cross_entropy": {
        "cross_entropy": cross_entropy,
        "cross_entropy_fwd": cross_entropy_fwd,
        "cross_entropy_bwd": cross_entropy_bwd,
    },
    "quack.linear_cross_entropy": {
        "chunked_linear_cross_entropy": chunked_linear_cross_entropy,
        "linear_cross_entropy_func_ref": linear_cross_entropy_func_ref,
        "scaled_exp_lce_supported": lambda *_: False,  # a second way of quack's
        "scaled_exp_linear_cross_entropy": None,
    },
    "quack.rmsnorm": {
        "layernorm_fwd": layernorm_fwd,
        "layernorm_bwd": layernorm_bwd,
        "layernorm_ref": lambda x, w, eps=1e-6: F.layer_norm(
            x.float(), w.shape, w.float(), eps=eps
        ).to(x.dtype),
        "layernorm_rstd_ref": lambda x, eps=1e-6: x.float().var(-1, correction=0).add(eps).rsqrt(),
        "layernorm_mean_ref": lambda x: x.float().mean(-1),
    },
}


def put() -> None:
    """Sets the modules where quack's tests import them from."""
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
