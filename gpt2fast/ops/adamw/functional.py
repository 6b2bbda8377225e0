"""The public AdamW functions; gpt2fast.optim has the optimiser on them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2fast.backends import KERNEL_DTYPES, choose
from gpt2fast.ops.adamw import autograd, reference
from gpt2fast.ops.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
)


def _backend(tensors: Sequence[Tensor]) -> str:
    return choose(next((t for t in tensors if t.dtype not in KERNEL_DTYPES), tensors[0]))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: float,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: Tensor | None = None,
) -> None:
    """One AdamW step in place over lists of tensors, as torch.optim.AdamW takes it.

    Args:
        params: tensors of float32, bfloat16 or float16, of any shapes, on one device. Arithmetic is
            fp32; each parameter is rounded once.
        grads: of the parameters' shapes and dtypes.
        exp_avgs, exp_avg_sqs: the moments, of the parameters' shapes, in fp32 (in half precision
            an average with beta2 = 0.999 would not move).
        step: the number of this step, from 1: it corrects the moments' bias.
        lr, beta1, beta2, eps, weight_decay: of AdamW; the decay is decoupled from the gradient.
        grad_scale: a scalar by which gradients are multiplied on the fly, a clipping coefficient
            for example; the gradients themselves are not written.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
    https://arxiv.org/abs/1711.05101.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors but params has {len(params)}")
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if not params:
        return
    for i, p in enumerate(params):
        p_name = f"params[{i}]"
        check_floating(p_name, p)
        check_same_device(p_name, p, "params[0]", params[0])
        for name, tensors in lists.items():
            t, t_name = tensors[i], f"{name}[{i}]"
            check_floating(t_name, t)
            check_shape(t_name, t, tuple(p.shape), f"that of {p_name}")
            check_same_device(t_name, t, p_name, p)
            if name == "grads":
                check_same_dtype(t_name, t, p_name, p)
            elif t.dtype != reference.moment_dtype(p):
                raise TypeError(
                    f"{t_name} must be {reference.moment_dtype(p)} beside parameters of {p.dtype},"
                    f" got {t.dtype}"
                )
    if grad_scale is not None:
        check_floating("grad_scale", grad_scale)
        check_shape("grad_scale", grad_scale, (), "a scalar")
        check_same_device("grad_scale", grad_scale, "params[0]", params[0])
    backend = _backend(params)
    scalars = (step, lr, beta1, beta2, eps, weight_decay)
    four = list(params), list(grads), list(exp_avgs), list(exp_avg_sqs)
    if backend == "reference":
        reference.adamw_(*four, grad_scale, *scalars)
        return
    if grad_scale is not None:
        grad_scale = grad_scale.float()
    autograd.adamw(*four, grad_scale, *scalars, backend)
    if not torch.compiler.is_compiling():  # autograd must see that saved values have changed
        torch.autograd.graph.increment_version([*four[0], *four[2], *four[3]])


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all elements of all tensors, as an fp32 scalar tensor.

    In the CPU kernel squares neither overflow nor vanish, and the result is the same for any number
    of threads.

    Args:
        tensors: float32, bfloat16 or float16, of any shapes, on one device (float64 on the
            reference path, with an fp64 result).

    Raises:
        TypeError, ValueError: a wrong argument, named.
    """
    if not tensors:
        return torch.zeros(())
    for i, t in enumerate(tensors):
        check_floating(f"tensors[{i}]", t)
        check_same_device(f"tensors[{i}]", t, "tensors[0]", tensors[0])
    backend = _backend(tensors)
    if backend == "reference":
        return reference.global_norm(list(tensors))
    return autograd.global_norm(list(tensors), backend)
