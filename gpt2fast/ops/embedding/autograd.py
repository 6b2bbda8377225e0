"""Token and position embedding as torch.library ops and the autograd Function on them."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.backends import load
from gpt2fast.ops.registry import call, once_differentiable, register


def _forward(idx: Tensor, wte: Tensor, wpe: Tensor, position: int, backend: str) -> Tensor:
    return load("embedding", backend).forward(idx, wte, wpe, position)


def _backward(
    dy: Tensor,
    idx: Tensor,
    vocabulary: int,
    positions: int,
    position: int,
    need_wte: bool,
    need_wpe: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    return load("embedding", backend).backward(
        dy, idx, vocabulary, positions, position, need_wte, need_wpe
    )


def _fake_forward(idx: Tensor, wte: Tensor, wpe: Tensor, position: int, backend: str) -> Tensor:
    return wte.new_empty((*idx.shape, wte.shape[1]))


def _fake_backward(
    dy: Tensor,
    idx: Tensor,
    vocabulary: int,
    positions: int,
    position: int,
    need_wte: bool,
    need_wpe: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    columns = dy.shape[2]
    return (
        dy.new_empty((vocabulary, columns)) if need_wte else None,
        dy.new_empty((positions, columns)) if need_wpe else None,
    )


embedding_forward = register(
    "embedding_forward(Tensor idx, Tensor wte, Tensor wpe, SymInt position, str backend) -> Tensor",
    _forward,
    _fake_forward,
    in_cpp=True,
)
embedding_backward = register(
    "embedding_backward(Tensor dy, Tensor idx, SymInt vocabulary, SymInt positions,"
    " SymInt position, bool need_wte, bool need_wpe, str backend) -> (Tensor?, Tensor?)",
    _backward,
    _fake_backward,
)


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, idx: Tensor, wte: Tensor, wpe: Tensor, position: int, sparse: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.vocabulary, ctx.places = wte.shape[0], (wpe.shape[0], position)
        ctx.sparse, ctx.backend = sparse, backend
        return call(embedding_forward, idx, wte, wpe, position, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (idx,) = ctx.saved_tensors
        needs, vocabulary = ctx.needs_input_grad[1:3], ctx.vocabulary
        sparse = ctx.sparse and needs[0]
        if sparse:  # the gradient of a table of the rows in use
            tokens, idx = torch.unique(idx, return_inverse=True)
            vocabulary = tokens.numel()
        dwte, dwpe = call(embedding_backward, dy, idx, vocabulary, *ctx.places, *needs, ctx.backend)
        if sparse:
            shape = (ctx.vocabulary, dy.shape[2])
            # as an argument it does not keep torch 2.11 from warning
            with torch.sparse.check_sparse_tensor_invariants(enable=False):
                dwte = torch.sparse_coo_tensor(tokens[None], dwte, shape, is_coalesced=True)
        return None, dwte, dwpe, None, None, None
