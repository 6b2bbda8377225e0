"""One way to decode in a process of its own: `python -m benchmarks.decode_worker VARIANT BATCH`.

Answers each line of standard input, a number of new tokens, with JSON: seconds for a prompt of 64
tokens and so many new ones, greedy, and peak memory. GPT-2 124M with random weights.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt2fast
from benchmarks.step_worker import peak_memory
from gpt2fast import GPT, GPTConfig
from gpt2fast.decoding import Decoder, Weights
from gpt2fast.generation import generate

PROMPT = 64
Run = Callable[[Tensor, int], object]  # run(prompt (B, T), new tokens)


def ours(model: GPT, weights: Weights) -> Run:
    decoder = Decoder(model, weights)
    return lambda idx, count: generate(decoder, idx, count, temperature=0)


def torch_eager(model: GPT) -> Run:
    """Plain torch: linear, layer_norm, scaled_dot_product_attention, a cache written in place."""
    config, parts = model.config, model.transformer
    size = config.n_embd // config.n_head

    def step(idx: Tensor, caches: list[Tensor], start: int) -> Tensor:
        batch, length = idx.shape
        x = parts.wte.weight[idx] + parts.wpe.weight[start : start + length]
        for block, cache in zip(parts.h, caches, strict=True):
            y = F.layer_norm(x, (config.n_embd,), block.ln_1.weight, block.ln_1.bias)
            qkv = F.linear(y, block.attn.c_attn.weight, block.attn.c_attn.bias)
            q, k, v = qkv.view(batch, length, 3, config.n_head, size).permute(2, 0, 3, 1, 4)
            cache[0, :, :, start : start + length], cache[1, :, :, start : start + length] = k, v
            keys, values = cache[:, :, :, : start + length]
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=length > 1)
            y = y.transpose(1, 2).reshape(batch, length, -1)
            x = x + F.linear(y, block.attn.c_proj.weight, block.attn.c_proj.bias)
            y = F.layer_norm(x, (config.n_embd,), block.ln_2.weight, block.ln_2.bias)
            y = F.gelu(F.linear(y, block.mlp.c_fc.weight, block.mlp.c_fc.bias), approximate="tanh")
            x = x + F.linear(y, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
        x = F.layer_norm(x[:, -1], (config.n_embd,), parts.ln_f.weight, parts.ln_f.bias)
        return F.linear(x, parts.wte.weight).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def run(idx: Tensor, count: int) -> None:
        shape = (2, len(idx), config.n_head, PROMPT + count, size)
        caches = [torch.empty(shape) for _ in parts.h]
        start = 0
        for _ in range(count):
            idx, start = step(idx, caches, start), start + idx.shape[1]

    return run


def hugging_face(folder: str) -> Run:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def run(idx: Tensor, count: int) -> None:
        model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    return run


def ctranslate2(folder: str, weights: str) -> Run:
    import ctranslate2 as ct2

    words = [f"t{i}" for i in range(50257)]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|endoftext|>": 50256}
    del vocabulary["t50256"]
    Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
    Path(folder, "merges.txt").write_text("#version: 0.2\n")
    Path(folder, "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    target = f"{folder}/ct2-{weights}"
    ct2.converters.TransformersConverter(folder).convert(target, quantization=weights)
    generator = ct2.Generator(
        target, compute_type=weights, intra_threads=torch.get_num_threads(), inter_threads=1
    )

    def run(idx: Tensor, count: int) -> None:
        prompts = [[words[token] for token in row] for row in idx.tolist()]
        generator.generate_batch(
            prompts,
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )

    return run


def forget_peak() -> None:
    """Converting and loading took more memory than decoding does: the peak counts from here on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    variant, batch = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_name("gpt2")).eval()
    name, _, weights = variant.rpartition(" ")
    with tempfile.TemporaryDirectory() as folder:
        if name == "gpt2fast":
            run = ours(model, weights)  # type: ignore[arg-type]
        elif name == "torch eager":
            gpt2fast.keep_freed_memory()
            run = torch_eager(model)
        else:
            model.save_pretrained(folder)
            run = hugging_face(folder) if name == "transformers" else ctranslate2(folder, weights)
        del model
        forget_peak()
        idx = torch.randint(50256, (batch, PROMPT))
        for line in sys.stdin:
            began = time.perf_counter()
            run(idx, int(line))
            seconds = time.perf_counter() - began
            print(json.dumps({"seconds": seconds, "peak": peak_memory()}), flush=True)


if __name__ == "__main__":
    main()
