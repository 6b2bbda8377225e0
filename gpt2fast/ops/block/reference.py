"""The transformer block in plain PyTorch: the specification, differentiated by PyTorch."""

from torch import Tensor

from gpt2fast.ops.attention.reference import attention
from gpt2fast.ops.gelu_mlp.reference import gelu_mlp
from gpt2fast.ops.layer_norm.reference import add_layer_norm, kept, layer_norm
from gpt2fast.ops.linear.reference import linear


def block(
    x: Tensor,
    branch: Tensor | None,
    ln_1_weight: Tensor | None,
    ln_1_bias: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    ln_2_weight: Tensor | None,
    ln_2_bias: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    seeds: Tensor | None,
    n_head: int,
    eps_1: float,
    eps_2: float,
    attention_dropout: float,
    branch_dropout: float,
    mlp_dropout: float,
) -> tuple[Tensor, Tensor]:
    """With s = x + branch: (s2 = s + attention(ln_1(s)), mlp(ln_2(s2))), both (B, T, C); with seeds
    (3,) attention's probabilities, its projection and the MLP's output go through dropout."""
    batch, length, width = x.shape
    total = x if branch is None else branch + x
    y = layer_norm(total, ln_1_weight, ln_1_bias, eps_1)
    q, k, v = (
        linear(y, attn_weight, attn_bias).view(batch, length, 3, n_head, width // n_head).unbind(2)
    )
    seed = [None] * 3 if seeds is None else seeds.unbind()
    attended = attention(q, k, v, 0, None, attention_dropout, seed[0]).reshape(x.shape)
    attended = linear(attended, proj_weight, proj_bias)
    total, y = add_layer_norm(
        attended, total, ln_2_weight, ln_2_bias, eps_2, branch_dropout, seed[1]
    )
    out = gelu_mlp(y, fc_weight, fc_bias, out_weight, out_bias)
    if seed[2] is not None:
        factor = 1 / (1 - mlp_dropout) if mlp_dropout < 1 else 0.0
        out = (out * factor).masked_fill(~kept(out.shape, mlp_dropout, seed[2]), 0.0)
    return total, out
