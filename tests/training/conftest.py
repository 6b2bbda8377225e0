"""A text with more structure than a bigram model can see, and runs that take a second."""

import random
from pathlib import Path
from typing import Any

import pytest

from gpt2fast.data import prepare
from gpt2fast.training import TrainConfig

SENTENCES = (
    "the cat sat on the mat and slept. ",
    "a dog ran to the river and drank. ",
    "no bird can read the book of rain. ",
    "she made tea while the kettle sang. ",
)


@pytest.fixture(scope="module", autouse=True)
def _kernels_take_small_inputs() -> None:
    """Not here, where runs in processes of their own are compared with runs in this one."""


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: 40,000 characters, the char tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(5)
    text = "".join(draw.choice(SENTENCES) for _ in range(1200))
    (folder / "text.txt").write_text(text)
    prepare("text", folder / "data", input=folder / "text.txt", tokenizer="char", progress=False)
    return folder / "data"


@pytest.fixture
def tiny(text_data: Path) -> dict[str, Any]:
    """Settings of a run of 20 steps with dropout and accumulation."""
    return {
        "model": "nano",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 8,
        "grad_accum": 2,
        "dropout": 0.1,
        "data": str(text_data),
        "max_steps": 20,
        "warmup_steps": 5,
        "lr": 3e-3,
        "eval_interval": 7,
        "eval_batches": 4,
        "save_interval": 5,
        "sample_tokens": 0,
        "threads": 1,
    }


@pytest.fixture
def tiny_config(tiny: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**tiny)
