"""AdamW and the global norm in plain PyTorch: the specification, tensor by tensor."""

import torch
from torch import Tensor


def moment_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments: fp32 for half precision, otherwise its own."""
    return torch.promote_types(parameter.dtype, torch.float32)


@torch.no_grad()
def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_scale: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of Loshchilov & Hutter's AdamW, in place."""
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        grad = g.to(m.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale.to(m.dtype)
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        decayed = p.to(m.dtype) * (1 - lr * weight_decay)
        p.copy_(decayed - lr / (1 - beta1**step) * m / denominator)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum of all squares), in fp32 (fp64 where a tensor is)."""
    wide = [t.to(moment_dtype(t)) for t in tensors]
    result = max((t.dtype for t in wide), key=lambda dtype: dtype.itemsize)
    norms = [torch.linalg.vector_norm(t).to(result) for t in wide]
    return torch.linalg.vector_norm(torch.stack(norms))
