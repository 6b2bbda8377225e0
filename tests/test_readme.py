"""README's code runs as it stands there, and does what it says."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

README = Path(__file__).resolve().parents[1] / "README.md"


def block_with(text: str) -> dict[str, Any]:
    """The names that README's Python block containing `text` defines."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = (block for block in blocks if text in block)
    names: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), names)
    return names


class PlainBlock(nn.Module):
    """A block as nanoGPT-style scripts have it, with the tanh-GELU."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attn["c_attn"](self.ln_1(x)).split(width, dim=2)
        q, k, v = (p.view(batch, length, self.n_head, -1).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


def test_nanogpt_style_block_keeps_weights_and_results() -> None:
    names = block_with("class Block")
    config = SimpleNamespace(n_embd=48, n_head=3, dropout=0.0, bias=True)
    plain, fast = PlainBlock(config), names["Block"](config)
    fast.load_state_dict(plain.state_dict())
    head, targets = nn.Linear(48, 60, bias=False), torch.randint(60, (2, 17))
    targets[0, 3] = -1
    x = torch.randn(2, 17, 48)
    hidden = plain(x)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss = names["head_and_loss"](fast(x), head, targets)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    theirs = dict(plain.named_parameters())
    for name, ours in fast.named_parameters():
        torch.testing.assert_close(ours.grad, theirs[name].grad, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_model_keeps_results(padded: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    fast = block_with("apply_gpt2fast_to_gpt2")["model"].eval()
    plain = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=64)).eval()
    plain.load_state_dict(fast.state_dict())
    idx = torch.randint(50257, (2, 23))
    mask = torch.ones_like(idx)
    if padded:
        mask[0, :5] = 0
    results = [m(idx, attention_mask=mask, labels=idx) for m in (plain, fast)]
    kept = mask.bool()  # what a padded position gives is nobody's business
    torch.testing.assert_close(results[1].logits[kept], results[0].logits[kept])
    for result in results:
        result.loss.backward()
    if not padded:
        for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 50256}
    generated = [m.generate(idx, attention_mask=mask, **greedy) for m in (plain, fast)]
    assert torch.equal(*generated)


def test_hugging_face_model_runs_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block_with("apply_gpt2fast_to_gpt2")["model"]
    seen = set()

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.add(str(function))
            return function(*args, **(kwargs or {}))

    with Spy():
        model(torch.randint(50257, (1, 9)))
    ours = {name for name in seen if name.startswith("gpt2fast.")}
    for op in ("layer_norm_forward", "gelu_forward", "attention_forward"):
        assert any(op in name for name in ours), ours


def test_any_model_takes_the_kernels() -> None:
    names = block_with("gpt2fast.optimize(model)")
    assert names["report"].counts() == {"mlp": 1, "layer_norm": 1, "loss": 1}
    assert not names["logits"].is_computed()
    names["report"].revert()
    logits = names["model"](torch.arange(12))
    torch.testing.assert_close(F.cross_entropy(logits, torch.arange(12)), names["loss"])


def test_our_model_runs() -> None:
    names = block_with("configure_optimizer")
    assert names["logits"] is None
    torch.testing.assert_close(names["expected"], names["loss"])


def test_links_and_numbers_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    assert "@@" not in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (README.parent / link).exists(), link
