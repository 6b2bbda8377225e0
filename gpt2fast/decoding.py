"""Decoding on a CPU: a GPT's weights as fp32, bf16 or int8, read once a step by one C++ call.

For a few rows a matrix product takes as long as its weights take to arrive from memory: weights
of half or a quarter of the bytes decode in half or a quarter of the time. int8 weights have a scale
an output: w = q s with s = max|w| / 127, so that |w - q s| <= s / 2. Activations are fp32; beside
int8 weights they are rounded to 16 bits within a product.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from gpt2fast import backends, functional
from gpt2fast.model import GPT, KVCache, Layer, Transformer
from gpt2fast.nn import MLP, CausalSelfAttention, LayerNorm, Linear
from gpt2fast.ops.registry import pointer

__all__ = ["WEIGHTS", "Decoder", "PackedWeight", "Weights", "pack", "suits"]

Weights = Literal["float32", "bfloat16", "int8"]
WEIGHTS: Final[tuple[Weights, ...]] = get_args(Weights)
#: Rows of one call: more would not be bound by the weights' bytes.
ROWS: Final = 64

_PLAIN: Final = (
    GPT, Transformer, Layer, CausalSelfAttention, MLP, LayerNorm,
    Linear, nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList,
)  # fmt: skip


@dataclass(frozen=True)
class PackedWeight:
    """A matrix (N, K): `data` in fp32, bf16 or int8, for int8 with `scale` (N,) fp32.

    >>> weight = pack(torch.tensor([[0.0, 1.27]]), "int8")
    >>> weight.data, weight.nbytes
    (tensor([[  0, 127]], dtype=torch.int8), 6)
    >>> weight.linear(torch.ones(3, 2)).shape
    torch.Size([3, 1])
    """

    data: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantize(self) -> Tensor:
        """The matrix that it stands for, fp32 (N, K)."""
        data = self.data.float()
        return data if self.scale is None else data * self.scale[:, None]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (M, K) times the transposed matrix, plus bias (N,): fp32 (M, N), M best below 64.

        Raises:
            TypeError: x or bias is not an fp32 CPU tensor.
            ValueError: a shape does not fit.
        """
        outputs, columns = self.data.shape
        for name, value in (("x", x), ("bias", bias)):
            if value is not None and (value.dtype != torch.float32 or value.device.type != "cpu"):
                raise TypeError(
                    f"{name} must be fp32 on the CPU, got {value.dtype}, {value.device}"
                )
        if x.dim() != 2 or x.shape[1] != columns:
            raise ValueError(f"x must have shape (M, {columns}), got {tuple(x.shape)}")
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(f"bias must have shape ({outputs},), got {tuple(bias.shape)}")
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        kernels = backends.cpu_kernels()
        y = x.new_empty((x.shape[0], outputs))
        workspace = x.new_empty(kernels.few_rows_workspace(*x.shape))
        kernels.few_rows_linear(
            x.data_ptr(),
            self.data.data_ptr(),
            pointer(self.scale),
            pointer(bias),
            y.data_ptr(),
            workspace.data_ptr(),
            *x.shape,
            outputs,
            WEIGHTS.index(_name(self.data)),
            torch.get_num_threads(),
        )
        return y


def _name(data: Tensor) -> Weights:
    names: dict[torch.dtype, Weights] = {torch.bfloat16: "bfloat16", torch.int8: "int8"}
    return names.get(data.dtype, "float32")


def _check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")


@torch.no_grad()
def pack(weight: Tensor, weights: Weights) -> PackedWeight:
    """A matrix (N, K) on the CPU as `weights`; fp32 and bf16 that are so already are not copied.

    Raises:
        ValueError: there are no such weights.

    >>> pack(torch.randn(4, 8), "bfloat16").data.dtype
    torch.bfloat16
    """
    _check_weights(weights)
    if weights != "int8":
        return PackedWeight(weight.detach().to(getattr(torch, weights)).contiguous())
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    inverse = torch.where(scale > 0, scale, 1.0)
    data = (weight / inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8).contiguous()
    return PackedWeight(data, scale)


