"""Finds what the kernels can do in any tree of modules, by structure, and proves it before use.

A structure suggests, a probe decides (:mod:`gpt2fast.swap.proof`): names and shapes of a module's
parts lead to a guess of what its forward computes, and the guess is taken where outputs and all
gradients are those of the module itself.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gpt2fast import functional
from gpt2fast.backends import KERNEL_DTYPES
from gpt2fast.nn import is_plain
from gpt2fast.swap import hf_gpt2
from gpt2fast.swap.hf_gpt2 import LOSS_NOTE, layer_norm, why_not_head
from gpt2fast.swap.lazy_logits import LazyLogits, lazy_head
from gpt2fast.swap.proof import is_tanh_gelu, why_not_equal
from gpt2fast.swap.report import (
    SwapReport,
    bind,
    bound,
    fast_forward,
    obstacle,
    original,
    plan,
)

_HEADS = ("n_head", "num_heads", "n_heads", "nhead", "heads", "num_attention_heads", "n_head_")
_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("W_q", "W_k", "W_v"),
    ("w_q", "w_k", "w_v"),
)
_ATTENTION_DROPOUT = ("attn_dropout", "attn_drop", "attention_dropout")
_DROPOUT_NUMBER = ("dropout", "dropout_p", "attn_pdrop", "attn_dropout_p", "p")
ERF = "its GELU is the erf form; the kernel's tanh form is another function"
DROPOUT = (
    "only its dropout differs: the probability is no attribute of the module (self.dropout would be"
    " found), or something else than probabilities and output is dropped"
)


@dataclass(frozen=True)
class NormPlan:
    eps: float


@dataclass(frozen=True)
class MlpPlan:
    fc: str
    proj: str
    tail: str | None  # a Dropout on the output


@dataclass(frozen=True)
class AttentionPlan:
    qkv: tuple[str, ...]  # one packed projection, or three
    proj: str
    heads: int
    causal: bool
    dropout: str | None  # a Dropout or a number: of the attention probabilities
    tail: str | None  # a Dropout on the output


@fast_forward
def custom_layer_norm(self: Any, input: Tensor) -> Tensor:
    """The forward of a LayerNorm that a script wrote itself."""
    bias = getattr(self, "bias", None)
    return functional.layer_norm(input, self.weight, bias, plan(self).eps)


@fast_forward
def gelu(self: nn.Module, input: Tensor) -> Tensor:
    """The forward of a tanh-GELU module."""
    return functional.gelu(input) if input.dim() else original(self, input)


@fast_forward
def mlp(self: Any, input: Tensor) -> Tensor:
    """The forward of Linear, tanh-GELU, Linear and perhaps Dropout."""
    how: MlpPlan = plan(self)
    parts = self._modules
    fc, proj = parts[how.fc], parts[how.proj]
    if not (is_plain(fc, nn.Linear) and is_plain(proj, nn.Linear)):
        return original(self, input)
    y = functional.gelu_mlp(input, fc.weight, fc.bias, proj.weight, proj.bias)
    return y if how.tail is None else parts[how.tail](y)


def _probability(module: Any, name: str | None) -> float:
    if name is None or not module.training:
        return 0.0
    found = getattr(module, name)
    return found.p if isinstance(found, nn.Dropout) else found


@fast_forward
def attention(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of multi-head self-attention: projection to q, k, v; attention; projection."""
    how: AttentionPlan = plan(self)
    others = (*args, *kwargs.values())
    if x.dim() != 3 or any(value is not None and value is not False for value in others):
        return original(self, x, *args, **kwargs)
    parts = self._modules
    dropout = _probability(self, how.dropout)
    batch, length, _ = x.shape
    if len(how.qkv) == 1:
        qkv = parts[how.qkv[0]](x).view(batch, length, 3, how.heads, -1)
        out = functional.flash_attn_qkvpacked_func(qkv, dropout, causal=how.causal)
    else:
        q, k, v = (parts[name](x).view(batch, length, how.heads, -1) for name in how.qkv)
        out = functional.flash_attn_func(q, k, v, dropout, causal=how.causal)
    y = parts[how.proj](out.reshape(batch, length, -1))
    return y if how.tail is None else parts[how.tail](y)


@fast_forward
def cross_entropy_loss(self: nn.CrossEntropyLoss, input: Tensor, target: Tensor) -> Tensor:
    """nn.CrossEntropyLoss.forward for logits (N, V) and class indices (N,)."""
    plain = (
        not isinstance(input, LazyLogits)
        and self.weight is None
        and input.dim() == 2
        and input.shape[0] > 0
        and target.dim() == 1
        and target.dtype == torch.int64
        and input.device == target.device
    )
    if not plain:
        return original(self, input, target)
    loss = functional.cross_entropy(
        input,
        target,
        ignore_index=self.ignore_index,
        label_smoothing=self.label_smoothing,
        reduction=self.reduction,
    )
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


