"""GPT-2 in llm.c's .bin format: 256 int32, then the tensors, all fp32 or all bf16.

The header holds the magic number 20240326, the version (3: fp32, 5: bf16), block_size, vocab_size,
n_layer, n_head, n_embd and the rows of the padded embedding (a multiple of 128); the rest is zero.
Each of the tensors below is stacked over the layers where it belongs to a layer; matrices are
(out, in). Everything is little-endian. Source: llm.c, train_gpt2.py and train_gpt2.cu.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2fast.model import GPT, GPTConfig

__all__ = ["load", "save"]

MAGIC: Final = 20240326
VERSIONS: Final = {3: torch.float32, 5: torch.bfloat16}
HEADER_BYTES: Final = 1024
PAD_TO: Final = 128

#: Below ``transformer.``; ``h.*.`` is stacked over the layers.
ORDER: Final = (
    "wte.weight",
    "wpe.weight",
    "h.*.ln_1.weight",
    "h.*.ln_1.bias",
    "h.*.attn.c_attn.weight",
    "h.*.attn.c_attn.bias",
    "h.*.attn.c_proj.weight",
    "h.*.attn.c_proj.bias",
    "h.*.ln_2.weight",
    "h.*.ln_2.bias",
    "h.*.mlp.c_fc.weight",
    "h.*.mlp.c_fc.bias",
    "h.*.mlp.c_proj.weight",
    "h.*.mlp.c_proj.bias",
    "ln_f.weight",
    "ln_f.bias",
)


def _names(config: GPTConfig) -> Iterator[str]:
    for name in ORDER:
        if "*" in name:
            yield from ("transformer." + name.replace("*", str(i)) for i in range(config.n_layer))
        else:
            yield "transformer." + name


def save(model: GPT, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model as llm.c's version 3 (float32) or 5 (bfloat16), whole or not at all.

    Pad rows of the embedding are written as zeros.

    Raises:
        ValueError: another dtype, a layer_norm_epsilon other than llm.c's 1e-5, or no GPT-2.
        OSError: the file cannot be written.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16))
    >>> save(model, "mine.bin", torch.float16)
    Traceback (most recent call last):
    ValueError: ...
    """
    versions = {kept: version for version, kept in VERSIONS.items()}
    if dtype not in versions:
        raise ValueError(f"llm.c files are float32 or bfloat16, not {dtype}")
    if model.model_type != "gpt2":
        raise ValueError(f"llm.c files hold a GPT-2, and no {model.model_type}")
    config = model.config
    if config.layer_norm_epsilon != 1e-5:
        raise ValueError(
            f"layer_norm_epsilon={config.layer_norm_epsilon}: an llm.c file cannot say so, 1e-5 is "
            "fixed there"
        )
    rows = -(-config.vocab_size // PAD_TO) * PAD_TO
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:8] = (
        MAGIC, versions[dtype], config.block_size, config.vocab_size, config.n_layer,
        config.n_head, config.n_embd, rows,
    )  # fmt: skip
    state = model.state_dict()
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header.tobytes())
            for name in _names(config):
                tensor = state[name].detach().cpu().to(dtype)
                if name == "transformer.wte.weight":
                    pad = tensor.new_zeros(rows - config.vocab_size, config.n_embd)
                    tensor = torch.cat([tensor[: config.vocab_size], pad])
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, "the disk is full", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, *, dropout: float = 0.0) -> GPT:
    """A model in evaluation mode, fp32 or bf16 as the file; pad rows of the file are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or the file is cut short or too long.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16))
    >>> save(model, "mine.bin", torch.bfloat16)
    >>> load("mine.bin").config == model.config
    True
    """
    from gpt2fast.model import GPT, GPTConfig

    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES:
            raise ValueError(f"{path}: {len(head)} bytes, too short for an llm.c model")
        magic, version, positions, vocabulary, n_layer, n_head, n_embd, rows = (
            int(value) for value in np.frombuffer(head, dtype="<i4")[:8]
        )
        if magic != MAGIC:
            raise ValueError(f"{path}: magic number {magic}, an llm.c GPT-2 has {MAGIC}")
        if version not in VERSIONS:
            raise ValueError(f"{path}: version {version}, known are 3 (fp32) and 5 (bf16)")
        if rows < vocabulary:
            raise ValueError(f"{path}: {rows} embedding rows for a vocabulary of {vocabulary}")
        try:
            config = GPTConfig(
                n_layer=n_layer,
                n_head=n_head,
                n_embd=n_embd,
                vocab_size=vocabulary,
                block_size=positions,
                dropout=dropout,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        with torch.device("meta"):
            model = GPT(config)
        state = model.state_dict()
        dtype = VERSIONS[version]
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        shapes["transformer.wte.weight"] = (rows, n_embd)
        expected = HEADER_BYTES + dtype.itemsize * sum(
            int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()
        )
        if (size := path.stat().st_size) != expected:
            what = "cut short" if size < expected else "too long"
            raise ValueError(f"{path}: {what}: {size:,} bytes, its header implies {expected:,}")
        for name in _names(config):
            tensor = _read(file, shapes[name], dtype)
            if name == "transformer.wte.weight":
                pad = tensor.new_zeros(config.padded_vocab_size - vocabulary, n_embd)
                tensor = torch.cat([tensor[:vocabulary], pad])
            state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _bytes(tensor: Tensor) -> memoryview:
    """The bits of a tensor, little-endian; bfloat16 is unknown to numpy and goes as int16."""
    bits = tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
    return (bits if sys.byteorder == "little" else bits.byteswap()).reshape(-1).data


def _read(file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.fromfile(file, dtype="<i2" if dtype.itemsize == 2 else "<i4", count=count)
    native = torch.from_numpy(bits.astype(bits.dtype.newbyteorder("="), copy=False))
    return native.view(dtype).reshape(shape)
