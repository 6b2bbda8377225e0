"""Modules on the fast functions: drop-ins with the constructor and state_dict of what they replace.

`Linear`, `LayerNorm`, `GELU` and `CrossEntropyLoss` stand in for torch.nn's; `CausalSelfAttention`,
`MLP` and `Block` for those of nanoGPT-style scripts, whose config object they read (n_embd, n_head,
dropout, and bias, True where missing).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gpt2fast import functional
from gpt2fast.ops.block.functional import block

__all__ = ["GELU", "MLP", "Block", "CausalSelfAttention", "CrossEntropyLoss", "LayerNorm", "Linear"]


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens around the forward of `module`."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether calling `module` does nothing but the forward of one of the classes `kinds`: no subclass
    (LoRA, quantised, parametrised), no hooks, no forward of its own. Asked at every call, since hooks
    and adapters may come later."""
    return type(module) in kinds and not has_hooks(module) and "forward" not in module.__dict__


#: Attention of one layer: queries, keys and values (B, T, H, D) of a call and the dropout
#: probability -> (B, T, H, D).
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Linear(nn.Linear):
    """torch.nn.Linear, on :func:`gpt2fast.functional.linear`.

    The input is (..., C) of the weight's dtype, or under autocast of any; the output (..., D).

    >>> gpt2fast.nn.Linear(3, 4)(torch.randn(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """x (..., C) -> (..., D)."""
        return functional.linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, on :func:`gpt2fast.functional.layer_norm`.

    Raises:
        ValueError: `normalized_shape` has more than one dimension.

    The input is (..., C) of float32, bfloat16 or float16, the output of its shape and dtype.

    >>> norm = gpt2fast.nn.LayerNorm(8)
    >>> norm.load_state_dict(torch.nn.LayerNorm(8).state_dict())
    <All keys matched successfully>
    >>> norm(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, normalized_shape: int | list[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"normalized_shape must be one dimension, got {tuple(self.normalized_shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return functional.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """s = x + branch and the norm of s in one pass: two tensors of x's shape (..., C)."""
        return functional.add_layer_norm(branch, x, self.weight, self.bias, self.eps)


class GELU(nn.GELU):
    """torch.nn.GELU(approximate="tanh"), GPT-2's form, on :func:`gpt2fast.functional.gelu`.

    Raises:
        ValueError: another form is asked for; it would not be the same function.

    The input is (..., C) of float32, bfloat16 or float16, the output of its shape and dtype.

    >>> gpt2fast.nn.GELU()(torch.tensor([[-1.0, 0.0, 1.0]]))
    tensor([[-0.1588,  0.0000,  0.8412]])
    """

    def __init__(self, approximate: str = "tanh") -> None:
        if approximate != "tanh":
            raise ValueError(f'approximate must be "tanh" (GPT-2\'s GELU), got {approximate!r}')
        super().__init__(approximate)

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise on any shape."""
        return functional.gelu(x)


class CrossEntropyLoss(nn.Module):
    """torch.nn.CrossEntropyLoss for logits (N, V) and class indices (N,): the loss in fp32.

    Args:
        ignore_index, reduction, label_smoothing: as in torch.
        z_loss: weight of lse^2, see :func:`gpt2fast.functional.cross_entropy`.
        inplace_backward: the gradient overwrites the logits, which saves a tensor of their size.

    Raises:
        TypeError, ValueError: at the call: a wrong argument, named.
        IndexError: at the call, on the CPU: a target is no class and not `ignore_index`.

    >>> loss = gpt2fast.nn.CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> f"{loss.item():.4f}"  # log 4
    '1.3863'
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.inplace_backward = inplace_backward

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (N, V), targets (N,) -> the loss, a scalar or (N,) for reduction="none"."""
        if logits.dim() != 2:
            raise ValueError(
                f"logits must be (N, V), got {tuple(logits.shape)}: torch's (N, V, ...) layout has"
                " the classes second; flatten to (N, V) first"
            )
        return functional.cross_entropy(
            logits,
            targets,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            inplace_backward=self.inplace_backward,
        )


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with packed qkv: c_attn (C -> q|k|v), c_proj (C -> C); on
    :func:`gpt2fast.functional.flash_attn_qkvpacked_func`.

    Raises:
        ValueError: n_embd is not divisible by n_head.

    The input is (B, T, C), of the weights' dtype (float32, bfloat16 or float16) or under autocast of
    any of them; so is the output.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(n_embd=16, n_head=2, dropout=0.0)
    >>> gpt2fast.nn.CausalSelfAttention(config)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
        bias = getattr(config, "bias", True)
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        attend: Attend | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        `attend` takes the place of the causal attention within the call, for decoding with a
        key/value cache. `cu_seqlens` (D + 1,), int32, are the borders of documents in the B T
        positions, none longer than T: no document sees another.
        """
        batch, length, _ = x.shape
        packed = (batch, length, 3, self.n_head, self.n_embd // self.n_head)
        qkv = self.c_attn(x).view(packed)
        dropout = self.dropout if self.training else 0.0
        if cu_seqlens is not None:
            q, k, v = qkv.flatten(0, 1).unbind(1)
            y = functional.flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, length, length, dropout_p=dropout, causal=True
            )
        elif attend is None:
            y = functional.flash_attn_qkvpacked_func(qkv, dropout_p=dropout, causal=True)
        else:
            query, key, value = qkv.unbind(2)
            y = attend(query, key, value, dropout)
        return self.resid_dropout(self.c_proj(y.reshape(batch, length, self.n_embd)))


