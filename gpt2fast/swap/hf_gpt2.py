"""The kernels inside Hugging Face's GPT-2 (transformers 4.57 and later), with its own modules kept.

Five forwards are replaced, on instances: `GPT2Attention`, `GPT2MLP`, `LayerNorm`, `Embedding` and
the head. Each decides at every call whether it covers the call, and hands it to Hugging Face's
forward where not:

- attention: no mask (Hugging Face builds none where nothing is padded and `attn_implementation` is
  "sdpa"), with or without a key/value cache; and the mask of a padded batch, left or right, without
  tokens in the cache before it, as documents of different length. Packed sequences, any other mask,
  cross-attention, returned attention weights: Hugging Face's, which obeys the mask.
- MLP: the tanh-GELU, with projections that are plain Conv1D. An adapter (LoRA) or a hook on one of
  them: Hugging Face's.
- embedding: in training, for its gradient: torch's writes the whole table with zeros first.
- head: in training the logits are lazy, see :mod:`gpt2fast.swap.lazy_logits`. Any loss function
  that ends in torch's cross_entropy is fused with the head; `outputs.logits` is right whenever
  it is looked at.
"""

from __future__ import annotations

import functools
import importlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt2fast import functional
from gpt2fast.backends import keep_freed_memory
from gpt2fast.nn import is_plain
from gpt2fast.swap.conv1d import conv1d, conv1d_gelu_mlp
from gpt2fast.swap.lazy_logits import lazy_head
from gpt2fast.swap.proof import is_tanh_gelu
from gpt2fast.swap.report import (
    Entry,
    SwapReport,
    bind,
    bound,
    fast_forward,
    obstacle,
    original,
)

