"""GPT-2: configuration, model, key/value cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2fast import functional
from gpt2fast.backends import choose
from gpt2fast.nn import Attend, Block, LayerNorm, init_gpt2
from gpt2fast.ops.registry import is_eager, once_differentiable
from gpt2fast.optim import AdamW

__all__ = ["GPT", "GPTConfig", "KVCache"]

#: n_layer, n_head, n_embd: the four sizes of GPT-2 and three for a laptop.
SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "nano": (4, 4, 128),
    "micro": (4, 4, 256),
    "mini": (6, 6, 384),
}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2.

    `vocab_size` counts the classes; the embedding and the tied head have `padded_vocab_size` rows,
    the next multiple of `pad_vocab_to` (50257 -> 50304). Pad rows are zero, never a target, never
    sampled, and carry no probability in the loss.

    Raises:
        ValueError: a size below one, n_embd not divisible by n_head, or dropout not in [0, 1).

    >>> config = gpt2fast.GPTConfig.from_name("gpt2", block_size=512)
    >>> config.n_layer, config.n_embd, config.padded_vocab_size
    (12, 768, 50304)
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    block_size: int = 1024
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    pad_vocab_to: int = 64

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "pad_vocab_to"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @classmethod
    def from_name(cls, name: str, **overrides: int | float) -> GPTConfig:
        """A named size; keyword arguments override single fields.

        >>> GPTConfig.from_name("gpt2").n_embd
        768
        """
        if name not in SIZES:
            raise ValueError(f"unknown model {name!r}; known are {', '.join(SIZES)}")
        n_layer, n_head, n_embd = SIZES[name]
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        return cls(**{**shape, **overrides})  # type: ignore[arg-type]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the tied head."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


class KVCache:
    """Keys and values of the positions seen so far: `capacity` positions of a batch.

    Args:
        config: the model's shape.
        batch_size: B.
        capacity: how many positions fit, at most and by default block_size.
        dtype, device: those of the model's activations.

    Attributes:
        length: how many positions are taken; the next token's position.
        positions: those of a call's tokens, (B, T), where they do not go on from `length`.

    Keys and values are (capacity, H, D) for each layer and row of the batch, D = n_embd / n_head.

    Raises:
        ValueError: a capacity that is not 1 to block_size.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16)).eval()
    >>> cache = model.new_cache(batch_size=1)
    >>> with torch.no_grad():
    ...     logits = model.forward_cached(torch.tensor([[3, 1, 4]]), cache)
    ...     logits = model.forward_cached(torch.tensor([[1]]), cache)  # reads the three from the cache
    >>> logits.shape, cache.length
    (torch.Size([1, 10]), 4)
    """

    positions: Tensor | None = None

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = config.block_size if capacity is None else capacity
        if not 1 <= self.capacity <= config.block_size:
            raise ValueError(
                f"capacity must be between 1 and block_size={config.block_size}, got {capacity}"
            )
        head_size = config.n_embd // config.n_head
        # (n_layer, B, T, H, D) as seen; what a head reads lies in one piece.
        shape = (config.n_layer, batch_size, config.n_head, self.capacity, head_size)
        self.keys = torch.empty(shape, dtype=dtype, device=device).transpose(2, 3)
        self.values = torch.empty(shape, dtype=dtype, device=device).transpose(2, 3)
        self.length = 0

    def attention(self, layer: int) -> Attend:
        """For `layer`: stores new keys and values, and attends to all so far."""

        def attend(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
            end = self.length + key.shape[1]
            self.keys[layer][:, self.length : end] = key
            self.values[layer][:, self.length : end] = value
            past = self.keys[layer][:, :end], self.values[layer][:, :end]
            return functional.flash_attn_func(query, *past, dropout_p=dropout_p, causal=True)

        return attend


class Layer(Block):
    """A block between others, which leaves its last sum to the next norm.

    All it computes is computed in its call, by its own parameters: so FSDP can gather these before
    and free them after it, and activations can be recomputed a layer at a time.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        branch: Tensor | None,
        attend: Attend | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`gpt2fast.nn.Block.branches`."""
        return self.branches(x, branch, attend, cu_seqlens)


class Transformer(nn.Module):
    """Embeddings, blocks and the final norm: everything below the tied head.

    With `gradient_checkpointing` set, a block's activations are not kept for backward but computed
    again there, with the same dropout: less memory for about a third more computation.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`GPT.hidden`; `table` stands for wte.weight."""
        wte = self.wte.weight if table is None else table
        sparse = wte is not self.wte.weight
        positions = None if cache is None else cache.positions
        if cu_seqlens is not None:
            positions = _positions_in_documents(idx, cu_seqlens)
        if positions is None:
            position = 0 if cache is None else cache.length
            x = functional.embedding(idx, wte, self.wpe.weight, position, sparse)
        else:
            x = self._embed_at(idx, positions, wte, sparse)
        x, branch = self.drop(x), None
        for layer, block in enumerate(self.h):
            attend = None if cache is None else cache.attention(layer)
            if self.gradient_checkpointing and self.training:
                x, branch = checkpoint(block, x, branch, attend, cu_seqlens, use_reentrant=False)
            else:
                x, branch = block(x, branch, attend, cu_seqlens)
        assert branch is not None  # there is a block
        _, y = self.ln_f.add(x, branch)
        if cache is not None:
            cache.length += idx.shape[1]
        return y

    def _embed_at(self, idx: Tensor, positions: Tensor, wte: Tensor, sparse: bool) -> Tensor:
        """Token and position embedding of tokens (B, T) at positions (B, T)."""
        # The function adds rows of a second table by place: here none, as places are not positions.
        nothing = wte.new_zeros(idx.shape[1], wte.shape[1])
        tokens = functional.embedding(idx, wte, nothing, sparse=sparse)
        return tokens + functional.embedding(positions, self.wpe.weight, nothing)


def _positions_in_documents(idx: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The positions (B, T) of tokens (B, T), counted from 0 in each document."""
    where = torch.arange(idx.numel(), dtype=torch.int32, device=idx.device)
    document = torch.searchsorted(cu_seqlens, where, right=True) - 1
    return (where - cu_seqlens[document]).view(idx.shape)


