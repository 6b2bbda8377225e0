"""AdamW with global-norm clipping over the 148 tensors of GPT-2 124M."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, cases, ours, pick, randn
from gpt2fast import GPT, GPTConfig
from gpt2fast.optim import AdamW

CLIP = 1.0
CONFIG = pick(
    GPTConfig(), GPTConfig(), GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=50, block_size=8)
)


def stepper(kind: str, shapes: list[torch.Size]) -> Callable[..., Tensor]:
    """A function that takes one step on parameters of its own and returns one of them."""
    parameters = [
        torch.nn.Parameter(randn(*shape, std=0.02, dtype=torch.float32)) for shape in shapes
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    decayed = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": rest, "weight_decay": 0.0},
    ]
    if kind == "gpt2fast":
        optimizer = AdamW(groups, lr=6e-4, betas=(0.9, 0.95), max_norm=CLIP)

        def step() -> Tensor:
            optimizer.step()
            return rest[0].detach()

        return step
    peer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), **{kind: True})

    def peer_step() -> Tensor:
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        peer.step()
        return rest[0].detach()

    return peer_step


def case() -> Case:
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(CONFIG).parameters()]
    size = 4 * sum(shape.numel() for shape in shapes)
    return Case(
        "adamw with clipping",
        "GPT-2 124M fp32",
        {},
        {
            "torch eager": stepper("foreach", shapes),
            "torch fused": stepper("fused", shapes),
            **ours(stepper("gpt2fast", shapes)),
        },
        forward=(8 * size, 0),  # gradients twice, parameter and two moments read and written
        backward=None,
    )


@cases(
    case,
    variants=("torch eager", "torch fused", *OURS),
    directions=("forward",),
)
def test_adamw(
    bench: Callable[..., None], make: Callable[[], Case], variant: str, direction: str
) -> None:
    bench(make, variant, direction)
