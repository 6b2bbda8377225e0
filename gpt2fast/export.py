"""Models for other programs: a Hugging Face folder with all that belongs to it, or an llm.c file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from gpt2fast import __version__, huggingface, llmc
from gpt2fast.data.shards import MANIFEST, Manifest, ShardError
from gpt2fast.data.tokenizers import (
    EOT_TEXT,
    Gpt2Tokenizer,
    Tokenizer,
    TokenizerUnavailable,
    huggingface_vocabulary,
)
from gpt2fast.training.checkpoint import TOKENIZER, CheckpointError, load_tokenizer
from gpt2fast.training.runs import CONFIG, METRICS

if TYPE_CHECKING:
    from gpt2fast.model import GPT

__all__ = ["check_target", "export_huggingface", "export_llmc", "model_card"]

#: What `export_huggingface` writes, and may replace.
FILES: Final = frozenset(
    {
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.json",
        TOKENIZER,
    }
)


def check_target(out: Path, kind: str, *, overwrite: bool) -> None:
    """Before any work: refuses where an export would touch what it may not.

    `kind` is "llmc" or "huggingface".

    Raises:
        FileExistsError: a file where a folder is wanted, or the reverse; something that needs
            `overwrite`; a folder that holds more than a model.

    >>> from pathlib import Path
    >>> check_target(Path("new"), "huggingface", overwrite=False)
    >>> _ = Path("old.bin").write_bytes(b"")
    >>> check_target(Path("old.bin"), "llmc", overwrite=False)
    Traceback (most recent call last):
    FileExistsError: [Errno 17] pass --overwrite to replace it: 'old.bin'
    """
    if kind == "llmc":
        if out.is_dir():
            raise FileExistsError(
                errno.EEXIST, "an llm.c file is wanted, this is a folder", str(out)
            )
        if out.exists() and not overwrite:
            raise FileExistsError(errno.EEXIST, "pass --overwrite to replace it", str(out))
        return
    if out.exists() and not out.is_dir():
        raise FileExistsError(errno.EEXIST, "a folder is wanted, this is a file", str(out))
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if present and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "the folder is not empty: pass --overwrite to replace a model", str(out)
        )
    if present - FILES:
        raise FileExistsError(
            errno.EEXIST,
            f"the folder holds more than an exported model ({min(present - FILES)}): choose another",
            str(out),
        )


def export_llmc(
    model: GPT, origin: Path, out: Path, *, dtype: torch.dtype | None = None
) -> list[str]:
    """Write an llm.c file and return lines for the user; `dtype` is by default the model's.

    Raises OSError, ValueError as `llmc.save`.

    >>> from pathlib import Path
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=16))
    >>> model.save_pretrained("run")
    >>> notes = export_llmc(model, Path("run"), Path("gpt2.bin"))
    >>> gpt2fast.GPT.from_pretrained("gpt2.bin").config.n_embd
    8
    """
    weights = model.transformer.wte.weight.dtype
    dtype = dtype or (weights if weights in llmc.VERSIONS.values() else torch.float32)
    out.parent.mkdir(parents=True, exist_ok=True)
    llmc.save(model, out, dtype)
    version = next(number for number, kept in llmc.VERSIONS.items() if kept == dtype)
    name = str(dtype).removeprefix("torch.")
    return [f"{origin} -> {out}: llm.c version {version} ({name}), {out.stat().st_size:,} bytes"]


def export_huggingface(
    model: GPT, origin: Path, out: Path, *, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a Hugging Face folder and return lines for the user.

    Args:
        model: the model.
        origin: the folder or file it is from; its tokenizer and training are read there.
        out: the folder.
        dtype: of the weights; by default the model's.

    Raises:
        ValueError: it is no GPT-2.
        OSError: something cannot be written.

    >>> from pathlib import Path
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=16))
    >>> model.save_pretrained("run")
    >>> notes = export_huggingface(model, Path("run"), Path("out"), dtype=torch.bfloat16)
    >>> sorted(path.name for path in Path("out").iterdir() if path.suffix != ".md")
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    if model.model_type != "gpt2":
        raise ValueError(f"transformers has GPT-2, but no {model.model_type}")
    notes: list[str] = []
    try:
        tokenizer: Tokenizer | None = load_tokenizer(origin, model.config.vocab_size)
    except CheckpointError as error:
        tokenizer = None
        notes.append(f"without a tokenizer: {error}")
    files: dict[str, str] = {}
    if isinstance(tokenizer, Gpt2Tokenizer):
        try:
            files |= _gpt2_files(model.config.block_size)
        except TokenizerUnavailable as error:
            notes.append(f"without tokenizer files: {error}")
    elif tokenizer is not None:
        notes.append(
            f"transformers has no {tokenizer.name} tokenizer: {TOKENIZER} describes it instead"
        )
    end = tokenizer.eot_token if tokenizer is not None else None
    if tokenizer is not None:
        files[TOKENIZER] = _json(tokenizer.to_json())
    files["generation_config.json"] = _json(
        {
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
            "do_sample": True,
            "max_length": model.config.block_size,
        }
    )
    files["README.md"] = model_card(model, origin, tokenizer, out.name)
    huggingface.save(model, out, dtype=dtype, end_of_text=end)
    for name in FILES - files.keys() - {"config.json", "model.safetensors"}:
        (out / name).unlink(missing_ok=True)  # of the model that is replaced
    for name, text in files.items():
        temporary = out / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, out / name)
        finally:
            temporary.unlink(missing_ok=True)
    return [
        f"{origin} -> {out}: {', '.join(sorted([*files, 'config.json', 'model.safetensors']))}",
        *(f"note: {note}" for note in notes),
    ]


def _gpt2_files(block_size: int) -> dict[str, str]:
    vocabulary, merges = huggingface_vocabulary()
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "".join(
            ["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)]
        ),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "GPT2Tokenizer",
                "model_max_length": block_size,
                "add_prefix_space": False,
                "bos_token": EOT_TEXT,
                "eos_token": EOT_TEXT,
                "unk_token": EOT_TEXT,
            }
        ),
    }


def model_card(model: GPT, origin: Path, tokenizer: Tokenizer | None, title: str) -> str:
    """README.md of a model: its shape, how it was trained as far as `origin` tells, how to use it.

    >>> from pathlib import Path
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=16))
    >>> "# mine" in model_card(model, Path("run"), None, "mine")
    True
    """
    shape = model.config
    vocabulary = f"{shape.vocab_size:,} tokens"
    if tokenizer is not None:
        vocabulary += f" ({tokenizer.name})"
    rows = {
        "layers": shape.n_layer,
        "heads": shape.n_head,
        "width": shape.n_embd,
        "context": f"{shape.block_size:,} tokens",
        "vocabulary": vocabulary,
        "parameters": f"{_parameters(model):,}",
    }
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gpt2\n---\n"
    use = (
        "```python\nfrom transformers import GPT2LMHeadModel\n\n"
        f'model = GPT2LMHeadModel.from_pretrained("{title}")\n```\n'
    )
    return (
        f"{front}\n# {title}\n\nA GPT-2 language model, exported by gpt2fast {__version__}.\n\n"
        f"{_table(rows)}\n## Training\n\n{_training(origin)}\n## Use\n\n{use}"
    )


def _parameters(model: GPT) -> int:
    padding = model.config.padded_vocab_size - model.config.vocab_size
    return model.num_parameters() - padding * model.config.n_embd


def _training(origin: Path) -> str:
    """What the files beside a checkpoint tell, as Markdown."""
    config = _read(origin / CONFIG)
    step = _read(origin / "checkpoint.json").get("step")
    if not config or step is None:
        return (
            f"Not trained by this export's program, as far as its files tell: the weights are those"
            f" of `{origin.name}`.\n"
        )
    run = origin.parent.parent
    tokens = step * config["batch_size"] * config["block_size"] * config["grad_accum"]
    rows: dict[str, object] = {
        "steps": f"{step:,}",
        "tokens": f"{tokens:,}",
        "batch": f"{config['batch_size']} x {config['block_size']} tokens x {config['grad_accum']}",
        "optimizer": f"AdamW, betas {config['beta1']}/{config['beta2']}, weight decay "
        f"{config['weight_decay']} on matrices, gradient norm clipped at {config['clip']}",
        "learning rate": f"{config['lr']} after {config['warmup_steps']} steps of warm-up, "
        f"cosine to {config['min_lr']} over {config['max_steps']:,} steps",
        "dropout": config["dropout"],
        "dtype": config["dtype"],
        "seed": config["seed"],
    }
    if config.get("init_from"):
        rows["started from"] = f"`{config['init_from']}`"
    if (loss := _validation_loss(run / METRICS, step)) is not None:
        rows["validation loss"] = f"{loss:.4f} nats a token"
    folder = Path(config["data"]) if config.get("data") else run / "data"
    if (folder / MANIFEST).is_file():
        try:
            manifest = Manifest.load(folder)
        except ShardError:
            pass
        else:
            rows["data"] = f"{manifest.source.kind}: {manifest.source.location}"
            rows["data's tokens"] = ", ".join(f"{n:,} {s}" for s, n in manifest.tokens.items())
    return _table(rows)


def _validation_loss(metrics: Path, step: int) -> float | None:
    """The last one that was measured at a step."""
    found = None
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            if '"val_loss"' in line:
                try:
                    value = json.loads(line)
                except ValueError:  # a line that a kill cut short
                    continue
                if value.get("step") == step:
                    found = float(value["val_loss"])
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _table(rows: Mapping[str, object]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
