"""The GELU-MLP in plain PyTorch: the specification, differentiated by PyTorch."""

from torch import Tensor
from torch.nn.functional import gelu, linear


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
) -> Tensor:
    """gelu(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias with the tanh-GELU."""
    fc_bias, proj_bias = (b if b is None else b.to(x.dtype) for b in (fc_bias, proj_bias))
    h = linear(x, fc_weight, fc_bias)
    return linear(gelu(h, approximate="tanh"), proj_weight, proj_bias)
