"""The transformer block as torch.library ops and the autograd Function on them: fp32, on a CPU."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import cpu_kernels
from gpt2fast.ops.block import cpu
from gpt2fast.ops.registry import call, once_differentiable, register

#: Weights and biases in the order of the arguments, and which may be absent.
NAMES = tuple(
    (f"{layer}_{kind}", kind == "bias" or layer in ("ln_1", "ln_2"))
    for layer in ("ln_1", "attn", "proj", "ln_2", "fc", "out")
    for kind in ("weight", "bias")
)
COUNT = len(NAMES)
_PARAMETERS = ", ".join(f"Tensor{'?' if optional else ''} {name}" for name, optional in NAMES)
_DROPOUTS = "float attention_dropout, float branch_dropout, float mlp_dropout"


def _forward(x: Tensor, branch: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    seeds, n_head, eps_1, eps_2, *dropouts, save = rest[COUNT:]
    return cpu.forward(x, branch, rest[:COUNT], seeds, n_head, eps_1, eps_2, tuple(dropouts), save)


def _fake_forward(x: Tensor, branch: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = x.shape
    sizes = (batch, length, rest[COUNT + 1], width, rest[8].shape[0], branch is not None)
    floats = cpu_kernels().block_saved(*sizes) if rest[-1] else 0
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((floats,))


def _backward(
    dtotal: Tensor, dout: Tensor, x: Tensor | None, total: Tensor, saved: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    parameters, (seeds, n_head, *dropouts, need) = rest[:COUNT], rest[COUNT:]
    upstream = (dtotal.contiguous(), dout.contiguous())
    return cpu.backward(
        *upstream, x, total, saved, parameters, seeds, n_head, tuple(dropouts), need
    )


def _fake_backward(
    dtotal: Tensor, dout: Tensor, x: Tensor | None, total: Tensor, saved: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    wanted = zip(rest[-1], (total, *rest[:COUNT]), strict=True)
    return tuple(torch.empty_like(t) if n and t is not None else None for n, t in wanted)


block_forward = register(
    f"block_forward(Tensor x, Tensor? branch, {_PARAMETERS}, Tensor? seeds, int n_head,"
    f" float eps_1, float eps_2, {_DROPOUTS}, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
block_backward = register(
    f"block_backward(Tensor dtotal, Tensor dout, Tensor? x, Tensor total, Tensor saved,"
    f" {_PARAMETERS}, Tensor? seeds, int n_head, {_DROPOUTS}, bool[] need)"
    f" -> ({', '.join(['Tensor?'] * (1 + COUNT))})",
    _backward,
    _fake_backward,
)


class Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        total, out, saved = call(block_forward, x, branch, *rest, True)
        parameters, (seeds, n_head, _, _, *dropouts) = rest[:COUNT], rest[COUNT:]
        ctx.save_for_backward(x if branch is None else None, total, saved, *parameters, seeds)
        ctx.options = (n_head, *dropouts)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_branch, *need = ctx.needs_input_grad[: 2 + COUNT]
        need = [need_x or need_branch, *need]
        given = (dtotal, dout, *ctx.saved_tensors, *ctx.options)
        dx, *gradients = call(block_backward, *given, need)
        others = len(ctx.needs_input_grad) - 2 - COUNT
        return dx if need_x else None, dx if need_branch else None, *gradients, *[None] * others