#: Keywords of GPT2Attention.forward, in one version or another, that do not change its result.
_HARMLESS = frozenset(
    {"use_cache", "position_ids", "cache_position", "output_hidden_states", "return_dict"}
    | {"encoder_attention_mask", "num_items_in_batch"}
)
#: Those that ask for what our attention does not do.
_THEIRS = frozenset(
    {"encoder_hidden_states", "output_attentions", "head_mask"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
#: Of transformers, filled when it is imported.
_CLASSES: dict[str, Any] = {}
LOSS_NOTE = "in training the logits are computed only where something else than a loss reads them"


def _modeling() -> Any:
    try:
        return importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    except ImportError as error:
        raise ImportError(
            "apply_gpt2fast_to_gpt2 needs Hugging Face transformers: `pip install transformers`"
        ) from error


@fast_forward
def attention(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    *args: Any,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,  # the cache's name before transformers 5.24
    **kwargs: Any,
) -> Any:
    """GPT2Attention.forward on packed qkv."""
    cache = past_key_values if cache is None else cache
    rows = None if attention_mask is None else _unpadded(attention_mask, hidden_states)
    if (
        args
        or (attention_mask is not None and rows is None)
        or self.config._attn_implementation != "sdpa"
        or torch.jit.is_tracing()
        or hasattr(cache, "self_attention_cache")  # of an encoder-decoder
        or any(name not in _HARMLESS and value for name, value in _present(kwargs))
    ):
        _warn_of_unknown(frozenset(name for name, value in _present(kwargs) if value))
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        return original(self, hidden_states, cache, *args, **kwargs)
    batch, length, _ = hidden_states.shape
    qkv = _project(self.c_attn, hidden_states)
    qkv = qkv.view(batch, length, 3, self.num_heads, self.head_dim)
    dropout = self.attn_dropout.p if self.training else 0.0
    scale = getattr(self, "scaling", None)  # 4.57: SDPA's own, 1 / sqrt(head size)
    packed = True
    if cache is not None:
        query, key, value = qkv.unbind(2)
        at = kwargs.get("cache_position")  # 4.57: a cache of fixed size has to be told
        key, value = cache.update(
            key.transpose(1, 2),
            value.transpose(1, 2),
            self.layer_idx,
            *(() if at is None else ({"cache_position": at},)),
        )
        packed = key.shape[2] == length
    if rows is not None:
        out = _padded_attention(qkv, rows, dropout, scale)
    elif packed:
        out = functional.flash_attn_qkvpacked_func(qkv, dropout, scale, causal=True)
    else:
        if length > 1:  # without a mask: the first call on an empty cache of fixed size
            key, value = key[:, :, :length], value[:, :, :length]
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        out = functional.flash_attn_func(query, key, value, dropout, scale, causal=length > 1)
    out = _project(self.c_proj, out.reshape(batch, length, -1))
    return self.resid_dropout(out), None


@functools.cache
def _warn_of_unknown(names: frozenset[str]) -> None:
    """Says once that a version of transformers asks for something that we have not heard of."""
    if unknown := names - _HARMLESS - _THEIRS:
        warnings.warn(
            f"transformers gives GPT2Attention.forward {', '.join(sorted(unknown))}, which this version"
            " of gpt2fast does not know: its attention leaves such calls to transformers' own",
            stacklevel=4,
        )


def _project(module: Any, x: Tensor) -> Tensor:
    """A Conv1D's forward; an adapter or a hook is called as it is."""
    if is_plain(module, _CLASSES["Conv1D"]):
        return conv1d(x, module.weight, module.bias)
    return module(x)


@dataclass(frozen=True)
class _Rows:
    """Where the tokens of a padded batch lie: the first and the end of every row."""

    begin: Tensor  # (B,) int32, as all here
    end: Tensor
    right: bool  # whether a row has padding behind its tokens


def _unpadded(mask: Tensor, hidden_states: Tensor) -> _Rows | None:
    """The rows of a mask that hides the future and padding before and behind the tokens, or None.

    Every layer asks of the same mask: the answer is kept on it.
    """
    batch, length, _ = hidden_states.shape
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(mask) is not Tensor:
        return None
    if mask.dtype != torch.bool or mask.shape != (batch, 1, length, length) or not mask.numel():
        return None
    known = getattr(mask, "_gpt2fast_rows", None)
    if known is not None and known[0] == mask._version:
        return known[1]
    keys = mask[:, 0, -1]  # the last query sees all that are no padding
    position = torch.arange(length, device=mask.device, dtype=torch.int32)
    begin = torch.where(keys, position, length).amin(1)
    end = torch.where(keys, position + 1, 0).amax(1)
    seen = (position >= begin[:, None]) & (position < end[:, None])
    causal = position[:, None] >= position
    rows = None
    if torch.equal(mask[:, 0], seen[:, None] & causal):
        rows = _Rows(torch.minimum(begin, end), end, bool((end < length).any()))
    mask._gpt2fast_rows = (mask._version, rows)  # type: ignore[attr-defined]
    return rows


def _padded_attention(qkv: Tensor, rows: _Rows, dropout: float, scale: float | None) -> Tensor:
    """Attention of packed qkv (B, T, 3, H, D) within the tokens of each row, without a copy of them.

    What sdpa gives for padding is given, too: 0 before the tokens, where no key is seen, and the
    attention to all tokens behind them. Each row is a few documents, of which those of padding have
    either queries or keys.
    """
    batch, length = qkv.shape[:2]
    q, k, v = qkv.flatten(0, 1).unbind(1)
    start = length * torch.arange(batch, device=qkv.device, dtype=torch.int32)[:, None]
    before, after = rows.begin[:, None], rows.end[:, None]
    none, whole = torch.zeros_like(before), torch.full_like(before, length)

    def attend(queries: list[Tensor], keys: list[Tensor], causal: bool) -> Tensor:
        # the ends of a row's documents, counted from its start
        q_starts, k_starts = (
            torch.cat([start[0], (start + torch.cat(e, 1)).flatten()]) for e in (queries, keys)
        )
        return functional.flash_attn_varlen_func(
            q, k, v, q_starts, k_starts, length, length, dropout, scale, causal
        )

    # padding before (queries, then keys), the tokens, padding behind (queries, then keys)
    out = attend(
        [before, before, after, whole, whole], [none, before, after, after, whole], causal=True
    )
    if rows.right:
        # padding before and the tokens (queries), padding before (keys); padding behind; its keys
        out = out + attend([after, after, whole, whole], [none, before, after, whole], causal=False)
    return out.view(batch, length, *out.shape[1:])


def _present(kwargs: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    # not `value in (None, False)`: a tensor has no truth value of its own
    for name, value in kwargs.items():
        yield name, value is not None and value is not False


@fast_forward
def mlp(self: Any, hidden_states: Tensor) -> Tensor:
    """GPT2MLP.forward, c_fc, GELU and c_proj as one."""
    fc, proj, conv1d = self.c_fc, self.c_proj, _CLASSES["Conv1D"]
    if not (is_plain(fc, conv1d) and is_plain(proj, conv1d)):
        return original(self, hidden_states)
    y = conv1d_gelu_mlp(hidden_states, fc.weight, fc.bias, proj.weight, proj.bias)
    return self.dropout(y)


@fast_forward
def layer_norm(self: nn.LayerNorm, input: Tensor) -> Tensor:
    """nn.LayerNorm.forward over the last dimension."""
    return functional.layer_norm(input, self.weight, self.bias, self.eps)


@fast_forward
def embedding(self: nn.Embedding, input: Tensor) -> Tensor:
    """nn.Embedding.forward without its options."""
    if not (torch.is_grad_enabled() and self.weight.requires_grad):
        return original(self, input)
    # every token stands at position 0 of a table of positions that adds nothing
    nothing = self.weight.new_zeros((1, self.weight.shape[1]))
    rows = functional.embedding(input.reshape(-1, 1), self.weight, nothing)
    return rows.view(*input.shape, -1)


def _why_not_attention(module: Any, modeling: Any) -> str | None:
    if type(module) is not modeling.GPT2Attention:
        return "a subclass of GPT2Attention"
    if module.is_cross_attention:
        return "cross-attention"
    if module.config._attn_implementation != "sdpa":
        return (
            f"attn_implementation={module.config._attn_implementation!r} was chosen;"
            ' model.set_attn_implementation("sdpa") first'
        )
    return None


def _why_not_mlp(module: Any, modeling: Any) -> str | None:
    if type(module) is not modeling.GPT2MLP:
        return "a subclass of GPT2MLP"
    for name in ("c_fc", "c_proj"):
        if type(part := getattr(module, name)) is not modeling.Conv1D:
            return f"{name} is a {type(part).__name__}, not a plain Conv1D"
    if not is_tanh_gelu(module.act):
        return f"its activation {type(module.act).__name__} is not the tanh-GELU"
    return None


def _why_not_layer_norm(module: nn.LayerNorm) -> str | None:
    if type(module) is not nn.LayerNorm:
        return "a subclass of LayerNorm"
    if len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} dimensions"
    return None


def _why_not_embedding(module: nn.Embedding) -> str | None:
    if type(module) is not nn.Embedding:
        return "a subclass of Embedding"
    for name, plain in (("padding_idx", None), ("max_norm", None), ("sparse", False)):
        if (value := getattr(module, name)) != plain:
            return f"{name}={value}"
    return "scale_grad_by_freq=True" if module.scale_grad_by_freq else None


def why_not_head(module: nn.Module) -> str | None:
    """Why `module` cannot be a head that is fused with its loss, or None."""
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, not a plain Linear"
    if module.bias is not None:
        return "it has a bias"
    return None


def _swap(
    model: nn.Module, report: SwapReport, wanted: dict[str, bool], modeling: Any, prefix: str = ""
) -> None:
    """Binds what is wanted in one model and writes the account."""

    def put(
        name: str,
        module: nn.Module,
        kind: str,
        function: Callable[..., Any],
        why: str | None,
        note: str = "",
    ) -> None:
        if not wanted[kind]:
            return
        if bound(module) is None:
            why = obstacle(module) or why
            if why is None:
                bind(module, function)
        report.add(prefix + name, module, kind, why, note)

    for name, module in model.named_modules():
        if isinstance(module, modeling.GPT2Attention):
            dropout = module.attn_dropout.p > 0
            put(
                name,
                module,
                "attention",
                attention,
                _why_not_attention(module, modeling),
                "dropout drawn by our kernel" if dropout else "",
            )
        elif isinstance(module, modeling.GPT2MLP):
            put(name, module, "mlp", mlp, _why_not_mlp(module, modeling))
        elif isinstance(module, nn.LayerNorm):
            put(name, module, "layer_norm", layer_norm, _why_not_layer_norm(module))
        elif isinstance(module, nn.Embedding):
            put(name, module, "embedding", embedding, _why_not_embedding(module))
        elif isinstance(module, modeling.GPT2PreTrainedModel) and hasattr(module, "lm_head"):
            where = f"{name}.lm_head" if name else "lm_head"
            why = why_not_head(module.lm_head)
            if not isinstance(module, modeling.GPT2LMHeadModel):
                why = f"the head of {type(module).__name__}"
            put(where, module.lm_head, "loss", lazy_head, why, LOSS_NOTE)


def apply_gpt2fast_to_gpt2(
    model: nn.Module | None = None,
    attention: bool = True,
    mlp: bool = True,
    layer_norm: bool = True,
    loss: bool = True,
    keep_memory: bool = True,
    embedding: bool = True,
) -> SwapReport:
    """Runs a Hugging Face GPT-2 on gpt2fast's kernels; weights, classes and results stay the same.

    Args:
        model: a model that is or holds Hugging Face GPT-2 modules (also inside a wrapper), changed
            in place. None: every GPT-2 that is built from now on, by its class or by
            ``from_pretrained``, until the report's `revert`.
        attention: GPT2Attention where nothing is masked but the future and padding; other masks,
            and every other call that the kernel does not cover, go to Hugging Face's own.
            Dropout of attention probabilities draws other random numbers than torch's.
        mlp: GPT2MLP with the tanh-GELU.
        layer_norm: every LayerNorm over one dimension in the model.
        loss: the head and the cross-entropy as one in training. `outputs.logits` are then
            :class:`gpt2fast.swap.LazyLogits`: computed where something else than a loss
            reads them. Under torch.compile the graph ends before the head for that; with
            fullgraph=True, in evaluation and in generation they are plain.
        keep_memory: for training on a CPU, :func:`gpt2fast.keep_freed_memory`, which holds for the
            whole process and is not undone by `revert`.
        embedding: the tables of tokens and positions, in training.

    Returns:
        A :class:`gpt2fast.swap.SwapReport`: what was replaced, what was left alone and why. Its
        `revert()` undoes all of it. For `model=None` it tells of all models built since that live.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no GPT-2 in `model`.
        ImportError: transformers is not installed.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
    >>> report = apply_gpt2fast_to_gpt2(model)
    >>> report.counts()
    {'loss': 1, 'embedding': 2, 'layer_norm': 5, 'attention': 2, 'mlp': 2}
    >>> report.revert()
    12
    """
    modeling = _modeling()
    _CLASSES["Conv1D"] = modeling.Conv1D
    wanted = {"attention": attention, "mlp": mlp, "layer_norm": layer_norm, "loss": loss}
    wanted["embedding"] = embedding
    report = SwapReport()
    if model is None:
        _swap_classes(report, wanted, modeling)
        if keep_memory and not torch.cuda.is_available():
            keep_freed_memory()
        return report
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(m, modeling.GPT2PreTrainedModel) for m in model.modules()):
        parts = (modeling.GPT2Block, modeling.GPT2Attention, modeling.GPT2MLP)
        if not any(isinstance(m, parts) for m in model.modules()):
            raise ValueError(
                f"model, a {type(model).__name__}, holds no Hugging Face GPT-2; for other models see"
                " gpt2fast.optimize"
            )
    _swap(model, report, wanted, modeling)
    report._models.append(weakref.ref(model))
    if keep_memory and any(p.device.type == "cpu" for p in model.parameters()):
        keep_freed_memory()
    return report


def _swap_classes(report: SwapReport, wanted: dict[str, bool], modeling: Any) -> None:
    """Makes every GPT-2 swap itself at the end of its __init__, by its `post_init`."""
    base = modeling.GPT2PreTrainedModel
    before = base.__dict__.get("post_init")
    built: list[tuple[weakref.ref[nn.Module], list[Entry]]] = []

    def post_init(self: nn.Module) -> None:
        inherited = before or super(base, self).post_init
        inherited(self) if before else inherited()
        part = SwapReport()
        _swap(self, part, wanted, modeling)
        # A model with a head holds one without, which came first: it speaks for both.
        inside = set(self.modules())
        kept = [(r, e) for r, e in built if (m := r()) is not None and m not in inside]
        built[:] = [*kept, (weakref.ref(self), part.entries)]
        report.entries[:] = [entry for _, entries in built for entry in entries]
        report._models[:] = [reference for reference, _ in built]

    def undo() -> None:
        if base.__dict__.get("post_init") is not post_init:
            raise RuntimeError(
                "GPT2PreTrainedModel.post_init was replaced again after gpt2fast; undo that first"
            )
        if before is None:
            del base.post_init
        else:
            base.post_init = before

    base.post_init = post_init
    report._undo.append(undo)
