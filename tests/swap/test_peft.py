"""Real adapters: peft's LoRA on a swapped GPT-2, in training, in files, merged and taken off."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast.swap import apply_gpt2fast_to_gpt2
from tests.swap.test_hf_gpt2 import Spy, ids, make

peft = pytest.importorskip("peft", reason="peft is not installed (it is no requirement of ours)")
TARGETS = {
    "attention": ["c_attn"],
    "mlp": ["c_fc", "mlp.c_proj"],
    "all": ["c_attn", "c_fc", "c_proj"],
    "head": ["lm_head"],
}


def with_adapter(model: Any, targets: list[str]) -> Any:
    """The model with LoRA whose second factor is not zero, as if trained."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return wrapped


def results(model: Any) -> dict[str, Tensor]:
    x = ids()
    model.zero_grad()
    output = model.train()(input_ids=x, labels=x)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("where", list(TARGETS))
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora_trains_as_without_us(where: str, when: str) -> None:
    plain = make()
    fast = copy.deepcopy(plain)
    plain = with_adapter(plain, TARGETS[where])
    if when == "before":
        fast = with_adapter(fast, TARGETS[where])
        apply_gpt2fast_to_gpt2(fast)
    else:
        apply_gpt2fast_to_gpt2(fast)
        fast = with_adapter(fast, TARGETS[where])
    with Spy() as spy:
        ours = results(fast)
    theirs = results(plain)
    assert ours.keys() == theirs.keys()
    assert any("lora_" in name for name in theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda m, name=name: f"{name}: {m}")
    # what the adapter does not wrap still runs on our kernels
    assert {"attention_forward", "layer_norm_forward"} <= spy.seen
    assert ("gelu_forward" in spy.seen) is (where in ("attention", "head"))
    assert ("linear_cross_entropy_forward" in spy.seen) is (where != "head")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adapters_are_saved_loaded_merged_and_unloaded(tmp_path: Path) -> None:
    plain = make()
    fast = copy.deepcopy(plain)
    apply_gpt2fast_to_gpt2(fast)
    x = ids()
    bare = plain.eval()(x).logits
    adapted = with_adapter(fast, TARGETS["all"])
    with_lora = adapted.eval()(x).logits
    assert not torch.allclose(with_lora, bare)
    adapted.save_pretrained(tmp_path)
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)  # without us
    torch.testing.assert_close(loaded.eval()(x).logits, with_lora)
    again = copy.deepcopy(plain)
    apply_gpt2fast_to_gpt2(again)
    again = peft.PeftModel.from_pretrained(again, tmp_path)  # on our kernels
    torch.testing.assert_close(again.eval()(x).logits, with_lora)
    with again.disable_adapter():
        torch.testing.assert_close(again(x).logits, bare)
    merged = again.merge_and_unload()
    assert type(merged) is type(plain)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in plain.named_parameters()]
    with Spy() as spy:
        torch.testing.assert_close(merged.eval()(x).logits, with_lora)
    assert "gelu_forward" in spy.seen  # plain projections again: ours again
    torch.testing.assert_close(adapted.unload().eval()(x).logits, bare)