_KINDS: dict[Callable[..., Any], str] = {
    layer_norm: "layer_norm",
    custom_layer_norm: "layer_norm",
    gelu: "gelu",
    mlp: "mlp",
    attention: "attention",
    cross_entropy_loss: "loss",
    lazy_head: "loss",
    hf_gpt2.attention: "attention",
    hf_gpt2.mlp: "mlp",
    hf_gpt2.embedding: "embedding",
}


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in module._modules.items() if isinstance(m, nn.Linear)}


def _others(module: nn.Module) -> dict[str, nn.Module]:
    """The parts that are neither Linear nor without meaning."""
    return {
        name: part
        for name, part in module._modules.items()
        if part is not None and not isinstance(part, (nn.Linear, nn.Identity))
    }


def _callable(module: nn.Module) -> bool:
    forward = getattr(type(module), "forward", None)
    return forward is not None and forward is not nn.Module.forward  # ModuleDict and ModuleList


def _looks_like_norm(module: nn.Module) -> bool:
    """Whether its only parameters are a weight and perhaps a bias, both (C,), and no part of it."""
    own = dict(module._parameters)
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    return (
        not module._modules
        and not module._buffers
        and not any(p is not None for p in own.values())
        and weight is not None
        and weight.dim() == 1
        and (bias is None or bias.shape == weight.shape)
        and _callable(module)
    )


def _looks_like_gelu(module: nn.Module) -> bool:
    silent = not module._modules and not module._buffers and not module._parameters
    return silent and _callable(module) and "gelu" in type(module).__name__.lower()


def _mlp_plans(module: nn.Module) -> list[MlpPlan]:
    """What `module` may compute if it is an MLP; none if it is not."""
    linears, others = _linears(module), _others(module)
    drops = [name for name, part in others.items() if isinstance(part, nn.Dropout)]
    acts = [name for name, part in others.items() if not isinstance(part, nn.Dropout)]
    if len(linears) != 2 or len(drops) > 1 or len(acts) > 1 or not _callable(module):
        return []
    if acts and any(True for _ in others[acts[0]].parameters()):
        return []
    if not acts and not _source_has(module, "gelu"):
        return []
    first, second = linears
    return [
        MlpPlan(fc, proj, drops[0] if drops else None)
        for fc, proj in ((first, second), (second, first))
        if linears[fc].out_features == linears[proj].in_features
    ]