class MLP(nn.Module):
    """c_proj(gelu(c_fc(x))) with GPT-2's tanh-GELU, whose hidden width is 4 C; on
    :func:`gpt2fast.functional.gelu_mlp`.

    nanoGPT's own MLP uses the erf form of GELU, which differs by up to 5e-4 and is not the one that
    OpenAI's weights were trained with.

    The input is (..., C), of the weights' dtype (float32, bfloat16 or float16) or under autocast of
    any of them; the output is (..., C).

    >>> from types import SimpleNamespace
    >>> gpt2fast.nn.MLP(SimpleNamespace(n_embd=16, dropout=0.0))(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = getattr(config, "bias", True)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        fc, proj = self.c_fc, self.c_proj
        return self.dropout(functional.gelu_mlp(x, fc.weight, fc.bias, proj.weight, proj.bias))


class Block(nn.Module):
    """A pre-norm transformer block: x + attn(ln_1(x)), then x + mlp(ln_2(x)).

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.

    The input is (B, T, C), of the weights' dtype (float32, bfloat16 or float16) or under autocast of
    any of them; the output is (B, T, C).

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(n_embd=16, n_head=2, dropout=0.0)
    >>> gpt2fast.nn.Block(config)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = getattr(config, "bias", True)
        eps = getattr(config, "layer_norm_epsilon", 1e-5)
        self.ln_1 = LayerNorm(config.n_embd, eps=eps, bias=bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, eps=eps, bias=bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x, branch = self.branches(x)
        return x + branch

    def branches(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        attend: Attend | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same from x + branch, to x after the attention and the MLP's branch, not yet added.

        The next norm adds the branch, in one pass over memory. Where the C++ kernels serve all of the
        block it is one op (ops/block).
        """
        if attend is None and cu_seqlens is None and not torch.compiler.is_compiling():
            together = self._together(x, branch)
            if together is not None:
                return together
        x, y = (x, self.ln_1(x)) if branch is None else self.ln_1.add(x, branch)
        x, y = self.ln_2.add(x, self.attn(y, attend, cu_seqlens))
        return x, self.mlp(y)

    def _together(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """`branches` in one op, or None: where a module is not its own or is watched."""
        own: dict[str, Any] = self._modules  # a submodule as an attribute costs half a microsecond
        ln_1, attn, ln_2, mlp = (own[name] for name in ("ln_1", "attn", "ln_2", "mlp"))
        if not (
            is_plain(attn, CausalSelfAttention)
            and is_plain(mlp, MLP)
            and is_plain(ln_1, LayerNorm)
            and is_plain(ln_2, LayerNorm)
        ):
            return None
        c_attn, attn_proj = attn._modules["c_attn"], attn._modules["c_proj"]
        c_fc, mlp_proj = mlp._modules["c_fc"], mlp._modules["c_proj"]
        drops = (attn._modules["resid_dropout"], mlp._modules["dropout"])
        order = (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj)
        if not (
            all(is_plain(layer, Linear, nn.Linear) for layer in (c_attn, attn_proj, c_fc, mlp_proj))
            and all(is_plain(drop, nn.Dropout) for drop in drops)
            and not _has_any_global_hook()
        ):
            return None
        dropouts = (
            attn.dropout if attn.training else 0.0,
            *(drop.p if drop.training else 0.0 for drop in drops),
        )
        parameters = [m._parameters[name] for m in order for name in ("weight", "bias")]
        return block(x, branch, parameters, attn.n_head, ln_1.eps, ln_2.eps, dropouts)


def init_gpt2(module: nn.Module, n_layer: int, generator: torch.Generator | None = None) -> None:
    """GPT-2's init: N(0, 0.02), biases 0, norms 1 and 0, c_proj 0.02 / sqrt(2 n_layer)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
        else:
            std = 0.02 / (2 * n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
