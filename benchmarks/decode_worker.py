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
POSITIONS = 128  # room for the prompt and what test_decode asks for
Run = Callable[[Tensor, int], object]  # run(prompt (B, T), new tokens)


def ours(model: GPT, weights: Weights) -> Run:
    decoder = Decoder(model, weights)
    return lambda idx, count: generate(decoder, idx, count, temperature=0)


#: attend(layer, q, k, v), all (B, H, T, D) as its result.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def plain_step(model: GPT, idx: Tensor, position: Tensor, attend: Attend) -> Tensor:
    """The most likely next token (B, 1) by plain torch; `attend` keeps the cache."""
    config, parts = model.config, model.transformer
    batch, length = idx.shape
    x = F.embedding(idx, parts.wte.weight) + F.embedding(position, parts.wpe.weight)
    for layer, block in enumerate(parts.h):
        y = F.layer_norm(x, (config.n_embd,), block.ln_1.weight, block.ln_1.bias)
        qkv = F.linear(y, block.attn.c_attn.weight, block.attn.c_attn.bias)
        q, k, v = qkv.view(batch, length, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)
        y = attend(layer, q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + F.linear(y, block.attn.c_proj.weight, block.attn.c_proj.bias)
        y = F.layer_norm(x, (config.n_embd,), block.ln_2.weight, block.ln_2.bias)
        y = F.gelu(F.linear(y, block.mlp.c_fc.weight, block.mlp.c_fc.bias), approximate="tanh")
        x = x + F.linear(y, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
    x = F.layer_norm(x[:, -1], (config.n_embd,), parts.ln_f.weight, parts.ln_f.bias)
    return F.linear(x, parts.wte.weight).argmax(-1, keepdim=True)


def new_caches(model: GPT, batch: int) -> list[Tensor]:
    """By layer the keys and values, (2, B, H, POSITIONS, D)."""
    config = model.config
    shape = (2, batch, config.n_head, POSITIONS, config.n_embd // config.n_head)
    return [torch.zeros(shape) for _ in range(config.n_layer)]


def decode(step: Callable[[Tensor, Tensor], Tensor], idx: Tensor, count: int) -> None:
    start = 0
    for _ in range(count):
        end = start + idx.shape[1]
        idx, start = step(idx, torch.arange(start, end)), end


def torch_eager(model: GPT) -> Run:
    """The cache is written in place, and read as far as it is filled."""

    @torch.inference_mode()
    def run(idx: Tensor, count: int) -> None:
        caches = new_caches(model, len(idx))

        def step(idx: Tensor, position: Tensor) -> Tensor:
            start, end = int(position[0]), int(position[-1]) + 1

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache = caches[layer]
                cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
                keys, values = cache[:, :, :, :end]
                return F.scaled_dot_product_attention(q, keys, values, is_causal=end - start > 1)

            return plain_step(model, idx, position, attend)

        decode(step, idx, count)

    return run


def torch_compiled(model: GPT) -> Run:
    """Caches of a fixed length, a mask, positions as data: compiled for the prompt's shape and for
    one token a row."""

    @torch.compile(dynamic=False)
    def step(idx: Tensor, position: Tensor, caches: list[Tensor]) -> Tensor:
        mask = torch.arange(POSITIONS) <= position[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = caches[layer]
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        return plain_step(model, idx, position, attend)

    caches: list[Tensor] = []

    @torch.no_grad()
    def run(idx: Tensor, count: int) -> None:
        if not caches:
            caches.extend(new_caches(model, len(idx)))
        decode(lambda idx, position: step(idx, position, caches), idx, count)

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


def write_gguf(model: GPT, path: str, weights: str) -> None:
    """The model for llama.cpp: matrices as F32, F16 or Q8_0, the rest fp32, no vocabulary."""
    import gguf

    types = {"float32": "F32", "bfloat16": "F16", "int8": "Q8_0"}
    kind = gguf.GGMLQuantizationType[types[weights]]
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
             "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
             "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}  # fmt: skip
    for name, parameter in model.transformer.named_parameters():
        module, _, role = name.rpartition(".")
        block = ""
        if module.startswith("h."):
            _, layer, module = module.split(".", 2)
            block = f"blk.{layer}."
        data = parameter.detach()[: config.vocab_size if module == "wte" else None].numpy()
        matrix = parameter.dim() == 2 and module != "wpe"
        stored = kind if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            f"{block}{names[module]}.{role}", gguf.quants.quantize(data, stored), raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(model: GPT, folder: str, weights: str, batch_size: int) -> Run:
    import llama_cpp as llama
    import numpy as np

    path, threads = f"{folder}/model.gguf", torch.get_num_threads()
    write_gguf(model, path, weights)
    llama.llama_backend_init()
    loaded = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_seq_max = POSITIONS * batch_size, batch_size
    options.n_batch = options.n_ubatch = PROMPT * batch_size
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(loaded, options)
    batch = llama.llama_batch_init(PROMPT * batch_size, 0, 1)

    def step(idx: Tensor, start: int) -> Tensor:
        batch.n_tokens = idx.numel()
        last = idx.shape[1] - 1
        for i, token in enumerate(idx.flatten().tolist()):
            row, place = divmod(i, idx.shape[1])
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + place, place == last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        found = []
        for row in range(len(idx)):
            logits = llama.llama_get_logits_ith(context, row * idx.shape[1] + last)
            found.append(int(np.ctypeslib.as_array(logits, (50257,)).argmax()))
        return torch.tensor(found)[:, None]

    def run(idx: Tensor, count: int) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        start = 0
        for _ in range(count):
            idx, start = step(idx, start), start + idx.shape[1]

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
        elif name == "torch.compile":
            gpt2fast.keep_freed_memory()
            run = torch_compiled(model)
        elif name == "llama.cpp":
            run = llama_cpp(model, folder, weights, batch)
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