def _heads(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            found = getattr(holder, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def _attention_plans(module: nn.Module) -> list[AttentionPlan]:
    """What `module` may compute if it is an attention, most likely first; none if it is not."""
    linears = _linears(module)
    packed = [n for n, part in linears.items() if part.out_features == 3 * part.in_features]
    qkv: tuple[str, ...]
    if len(linears) == 2 and len(packed) == 1:
        qkv = (packed[0],)
    else:
        names = [names for names in _SEPARATE if all(name in linears for name in names)]
        if len(linears) != 4 or not names:
            return []
        qkv = names[0]
    (proj,) = (name for name in linears if name not in qkv)
    width, heads = linears[proj].out_features, _heads(module)
    if heads is None or width % heads or not _callable(module):
        return []
    drops = [n for n, part in module._modules.items() if isinstance(part, nn.Dropout)]
    numbers = [n for n in _DROPOUT_NUMBER if isinstance(getattr(module, n, None), float)]
    dropout = next((n for n in _ATTENTION_DROPOUT if n in drops), None)
    tails: list[str | None] = [n for n in drops if n != dropout]
    if dropout is None and numbers:
        dropout = numbers[0]
    if len(tails) > 1:
        return []
    tail = tails[0] if tails else None
    return [AttentionPlan(qkv, proj, heads, causal, dropout, tail) for causal in (True, False)]


def _source_has(module: nn.Module, text: str) -> bool:
    try:
        return text in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


@contextmanager
def _without_attention_dropout(module: Any, how: AttentionPlan) -> Iterator[None]:
    """Sets every number that may be the probability of attention dropout to 0."""
    numbers = {n: v for n in _DROPOUT_NUMBER if isinstance(v := module.__dict__.get(n), float)}
    drop = module._modules.get(how.dropout) if how.dropout else None
    before = drop.p if isinstance(drop, nn.Dropout) else 0.0
    try:
        for name in numbers:
            module.__dict__[name] = 0.0
        if isinstance(drop, nn.Dropout):
            drop.p = 0.0
        yield
    finally:
        module.__dict__.update(numbers)
        if isinstance(drop, nn.Dropout):
            drop.p = before


class _WithoutDropout(TorchFunctionMode):
    """Drops nothing, whatever probability dropout is called with."""

    #: Where a function takes its probability.
    PLACES: ClassVar[dict[Any, tuple[str, int]]] = {
        F.dropout: ("p", 1),
        torch.dropout: ("p", 1),
        F.scaled_dot_product_attention: ("dropout_p", 4),
    }

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in self.PLACES:
            name, place = self.PLACES[function]
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs[name] = 0.0
        return function(*args, **kwargs)


def _placed(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameter = next(module.parameters())
    return parameter.dtype, parameter.device


def _prove(
    module: nn.Module,
    function: Callable[..., Tensor],
    how: Any,
    width: int,
    spread: bool = False,
) -> str | None:
    """None where `function` with plan `how` is proven equal to the module's forward."""
    dtype, device = _placed(module)
    if dtype not in KERNEL_DTYPES and dtype != torch.float64:
        return f"its parameters are {dtype}"

    def ours(part: nn.Module, x: Tensor) -> Tensor:
        return function(part, x)

    length = 13
    mask = next((b for b in module.buffers() if b.dim() >= 2), None)
    if mask is not None:  # a causal mask says how long a sequence may be
        length = min(length, mask.shape[-1])
    generator = torch.Generator().manual_seed(7)
    x = torch.randn((3, length, width), generator=generator)
    if spread:  # rows in which another epsilon, or a lost mean, would show
        x = (
            x * torch.tensor([1e-3, 1.0, 30.0])[:, None, None]
            + torch.tensor([0.0, 1.0, 9.0])[:, None, None]
        )
    module.__dict__["_gpt2fast_plan"] = how
    try:
        return why_not_equal(module, original, ours, x.to(device, dtype))
    finally:
        module.__dict__.pop("_gpt2fast_plan", None)


def _epsilons(module: nn.Module) -> list[float]:
    named = [getattr(module, n, None) for n in ("eps", "epsilon", "variance_epsilon")]
    code = getattr(type(module).forward, "__code__", None)
    literals = [c for c in getattr(code, "co_consts", ()) if isinstance(c, float)]
    found = [e for e in (*named, *literals, 1e-5) if isinstance(e, float) and 0 <= e < 1e-2]
    return list(dict.fromkeys(found))


def _try_norm(module: nn.Module) -> tuple[Callable[..., Any], Any, str | None]:
    why: str | None = "it is no layer norm"
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            return layer_norm, None, f"it normalises {len(module.normalized_shape)} dimensions"
        if not module.elementwise_affine:
            return layer_norm, None, None if type(module) is nn.LayerNorm else "a subclass"
        width = module.normalized_shape[0]
        return layer_norm, None, _prove(module, layer_norm, None, width, spread=True)
    weight = module._parameters["weight"]
    assert weight is not None
    for eps in _epsilons(module):
        how = NormPlan(eps)
        why = _prove(module, custom_layer_norm, how, weight.shape[0], spread=True)
        if why is None:
            return custom_layer_norm, how, None
    return custom_layer_norm, None, why


def _try_mlp(module: nn.Module, plans: list[MlpPlan]) -> tuple[MlpPlan | None, str | None]:
    reasons = []
    for how in plans:
        fc, proj = module._modules[how.fc], module._modules[how.proj]
        for name, part in ((how.fc, fc), (how.proj, proj)):
            if not is_plain(part, nn.Linear):  # type: ignore[arg-type]
                return None, f"{name} is a {type(part).__name__} or has hooks, not a plain Linear"
        assert isinstance(fc, nn.Linear)
        if (why := _prove(module, mlp, how, fc.in_features)) is None:
            return how, None
        reasons.append(why)
        if _is_erf_mlp(module, how, fc.in_features):
            return None, ERF
    return None, f"not Linear, tanh-GELU, Linear: {reasons[0]}"


def _is_erf_mlp(module: nn.Module, how: MlpPlan, width: int) -> bool:
    def with_erf(part: Any, x: Tensor) -> Tensor:
        parts = part._modules
        fc, proj = parts[how.fc], parts[how.proj]
        y = F.linear(F.gelu(F.linear(x, fc.weight, fc.bias)), proj.weight, proj.bias)
        return y if how.tail is None else parts[how.tail](y)

    dtype, device = _placed(module)
    x = torch.randn((2, 5, width), generator=torch.Generator().manual_seed(7))
    return why_not_equal(module, original, with_erf, x.to(device, dtype)) is None


def _try_attention(
    module: nn.Module, plans: list[AttentionPlan]
) -> tuple[AttentionPlan | None, str | None]:
    reasons = []
    for how in plans:
        width = module._modules[how.qkv[0]].in_features  # type: ignore[union-attr]
        with _without_attention_dropout(module, how):
            why = _prove(module, attention, how, width)  # type: ignore[arg-type]
            if why is not None and why.endswith("in training"):
                with _WithoutDropout():
                    if _prove(module, attention, how, width) is None:  # type: ignore[arg-type]
                        why = DROPOUT
        if why is None:
            return how, None
        reasons.append(why)
    if DROPOUT in reasons:
        return None, DROPOUT
    return None, f"not plain causal self-attention: {reasons[0]}"


def _try_head(head: nn.Linear) -> str | None:
    """Proves the fused loss on the first rows of the head's weight: all rows are alike."""
    if (why := why_not_head(head)) is not None:
        return why
    if head.weight.is_meta:
        return "its weight has no values yet (meta device)"
    dtype, device = _placed(head)
    classes = min(head.out_features, 509)
    stand_in = nn.utils.skip_init(  # no random numbers: those of the user stay as they are
        nn.Linear, head.in_features, classes, bias=False, device=device, dtype=dtype
    )
    with torch.no_grad():
        stand_in.weight.copy_(head.weight[:classes])
    generator = torch.Generator().manual_seed(7)
    x = torch.randn((3, 7, head.in_features), generator=generator).to(device, dtype)
    targets = torch.randint(classes, (21,), generator=generator).to(device)
    targets[4] = -100

    def theirs(part: Any, x: Tensor) -> Tensor:
        logits = F.linear(x, part.weight)
        # the loss that torch would give of fp32 logits: of half-precision ones ours is better
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide.view(-1, classes), targets)

    def ours(part: Any, x: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x.view(-1, x.shape[-1]), part.weight, targets)

    return why_not_equal(stand_in, theirs, ours, x)


def _find_heads(module: nn.Module) -> dict[str, nn.Linear]:
    """The Linears over the vocabulary: tied to an embedding, or of the shape of its table."""
    tables = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
    shapes = {tuple(table.shape) for table in tables}
    linears = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and tuple(part.weight.shape) in shapes
    }
    tied = {n: p for n, p in linears.items() if any(p.weight is table for table in tables)}
    if tied or not linears:
        return tied
    # an MLP may happen to be as large as the table of positions, but it lies deeper
    top = min(name.count(".") for name in linears)
    return {n: p for n, p in linears.items() if n.count(".") == top}


def optimize(
    module: nn.Module,
    *,
    attention: bool = True,
    mlp: bool = True,
    layer_norm: bool = True,
    loss: bool = True,
) -> SwapReport:
    """Runs any tree of modules on gpt2fast's kernels wherever they are proven to give the same.

    Parts are found by structure, in scripts in the manner of nanoGPT, build-nanogpt and minGPT and
    in plain modules. Each is replaced only if outputs and every gradient on a probe batch are those
    of the original: the same to 1e-9 in fp64, in evaluation and in training, and in the module's
    dtype with at most twice the original's rounding error. Parameters, classes, hooks and the
    state_dict stay; a part whose projections get hooks or adapters later goes back to its own
    forward by itself. Hugging Face's GPT-2 is handed to
    :func:`gpt2fast.apply_gpt2fast_to_gpt2`.

    Args:
        module: changed in place. Its parameters must have values (not the meta device). The proof
            takes a second or two for a model of 124M parameters on two cores.
        attention: multi-head self-attention, causal or full, with one packed projection to q, k, v
            or three, whatever computes it (scaled_dot_product_attention or matrix products). Dropout
            of probabilities then draws other random numbers than torch's.
        mlp: Linear, tanh-GELU, Linear, perhaps Dropout; and tanh-GELU modules elsewhere. The erf
            form of GELU (nn.GELU()'s default) is another function and is left alone.
        layer_norm: nn.LayerNorm and LayerNorms written by hand, over one dimension.
        loss: the head, a Linear without bias of the shape of an embedding's table, fused with
            torch's cross_entropy wherever that is taken of its logits in training, see
            :class:`gpt2fast.swap.LazyLogits`; and nn.CrossEntropyLoss modules.

    Returns:
        A :class:`gpt2fast.swap.SwapReport`: what was replaced, what was left alone and why.

    Raises:
        TypeError: `module` is no module.

    >>> from torch import nn
    >>> erf = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> print(optimize(erf))
    left alone: mlp: Sequential (the module itself): its GELU is the erf form; the kernel's tanh \
form is another function
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    report = SwapReport()
    wanted = {"attention": attention, "mlp": mlp, "layer_norm": layer_norm, "loss": loss}
    modeling = sys.modules.get("transformers.models.gpt2.modeling_gpt2")
    if modeling is not None and any(
        isinstance(part, modeling.GPT2PreTrainedModel) for part in module.modules()
    ):
        report.entries += hf_gpt2.apply_gpt2fast_to_gpt2(module, **wanted).entries
    _Search(report, wanted).walk(module)
    report._models.append(weakref.ref(module))
    return report


class _Search:
    def __init__(self, report: SwapReport, wanted: dict[str, bool]) -> None:
        self.report = report
        self.wanted = wanted
        self.known = {entry.name for entry in report.entries}
        self.inside: set[nn.Module] = set()  # parts of what was replaced or explained

    def put(
        self,
        name: str,
        module: nn.Module,
        kind: str,
        function: Callable[..., Any],
        how: Any,
        why: str | None,
        note: str = "",
    ) -> None:
        if why is None:
            bind(module, function, how)
        self.report.add(name, module, kind, why, note)

    def walk(self, root: nn.Module) -> None:
        heads = _find_heads(root) if self.wanted["loss"] else {}
        for name, module in root.named_modules():
            if (fast := bound(module)) is not None:
                self.inside.update(module.children())
                if name not in self.known:
                    self.report.add(name, module, _KINDS[fast], None, "replaced before")
            if name in self.known or module in self.inside or fast is not None:
                continue
            self.look(name, module, heads)

    def look(self, name: str, module: nn.Module, heads: dict[str, nn.Linear]) -> None:
        wanted = self.wanted
        if name in heads and isinstance(module, nn.Linear):
            why = obstacle(module) or _try_head(module)
            self.put(name, module, "loss", lazy_head, None, why, LOSS_NOTE)
        elif isinstance(module, nn.CrossEntropyLoss):
            if wanted["loss"]:
                why = "it has class weights" if module.weight is not None else None
                self.put(name, module, "loss", cross_entropy_loss, None, obstacle(module) or why)
        elif isinstance(module, nn.LayerNorm) or _looks_like_norm(module):
            self.norm(name, module)
        elif isinstance(module, nn.MultiheadAttention):
            if wanted["attention"]:
                why = "nn.MultiheadAttention is not supported"
                self.put(name, module, "attention", attention, None, why)
        elif plans := _attention_plans(module):
            self.attention(name, module, plans)
        elif mlps := _mlp_plans(module):
            if wanted["mlp"]:
                how, why = None, obstacle(module)
                if why is None:
                    how, why = _try_mlp(module, mlps)
                self.put(name, module, "mlp", mlp, how, why)
                self.inside.update(module.children() if why in (None, ERF) else ())
        elif _looks_like_gelu(module):
            if wanted["mlp"]:
                why = obstacle(module)
                if why is None and not is_tanh_gelu(module):
                    why = "not the tanh form of GELU"
                self.put(name, module, "gelu", gelu, None, why)
        elif wanted["attention"] and _source_has(module, "scaled_dot_product_attention"):
            why = "it calls scaled_dot_product_attention, but its structure is not known"
            self.put(name, module, "attention", attention, None, why)

    def norm(self, name: str, module: nn.Module) -> None:
        if not self.wanted["layer_norm"]:
            return
        why = obstacle(module)
        function: Callable[..., Any] = layer_norm
        how = None
        if why is None:
            function, how, why = _try_norm(module)
        if why is not None and not isinstance(module, nn.LayerNorm):
            if "norm" not in type(module).__name__.lower():
                return  # a scale of some kind: nobody takes it for a layer norm
            why = f"not a layer norm: {why}"
        self.put(name, module, "layer_norm", function, how, why)

    def attention(self, name: str, module: nn.Module, plans: list[AttentionPlan]) -> None:
        if not self.wanted["attention"]:
            return
        why = obstacle(module)
        how = None
        if why is None:
            how, why = _try_attention(module, plans)
        note = ""
        if how is not None and how.dropout is not None:
            found = getattr(module, how.dropout)
            p = found.p if isinstance(found, nn.Dropout) else found
            note = "dropout drawn by our kernel" if p > 0 else ""
        self.put(name, module, "attention", attention, how, why, note)
