"""AdamW and the global norm as torch.library ops; neither is differentiable."""

import torch
from torch import Tensor

from gpt2fast.backends import load
from gpt2fast.ops.registry import register


def adamw_implementation(
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
    backend: str,
) -> None:
    load("adamw", backend).adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        masters,
        steps,
        lr_tensor,
        grad_scale,
        seed,
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
    )


def _fake_adamw(
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
    backend: str,
) -> None:
    return None


def norm_implementation(tensors: list[Tensor], backend: str) -> Tensor:
    return load("adamw", backend).global_norm(tensors)


def _fake_global_norm(tensors: list[Tensor], backend: str) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


adamw = register(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] masters, Tensor[] steps, Tensor? lr_tensor, Tensor? grad_scale, Tensor? seed,"
    " float step, float lr, float beta1, float beta2, float eps, float weight_decay, str backend)"
    " -> ()",
    adamw_implementation,
    _fake_adamw,
)
global_norm = register(
    "global_norm(Tensor[] tensors, str backend) -> Tensor", norm_implementation, _fake_global_norm
)
