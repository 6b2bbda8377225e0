"""AdamW and the global norm in plain PyTorch: the specification, tensor by tensor."""

import torch
from torch import Tensor

from gpt2fast.ops.random import random_words


def moment_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments: fp32 for half precision, otherwise its own."""
    return torch.promote_types(parameter.dtype, torch.float32)


def round_stochastically(x: Tensor, seed: Tensor, step: float | Tensor, place: int) -> Tensor:
    """fp32 x as one of the two bf16 numbers around each value; a NaN stays.

    Up with the probability that makes x the mean: 16 random bits are added below the last place,
    and the rest is cut off. Element e of the tensor at `place` has the bits of the word (seed, step,
    place, 0, e mod 2^32); elements are counted in row-major order.
    """
    elements = torch.arange(x.numel(), device=x.device).view(x.shape) & 0xFFFFFFFF
    number, tensor, zero = (torch.as_tensor(n, device=x.device).long() for n in (step, place, 0))
    words = random_words(seed, number, tensor, zero, elements)
    bits = (x.view(torch.int32) + (words >> 16).int()) & -(1 << 16)
    return torch.where(x.isnan(), x, bits.view(torch.float32))


@torch.no_grad()
def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    seed: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of Loshchilov & Hutter's AdamW, in place."""
    rate = lr if lr_tensor is None else lr_tensor.double()
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        number = steps[i].double() if steps else step
        value = masters[i] if masters else p
        grad = g.to(m.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale.to(m.dtype)
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (v / (1 - beta2**number)).sqrt() + eps
        decayed = value.to(m.dtype) * (1 - rate * weight_decay)
        updated = decayed - rate / (1 - beta1**number) * m / denominator
        if seed is not None and p.dtype == torch.bfloat16:
            updated = round_stochastically(updated.float(), seed, number, i)
        value.copy_(updated)
        if masters:
            p.copy_(value)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of all squares), in fp32 (fp64 where a tensor is)."""
    wide = [t.to(moment_dtype(t)) for t in tensors]
    result = max((t.dtype for t in wide), key=lambda dtype: dtype.itemsize)
    norms = [torch.linalg.vector_norm(t).to(result) for t in wide]
    return torch.linalg.vector_norm(torch.stack(norms))
