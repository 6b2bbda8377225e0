"""Models in the manner of well-known scripts, written for these tests; nothing is copied."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NanoNorm(nn.Module):
    """A layer norm with an optional bias, its epsilon a literal in forward."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout = heads, width, dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (z.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for z in (q, k, v))
        p = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class NanoMlp(nn.Module):
    def __init__(self, width: int, dropout: float, bias: bool, approximate: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU(approximate=approximate)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, bias: bool, approximate: str):
        super().__init__()
        self.ln_1 = NanoNorm(width, bias)
        self.attn = NanoAttention(width, heads, dropout, bias)
        self.ln_2 = NanoNorm(width, bias)
        self.mlp = NanoMlp(width, dropout, bias, approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGpt(nn.Module):
    """nanoGPT's manner: own LayerNorm, tied head, logits and loss from forward, erf-GELU."""

    def __init__(
        self,
        vocab: int = 101,
        width: int = 32,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
        bias: bool = False,
        approximate: str = "none",
    ) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(64, width),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(
                    NanoBlock(width, heads, dropout, bias, approximate) for _ in range(layers)
                ),
                "ln_f": NanoNorm(width, bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Any]:
        parts: Any = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device))
        x = parts.drop(x)
        for block in parts.h:
            x = block(x)
        x = parts.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class BuildAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.c_proj.SCALE_INIT = 1  # a mark on the module, as such scripts set
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        shape = (*size[:2], self.n_head, size[2] // self.n_head)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.c_proj(y.transpose(1, 2).contiguous().view(size))


class BuildMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class BuildBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = BuildAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = BuildMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class BuildGpt(nn.Module):
    """build-nanogpt's manner: nn.LayerNorm, tanh-GELU, tied head, logits and loss."""

    def __init__(self, vocab: int = 101, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(64, width),
                "h": nn.ModuleList(BuildBlock(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Any]:
        parts: Any = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


class MinGelu(nn.Module):
    """The tanh-GELU written out."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class MinAttention(nn.Module):
    """Attention written out, with the mask as a buffer."""

    def __init__(self, width: int, heads: int, dropout: float, block_size: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        lower = torch.tril(torch.ones(block_size, block_size))
        self.register_buffer("bias", lower.view(1, 1, block_size, block_size))
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (z.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for z in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class MinBlock(nn.Module):
    """The MLP is a dictionary of parts that a lambda strings together."""

    def __init__(self, width: int, heads: int, dropout: float, block_size: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MinAttention(width, heads, dropout, block_size)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 4 * width),
                "c_proj": nn.Linear(4 * width, width),
                "act": MinGelu(),
                "dropout": nn.Dropout(dropout),
            }
        )
        m: Any = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class MinGpt(nn.Module):
    """minGPT's manner: attention by hand, the MLP in a ModuleDict, an untied head."""

    def __init__(self, vocab: int = 101, width: int = 32, heads: int = 4, dropout: float = 0.0):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(64, width),
                "h": nn.ModuleList(MinBlock(width, heads, dropout, 64) for _ in range(2)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Any]:
        parts: Any = self.transformer
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device).unsqueeze(0)
        x = parts.wte(idx) + parts.wpe(pos)
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(
                logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1
            )
        return logits, loss


class PlainAttention(nn.Module):
    """Three projections, full or causal."""

    def __init__(self, width: int, heads: int, causal: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.num_heads, self.causal = heads, causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            part(x).view(b, t, self.num_heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None
        )
        return self.proj(y.transpose(1, 2).reshape(b, t, c))
