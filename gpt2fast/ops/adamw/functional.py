"""The public AdamW functions; gpt2fast.optim has the optimiser on them."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from gpt2fast.backends import KERNEL_DTYPES, choose
from gpt2fast.ops.adamw import autograd, reference
from gpt2fast.ops.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from gpt2fast.ops.registry import is_plain


def _backend(tensors: Sequence[Tensor]) -> str:
    other = {t.dtype for t in tensors}.difference(KERNEL_DTYPES)
    tensor = next(t for t in tensors if t.dtype in other) if other else tensors[0]
    return choose(tensor, "adamw")


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: float | Sequence[Tensor],
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    masters: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    rounding_seed: Tensor | None = None,
) -> None:
    """One AdamW step in place over lists of tensors, as torch.optim.AdamW takes it.

    Args:
        params: tensors of float32, bfloat16 or float16, of any shapes, on one device. Arithmetic is
            fp32; each parameter is rounded once.
        grads: of the parameters' shapes and dtypes.
        exp_avgs, exp_avg_sqs: the moments, of the parameters' shapes, in fp32 (in half precision
            an average with beta2 = 0.999 would not move).
        step: the number of this step, from 1: it corrects the moments' bias. Or an fp32 scalar for
            each parameter, on its device: then nothing waits for the device to read it.
        lr: the learning rate; a scalar tensor is read on the device.
        beta1, beta2, eps, weight_decay: of AdamW; the decay is decoupled from the gradient.
        masters: fp32 copies of half-precision parameters, of their shapes: the step is taken on the
            copy, and the parameter is the copy rounded. So updates far below a parameter's last
            place add up.
        grad_scale: a scalar by which gradients are multiplied on the fly, a clipping coefficient
            for example; the gradients themselves are not written.
        rounding_seed: an int64 scalar on the parameters' device: bfloat16 parameters are rounded
            stochastically, to one of the two numbers around the new value with probabilities that
            make it the mean, so that small updates add up without masters. The random bits are a
            hash of the seed, the step, the parameter's place in `params` and the element: the same
            on every backend (to step 2^24, where fp32 stops counting), and others at every step.
            float32 parameters are as without.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
    https://arxiv.org/abs/1711.05101.

    >>> param, grad, exp_avg, exp_avg_sq = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
    >>> lists = [param], [grad], [exp_avg], [exp_avg_sq]
    >>> gpt2fast.functional.adamw_(*lists, step=1, lr=0.1, weight_decay=0.0)
    >>> param
    tensor([0.9000, 0.9000, 0.9000])
    """
    check_adamw(params, grads, exp_avgs, exp_avg_sqs, masters, step, lr, grad_scale, rounding_seed)
    run_adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        masters,
        step,
        lr,
        grad_scale,
        rounding_seed,
        (beta1, beta2, eps, weight_decay),
    )


def check_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    step: float | Sequence[Tensor],
    lr: float | Tensor,
    grad_scale: Tensor | None,
    rounding_seed: Tensor | None,
) -> None:
    """Checks the arguments of :func:`adamw_`."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if masters is not None:
        lists["masters"] = masters
    scalars = {} if isinstance(step, (int, float)) else {"step": step}
    for name, tensors in (lists | scalars).items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors but params has {len(params)}")
    if isinstance(step, (int, float)) and step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if masters is not None and rounding_seed is not None:
        raise ValueError("rounding_seed is for parameters without masters, which lose nothing")
    if not params:
        return
    for i, p in enumerate(params):
        p_name = f"params[{i}]"
        check_floating(p_name, p)
        check_same_device(p_name, p, "params[0]", params[0])
        if masters is not None and p.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"masters are for bfloat16 and float16 parameters, but {p_name} is {p.dtype}"
            )
        if rounding_seed is not None and p.dtype == torch.float16:
            raise TypeError(f"rounding_seed is for bfloat16 parameters, but {p_name} is {p.dtype}")
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
        for name, tensors in scalars.items():
            t, t_name = tensors[i], f"{name}[{i}]"
            check_tensor(t_name, t)
            check_shape(t_name, t, (), "a scalar")
            check_same_device(t_name, t, p_name, p)
            if t.dtype != torch.float32:
                raise TypeError(f"{t_name} must be torch.float32, got {t.dtype}")
    given = {"grad_scale": grad_scale, "rounding_seed": rounding_seed}
    if isinstance(lr, Tensor):
        given["lr"] = lr
    for name, scalar in given.items():
        if scalar is None:
            continue
        check_tensor(name, scalar)
        check_shape(name, scalar, (), "a scalar")
        check_same_device(name, scalar, "params[0]", params[0])
        if name != "rounding_seed":
            check_floating(name, scalar)
        elif scalar.dtype != torch.int64:
            raise TypeError(f"rounding_seed must be torch.int64, got {scalar.dtype}")


def run_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    step: float | Sequence[Tensor],
    lr: float | Tensor,
    grad_scale: Tensor | None,
    rounding_seed: Tensor | None,
    scalars: tuple[float, float, float, float],
) -> None:
    """The step itself, with arguments that are known to be right."""
    if not params:
        return
    backend = _backend(params)
    number, steps = (step, []) if isinstance(step, (int, float)) else (0.0, list(step))
    rate, lr_tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    if backend != "reference":
        lr_tensor = None if lr_tensor is None else lr_tensor.float()
        grad_scale = None if grad_scale is None else grad_scale.float()
    kept = list(params), list(exp_avgs), list(exp_avg_sqs), list(masters or ())
    optional = lr_tensor, grad_scale, rounding_seed
    arguments = (kept[0], list(grads), *kept[1:], steps, *optional, number, rate)
    if backend == "reference":
        reference.adamw_(*arguments, *scalars)
    elif is_plain(*chain(*arguments[:6]), *optional):
        autograd.adamw_implementation(*arguments, *scalars, backend)
    else:
        autograd.adamw(*arguments, *scalars, backend)
    if backend != "reference" and not torch.compiler.is_compiling():
        # Autograd must see that saved values have changed.
        torch.autograd.graph.increment_version([t for tensors in kept for t in tensors])


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all elements of all tensors, as an fp32 scalar tensor.

    In the kernels squares neither overflow nor vanish, and the same values always give the same
    bits, on the CPU for any number of threads.

    Args:
        tensors: float32, bfloat16 or float16, of any shapes, on one device (float64 on the
            reference path, with an fp64 result).

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks",
    https://arxiv.org/abs/1211.5063, algorithm 1: the norm that clipping compares.

    >>> gpt2fast.functional.global_norm([torch.full((3,), 2.0), torch.tensor([[2.0]])])
    tensor(4.)
    """
    if not tensors:
        return torch.zeros(())
    for i, t in enumerate(tensors):
        check_floating(f"tensors[{i}]", t)
        check_same_device(f"tensors[{i}]", t, "tensors[0]", tensors[0])
    return run_global_norm(tensors)


def run_global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of tensors that are known to be right."""
    backend = _backend(tensors)
    if backend == "reference":
        return reference.global_norm(list(tensors))
    norm = autograd.norm_implementation if is_plain(*tensors) else autograd.global_norm
    return norm(list(tensors), backend)
