"""The loss of a model on prepared tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from gpt2fast.data.batches import batches_in_order
from gpt2fast.data.loader import TokenDataset
from gpt2fast.decoding import Decoder
from gpt2fast.model import GPT

__all__ = ["LossResult", "evaluate_loss"]


@dataclass(frozen=True)
class LossResult:
    """Mean loss in nats a token, its exponential, and the number of tokens that were predicted.

    >>> LossResult(loss=2.0, perplexity=7.389, tokens=1000).loss
    2.0
    """

    loss: float
    perplexity: float
    tokens: int


def evaluate_loss(
    model: GPT | Decoder,
    dataset: TokenDataset,
    *,
    batch_size: int = 8,
    block_size: int | None = None,
    max_batches: int | None = None,
    document_mask: bool = False,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> LossResult:
    """The mean loss over windows of `block_size` tokens, in order, each token a target once.

    Of prompts and responses it is the mean over the responses.

    Args:
        model: on its device; runs in evaluation mode. A decoder with bf16 or int8 weights gives the
            loss that sampling with them has.
        dataset: tokens of the model's vocabulary.
        batch_size: windows in a call of the model.
        block_size: tokens a window; by default the model's.
        max_batches: stop after so many (default: all).
        document_mask: attention does not cross end-of-text; that of examples never crosses them.
        dtype: bfloat16 or float16 runs under autocast.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: sizes below 1, no shard with a whole window, a block_size above the model's,
            the data's vocabulary is not the model's, or documents kept apart with a decoder.

    >>> from pathlib import Path
    >>> from gpt2fast.data import TokenDataset, prepare
    >>> _ = Path("mine.txt").write_text("To be, or not to be. " * 10)
    >>> _ = prepare("text", "data", input="mine.txt", tokenizer="byte")
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=8))
    >>> evaluate_loss(model, TokenDataset("data", "train")).tokens
    184
    """
    limit = model.config.block_size
    block_size = limit if block_size is None else block_size
    if block_size > limit:
        raise ValueError(f"block_size={block_size} is more than the model's {limit} positions")
    if (has := dataset.tokenizer.vocab_size) != model.config.vocab_size:
        raise ValueError(
            f"{dataset.folder} has the {dataset.tokenizer.name} vocabulary of {has}, the model "
            f"vocab_size={model.config.vocab_size}"
        )
    batches = batches_in_order(
        dataset, batch_size, block_size, max_batches, document_mask=document_mask
    )
    windows = sum((shard.size - 1) // block_size for shard in dataset.shards)
    if isinstance(model, Decoder) and (document_mask or dataset.supervised):
        raise ValueError("a decoder does not keep documents apart: evaluate the model itself")
    total = None if dataset.supervised else -(-windows // batch_size)
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    device = next(iter(model.parameters()), torch.empty(0)).device  # a decoder's is the CPU
    was_training = model.training
    model.eval()
    summed, tokens = 0.0, 0
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None),
            tqdm(batches, total=total, unit=" batches", disable=None if progress else True) as bar,
        ):
            for batch in bar:
                x, y, cu_seqlens = batch.to(device)
                documents = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
                _, loss = model(x, y, **documents)
                summed += float(loss) * batch.targets
                tokens += batch.targets
                if not bar.disable:
                    bar.set_postfix_str(f"loss {summed / tokens:.4f}", refresh=False)
    finally:
        model.train(was_training)
    mean = summed / tokens
    return LossResult(mean, math.exp(min(mean, 700.0)), tokens)
