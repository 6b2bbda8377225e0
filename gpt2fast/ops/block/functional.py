"""Which transformer blocks run as one op."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpt2fast.backends import choose
from gpt2fast.ops.block import autograd
from gpt2fast.ops.linear.cpu import ALL, FEW_ROWS, preference
from gpt2fast.ops.registry import apply, call, is_eager

#: Multiplications of a block's layers below which calls cost more than any BLAS could gain.
SMALL = 1 << 24


def block(
    x: Tensor,
    branch: Tensor | None,
    parameters: Sequence[Tensor | None],
    n_head: int,
    eps_1: float = 1e-5,
    eps_2: float = 1e-5,
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> tuple[Tensor, Tensor] | None:
    """A causal pre-norm block in one call, where the C++ kernels serve it.

    Args:
        x: (B, T, C); branch: of its shape, or None.
        parameters: weights (out, in) and biases, None where absent, of the first norm, q|k|v, the
            attention's projection, the second norm, and the MLP's two layers.
        n_head: heads of C / n_head each.
        eps_1, eps_2: of the norms.
        dropouts: probabilities for the attention's probabilities, its projection and the MLP.

    Returns:
        With s = x + branch: (s2 = s + attention(ln_1(s)), mlp(ln_2(s2))), both (B, T, C); or None
        where the ops one by one are to be taken: other dtypes and devices, tensors that are not
        contiguous or not plain, autocast, a compiler or transform at work, products that PyTorch's
        BLAS computes faster.
    """
    if not _suits(x, branch, parameters, n_head):
        return None
    seeds = torch.randint(2**63 - 1, (3,), device="cpu") if any(dropouts) else None
    arguments = (branch, *parameters, seeds, n_head, eps_1, eps_2, *dropouts)
    if torch.is_grad_enabled():
        found: tuple[Tensor, Tensor] = apply(autograd.Block, x, *arguments)
        return found
    total, out, _ = call(autograd.block_forward, x, *arguments, False)
    return total, out


def _suits(
    x: Tensor, branch: Tensor | None, parameters: Sequence[Tensor | None], n_head: int
) -> bool:
    given = [t for t in (x, branch, *parameters) if t is not None]
    if (
        not is_eager(*given)
        or forward_ad._current_level >= 0
        or any(t.dtype != torch.float32 or not t.is_cpu for t in given)
        or not all(t.is_contiguous() for t in given)
        or torch.is_autocast_enabled("cpu")
        or x.dim() != 3
        or x.numel() == 0
        or (branch is not None and branch.shape != x.shape)
        or choose(x) != "cpu"
    ):
        return False
    _, _, attn, attn_bias, proj, proj_bias, _, _, fc, fc_bias, out, out_bias = parameters
    assert attn is not None
    assert proj is not None
    assert fc is not None
    assert out is not None
    width, hidden = x.shape[2], fc.shape[0]
    work = x.numel() * (4 * width + 2 * hidden)
    layers = (
        (attn, attn_bias, (3 * width, width)),
        (proj, proj_bias, (width, width)),
        (fc, fc_bias, (hidden, width)),
        (out, out_bias, (width, hidden)),
    )
    return (
        preference() in ((ALL,) if work > SMALL else (ALL, FEW_ROWS))
        and width % n_head == 0
        and all(w.shape == s and (b is None or b.shape == s[:1]) for w, b, s in layers)
        and all(p is None or p.shape == x.shape[2:] for p in (*parameters[:2], *parameters[6:8]))
    )