def suits(model: GPT) -> bool:
    """Whether `Decoder` computes what the model does: plain modules on the CPU, no hooks.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16))
    >>> suits(model)
    True
    >>> _ = model.register_forward_hook(lambda module, inputs, output: None)
    >>> suits(model)
    False
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return next(model.parameters()).device.type == "cpu" and not any(
        type(module) not in _PLAIN or any(getattr(module, name) for name in hooks)
        for module in model.modules()
    )


class _HugePages:
    """Memory for copied weights, in the order of reading, on huge pages where there are some.

    A step reads all weights: on pages of 4 KB looking up their addresses is a part of the time.
    """

    def __init__(self, nbytes: int) -> None:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            private = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without them
                private.madvise(mmap.MADV_HUGEPAGE)
            self.free = torch.frombuffer(private, dtype=torch.uint8)
        else:
            self.free = torch.empty(nbytes, dtype=torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in this memory, on cache lines of its own."""
        piece = self.free[: tensor.nbytes]
        self.free = self.free[_cache_lines(tensor.nbytes) :]
        return piece.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _cache_lines(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


class Decoder(nn.Module):
    """A GPT that continues a key/value cache by one C++ call a step, without gradients.

    Called as the model is, it gives logits or the loss, computed by the same kernels. Weights of the
    model's own dtype are shared with it, others are copied: then the model is no longer needed.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16))
    >>> decoder = Decoder(model, "int8")
    >>> decoder.forward_cached(torch.tensor([[1, 2, 3]]), decoder.new_cache(1)).shape
    torch.Size([1, 10])

    Args:
        model: on the CPU, with its own modules and no hooks.
        weights: "float32", "bfloat16" or "int8".

    Raises:
        ValueError: an unknown name, or a model of which the decoder would compute something else.
        gpt2fast.backends.BackendUnavailable: the C++ kernels are not there.
    """

    def __init__(self, model: GPT, weights: Weights = "float32") -> None:
        super().__init__()
        _check_weights(weights)
        if not suits(model):
            raise ValueError("model must be a GPT on the CPU with its own modules and no hooks")
        self.config = model.config
        self.weights = weights
        self.kernels = backends.cpu_kernels()
        #: Prompts go through the training kernels where there are fp32 weights for them.
        own = all(p.dtype == torch.float32 for p in model.parameters())
        self.model = model if weights == "float32" and own else None
        self._tensors: list[
            Tensor | None
        ] = []  # in the order of csrc/decode/decode_cpu.cpp's table
        transformer = model.transformer
        itemsize = getattr(torch, weights).itemsize
        matrices = [p for p in model.parameters() if p.dim() == 2]
        self._pages = _HugePages(sum(_cache_lines(p.numel() * itemsize) for p in matrices))
        for block in transformer.h:
            assert isinstance(block, Layer)
            self._add_norm(block.ln_1)
            self._add_linear(block.attn.c_attn)
            self._add_linear(block.attn.c_proj)
            self._add_norm(block.ln_2)
            self._add_linear(block.mlp.c_fc)
            self._add_linear(block.mlp.c_proj)
        self._add_norm(transformer.ln_f)
        self._add_matrix(transformer.wte.weight)
        self._tensors.append(_fp32(transformer.wpe.weight))
        self._table = torch.tensor([pointer(tensor) for tensor in self._tensors])
        self._workspace = torch.empty(0)

    def _add_norm(self, norm: LayerNorm) -> None:
        self._tensors += [_fp32(norm.weight), _fp32(norm.bias)]

    def _add_linear(self, linear: nn.Linear) -> None:
        self._add_matrix(linear.weight)
        self._tensors.append(_fp32(linear.bias))

    def _add_matrix(self, weight: Tensor) -> None:
        packed = pack(weight, self.weights)
        shared = packed.data.data_ptr() == weight.data_ptr()
        self._tensors += [packed.data if shared else self._pages.keep(packed.data), packed.scale]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; a step reads them all but most of the positions."""
        return sum(tensor.nbytes for tensor in self._tensors if tensor is not None)

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `forward_cached`."""
        return KVCache(self.config, batch_size)

    @torch.no_grad()
    def forward_cached(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, vocab_size) of the last position of idx (B, T), which continues `cache`.

        Raises:
            ValueError: idx is not (B, T) with T >= 1 of the cache's batch, or does not fit into it.
            IndexError: a token id outside the vocabulary.
        """
        if self.model is not None and idx.dim() == 2 and idx.shape[1] > 1:
            return self.model.forward_cached(idx, cache)
        self._check(idx, cache)
        logits = torch.empty((idx.shape[0], self.config.vocab_size))
        parts = self._parts(idx)
        for part in parts[:-1]:
            self._step(part, cache, None, every=False)
        self._step(parts[-1], cache, logits, every=False)
        return logits

    @torch.no_grad()
    def forward(
        self, idx: Tensor, targets: Tensor | None = None
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Logits (B, T, vocab_size), or with targets (B, T) None and the mean loss, as of GPT."""
        cache = self.new_cache(idx.shape[0])
        self._check(idx, cache)
        found: list[Tensor] = []
        loss = torch.zeros(())
        for part in self._parts(idx):
            start = cache.length
            logits = torch.empty((*part.shape, self.config.vocab_size))
            self._step(part, cache, logits, every=True)
            if targets is None:
                found.append(logits)
            else:
                wanted = targets[:, start : cache.length]
                loss += functional.cross_entropy(logits, wanted, reduction="sum")
        if targets is None:
            return torch.cat(found, 1)
        return None, loss / (targets != -100).sum()

    def _parts(self, idx: Tensor) -> list[Tensor]:
        """idx (B, T) in pieces of at most `ROWS` tokens, or one a row."""
        if idx.numel() <= ROWS:
            return [idx.contiguous()]
        return [part.contiguous() for part in idx.split(max(1, ROWS // idx.shape[0]), 1)]

    def _check(self, idx: Tensor, cache: KVCache) -> None:
        if idx.dim() != 2 or idx.dtype != torch.int64 or 0 in idx.shape:
            raise ValueError(f"idx must be int64 (B, T), got {idx.dtype} {tuple(idx.shape)}")
        keys = cache.keys
        if idx.shape[0] != keys.shape[1] or cache.length + idx.shape[1] > cache.capacity:
            raise ValueError(
                f"idx {tuple(idx.shape)} does not fit into a cache of {keys.shape[1]} rows with "
                f"{cache.length} of {cache.capacity} positions taken"
            )
        if keys.dtype != torch.float32 or keys.device.type != "cpu":
            raise ValueError(f"the cache must be fp32 on the CPU, got {keys.dtype}, {keys.device}")

    def _step(self, idx: Tensor, cache: KVCache, logits: Tensor | None, every: bool) -> None:
        """Appends idx (B, T) to the cache; logits of its last positions, of `every` one, or none."""
        config, threads = self.config, torch.get_num_threads()
        floats = self.kernels.decode_workspace(
            idx.numel(), cache.capacity, config.n_head, config.n_embd, threads
        )
        if self._workspace.numel() < floats:
            self._workspace = torch.empty(floats)
        wrong = self.kernels.decode_step(
            self._table.data_ptr(),
            idx.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            pointer(logits),
            self._workspace.data_ptr(),
            *idx.shape,
            cache.length,
            cache.capacity,
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.vocab_size,
            config.layer_norm_epsilon,
            every,
            WEIGHTS.index(self.weights),
            threads,
        )
        if wrong >= 0:
            token = int(idx.flatten()[wrong])
            raise IndexError(f"idx holds {token}, not in 0 to {config.vocab_size - 1}")
        cache.length += idx.shape[1]


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()