class _Tied(torch.autograd.Function):
    """The weight of embedding and head, whose gradient is one dense tensor.

    The embedding's part is sparse and is added to the head's in place: nobody else has that, since
    both uses make theirs anew. Two dense gradients would be filled and added whole.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor | None, table: Tensor | None) -> Tensor | None:
        if rows is None or table is None:
            return rows.to_dense() if rows is not None else table
        return table.add_(rows)


class GPT(nn.Module):
    """GPT-2 with pre-norm blocks, learned positions and a head tied to the token embedding.

    The state_dict has nanoGPT's names (``transformer.h.0.attn.c_attn.weight``, nn.Linear layout),
    without the tied ``lm_head.weight``. Runs wholly on plain PyTorch under
    ``gpt2fast.use_backend("reference")``.

    >>> model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=10, block_size=16))
    >>> idx = torch.zeros(2, 5, dtype=torch.int64)
    >>> model(idx).shape
    torch.Size([2, 5, 10])
    >>> logits, loss = model(idx, targets=idx)
    """

    #: In config.json.
    model_type = "gpt2"
    #: What is below the head.
    body: type[nn.Module] = Transformer

    transformer: Transformer

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = self.body(config)  # type: ignore[assignment]
        init_gpt2(self, config.n_layer, generator)
        with torch.no_grad():
            self.transformer.wte.weight[config.vocab_size :].zero_()

    def num_parameters(self) -> int:
        """All parameters, the padding of the vocabulary included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> float:
        """FLOPs of forward and backward per token at sequence length `length`, by multiplications.

        6 per matrix weight (the tied head once, no embedding look-up) and 6 T C a layer for the
        causal half of the attention: 12 T C / 2 (Chowdhery et al. 2022, appendix B).
        """
        config = self.config
        weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
        return 6.0 * weights + 6.0 * config.n_layer * length * config.n_embd

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The final norm's output (B, T, C) for token ids idx (B, T), before the head.

        With a cache, idx continues the positions that the cache holds and is added to it. For
        `cu_seqlens` see `forward`.

        Raises:
            TypeError, ValueError: idx is not a (B, T) integer tensor, or too long; a cache and
                cu_seqlens are both given.
        """
        self._check_length(idx, cache, cu_seqlens)
        return self.transformer(idx, cache, cu_seqlens)

    def _check_length(self, idx: Tensor, cache: KVCache | None, cu_seqlens: Tensor | None) -> None:
        if not isinstance(idx, Tensor) or idx.dim() != 2:
            raise ValueError(f"idx must be a tensor of shape (B, T), got {_describe(idx)}")
        position = 0 if cache is None else cache.length
        limit = self.config.block_size if cache is None else cache.capacity
        if position + idx.shape[1] > limit:
            raise ValueError(
                f"idx has {idx.shape[1]} positions after {position} cached ones, more than {limit}"
            )
        if cache is not None and cu_seqlens is not None:
            raise ValueError("a cache holds one document a row: cu_seqlens cannot be given, too")

    def _tables(self) -> tuple[Tensor, Tensor]:
        """The tied weight, as the embedding and as the head are to use it.

        The reference is differentiated by PyTorch alone, any number of times.
        """
        weight = self.transformer.wte.weight
        trained = torch.is_grad_enabled() and weight.device.type == "cpu" and is_eager(weight)
        if trained and choose(weight, "embedding") != "reference":
            return _Tied.apply(weight)
        return weight, weight

    def head(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., C); a view without the pad columns."""
        table = self.transformer.wte.weight if table is None else table
        return nn.functional.linear(hidden, table)[..., : self.config.vocab_size]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_logits: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Logits, or logits and loss.

        Args:
            idx: token ids (B, T), int64, T <= block_size.
            targets: token ids (B, T) that each position should predict; -100 is left out.
            return_logits: also give the logits beside the loss, at the cost of their memory.
            cu_seqlens: borders of packed documents, (D + 1,), int32, on idx's device, as
                `flash_attn_varlen_func` takes them: counted over the B T tokens with the rows end
                to end, rising from 0 to B T; none longer than T. No document sees another, and the
                positions of each count from 0: its logits are those of the document alone.

        Returns:
            Without targets the logits (B, T, vocab_size); with targets (logits or None, mean loss
            in nats, fp32).

        Raises:
            TypeError, ValueError: a wrong argument, named.
            IndexError: a token id outside the vocabulary (CPU backend; elsewhere by contract).
        """
        self._check_length(idx, None, cu_seqlens)
        rows, table = self._tables()
        hidden = self.transformer(idx, None, cu_seqlens, rows)
        if targets is None:
            return self.head(hidden, table)
        if not isinstance(targets, Tensor) or targets.shape != idx.shape:
            raise ValueError(
                f"targets must have the shape of idx, {tuple(idx.shape)}, got {_describe(targets)}"
            )
        if not return_logits:
            loss = functional.linear_cross_entropy(
                hidden, table, targets, vocab_size=self.config.vocab_size
            )
            return None, loss
        logits = self.head(hidden, table)
        return logits, functional.cross_entropy(logits, targets)

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `forward_cached`, of the weights' dtype and device."""
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def forward_cached(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, vocab_size) of the last position of idx (B, T), which continues `cache`."""
        return self.head(self.hidden(idx, cache)[:, -1])

    def configure_optimizer(
        self,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        max_norm: float | None = None,
        **options: bool,
    ) -> AdamW:
        """AdamW with GPT-2's groups: matrices and embeddings decay, biases and norms do not.

        `max_norm` clips the global gradient norm inside the step (None: no clipping); `options` are
        further ones of :class:`gpt2fast.optim.AdamW`.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=lr, betas=betas, eps=eps, max_norm=max_norm, **options)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dropout: float = 0.0, revision: str | None = None
    ) -> GPT:
        """A pretrained model in evaluation mode, with the weights and dtype of its files.

        Args:
            name: a Hugging Face GPT-2 folder (config.json, safetensors); an llm.c .bin file;
                "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"; or "owner/name" of a GPT-2 on the
                Hugging Face Hub. What came from the Hub stays in huggingface_hub's cache. Pickles
                are never read.
            dropout: of the model in training.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            ValueError: it is not a GPT-2, or its tensors do not fit its configuration.
            ModelUnavailable: a RuntimeError: neither in the cache nor to be had from the Hub;
                says what to do.
        """
        from gpt2fast import huggingface, llmc

        path = huggingface.locate(name, revision)
        if path.is_file():
            return llmc.load(path, dropout=dropout)
        return huggingface.load(path, dropout=dropout)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which GPT2LMHeadModel.from_pretrained opens.

        Existing files of these names are replaced, each in one step; the folder is made if needed.
        """
        from gpt2fast import huggingface

        huggingface.save(self, folder)


def _describe(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
