"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest

MODULES = (
    "swap",
    "swap.hf_gpt2",
    "swap.structure",
    "ecosystem.cut_cross_entropy",
    "ecosystem.flash_attn",
    "ecosystem.liger",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"gpt2fast.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
