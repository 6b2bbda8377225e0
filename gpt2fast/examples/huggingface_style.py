"""A Hugging Face GPT-2, trained as transformers' Trainer does: labels in, loss out, accumulation.

`gpt2fast.apply_gpt2fast_to_gpt2(model)` is the one line that a script like this needs, before the
Trainer is made. The loop below is Trainer's for one process: micro-batches whose losses are sums
over `num_items_in_batch`, gradients clipped, AdamW. (Trainer itself also needs `accelerate`.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gpt2fast
from gpt2fast.examples._common import Result, Step, arguments, decay_groups, run

MICRO_BATCHES = 2


def training_step(model: nn.Module) -> Step:
    """One step of two micro-batches."""
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> float:
        # Hugging Face shifts the labels itself: position t is told token t + 1.
        labels = torch.cat([x[:, :1], y[:, :-1]], dim=1)
        items = torch.tensor(labels[:, 1:].numel(), device=x.device)
        total = 0.0
        for inputs, wanted in zip(x.chunk(MICRO_BATCHES), labels.chunk(MICRO_BATCHES), strict=True):
            output = model(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                labels=wanted,
                num_items_in_batch=items,
            )
            output.loss.backward()
            total += output.loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def main(argv: list[str] | None = None) -> Result:
    """Trains the model as it is and swapped; see ``--help``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options = arguments(__doc__, argv)
    if options.batch_size < MICRO_BATCHES:
        raise ValueError(f"batch-size must be at least {MICRO_BATCHES}, got {options.batch_size}")

    def make(vocab_size: int) -> nn.Module:
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=options.block_size,
            n_layer=options.layers,
            n_head=options.heads,
            n_embd=options.width,
            attn_pdrop=0.0,  # the kernel draws other numbers: the curves would part
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config)

    return run(options, make, training_step, gpt2fast.apply_gpt2fast_to_gpt2)


if __name__ == "__main__":
    main()
