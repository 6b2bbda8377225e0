"""GPT-2 folders in Hugging Face's format: config.json and model.safetensors.

Hugging Face keeps the four projections of a block as Conv1D, (in, out): transposed against
nn.Linear. Files of other GPT-2 checkpoints may lack the ``transformer.`` prefix, and may carry the
causal mask as ``attn.bias`` and ``attn.masked_bias`` and the tied head as ``lm_head.weight``.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from gpt2fast.model import GPT

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

#: OpenAI's weights, and where they are on the Hub.
OPENAI = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class ModelUnavailable(RuntimeError):
    """A model is not in the cache and could not be fetched from the Hugging Face Hub.

    >>> issubclass(ModelUnavailable, RuntimeError)
    True
    """


def hub_name(name: str | Path) -> str | None:
    """The Hub's repository that `name` stands for; None for what is on this disk, or should be.

    A folder or file of the name goes first.

    >>> hub_name("gpt2"), hub_name("owner/name"), hub_name("./folder")
    ('openai-community/gpt2', 'owner/name', None)
    """
    text = str(name)
    if Path(name).exists():
        return None
    return OPENAI.get(text) or (text if _REPOSITORY.fullmatch(text) else None)


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The folder or file on this disk that `name` stands for; fetched from the Hub if need be.

    The weights of OpenAI are taken from the cache without asking the network whether they changed.

    Raises:
        ModelUnavailable: it is a name on the Hub that could not be had.
        ValueError: the repository has no safetensors.

    >>> from pathlib import Path
    >>> Path("mine").mkdir()
    >>> str(locate("mine"))
    'mine'
    """
    repository = hub_name(name)
    if repository is None:
        return Path(name)
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ModelUnavailable(
            f"{name}: no such folder here, and the Hugging Face Hub needs the package "
            "huggingface_hub: pip install huggingface_hub"
        ) from error

    def get(file: str, version: str | None, turns: tuple[bool, ...]) -> Path:
        for local in turns:
            try:
                return Path(
                    hf_hub_download(repository, file, revision=version, local_files_only=local)
                )
            except LocalEntryNotFoundError:
                if local is turns[-1]:
                    raise
        raise AssertionError("the last turn returns or raises")

    turns = (True, False) if repository in OPENAI.values() else (False,)
    try:
        folder = get("config.json", revision, turns).parent
        commit = folder.name  # the same for all files, even if the branch moves meanwhile
        try:
            get("model.safetensors", commit, turns)
        except EntryNotFoundError as missing:
            # Offline it is not known whether the repository has no such file, or the cache.
            offline = isinstance(missing, LocalEntryNotFoundError)
            try:
                index = get("model.safetensors.index.json", commit, (True,) if offline else turns)
            except LocalEntryNotFoundError:
                raise missing from None
            for file in _files_of(index):
                get(file, commit, turns)
    except LocalEntryNotFoundError as error:
        raise ModelUnavailable(
            _no_model(name, repository, constants.HF_HUB_CACHE, error)
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{name}: https://huggingface.co/{repository} has no config.json with model.safetensors"
            " (or model.safetensors.index.json). Pickled weights are not read"
        ) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # HTTP errors are OSErrors or RuntimeErrors
        raise ModelUnavailable(
            _no_model(name, repository, constants.HF_HUB_CACHE, error)
        ) from error
    return folder


def _no_model(name: str | Path, repository: str, cache: str, error: Exception) -> str:
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return (
        f"{name}: no such folder here, and config.json and model.safetensors of "
        f"https://huggingface.co/{repository} are neither in the cache {cache} nor could be "
        f"fetched: {reason}. Fetch the two on another machine, put them into a folder and pass "
        "that folder"
    )


def load(folder: str | Path, *, dropout: float = 0.0) -> "GPT":
    """See :meth:`gpt2fast.GPT.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: see there.

    >>> save(gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16)), "mine")
    >>> load("mine").config.n_embd
    8
    """
    from gpt2fast.bigram import BIGRAMS
    from gpt2fast.model import GPT, GPTConfig

    folder = Path(folder)
    described = _read_config(folder)
    config = GPTConfig(
        n_layer=described["n_layer"],
        n_head=described["n_head"],
        n_embd=described["n_embd"],
        vocab_size=described["vocab_size"],
        block_size=described["n_positions"],
        dropout=dropout,
        layer_norm_epsilon=described.get("layer_norm_epsilon", 1e-5),
    )
    with torch.device("meta"):
        model = BIGRAMS.get(described["model_type"], GPT)(config)
    state = model.state_dict()
    tensors = _read_tensors(folder)
    if missing := sorted(state.keys() - tensors.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first {missing[0]}")
    if unknown := sorted(tensors.keys() - state.keys()):
        raise ValueError(f"{folder}: {len(unknown)} unknown tensors, the first {unknown[0]}")
    for name, wanted in state.items():
        tensor = tensors[name]
        if name.endswith(CONV1D):
            tensor = tensor.t()
        if name == "transformer.wte.weight" and tensor.shape[0] == config.vocab_size:
            pad = config.padded_vocab_size - config.vocab_size
            tensor = torch.cat([tensor, tensor.new_zeros(pad, tensor.shape[1])])
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, config.json implies"
                f" {tuple(wanted.shape)}"
            )
        state[name] = tensor.contiguous()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    from gpt2fast.bigram import BIGRAMS

    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not a Hugging Face GPT-2 folder")
    try:
        described = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise ValueError(f"{path} holds {type(described).__name__}, not an object")
    if described.get("model_type") in BIGRAMS:
        return described
    if described.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {described.get('model_type')!r}, not 'gpt2'")
    activation = described.get("activation_function", "gelu_new")
    if activation not in TANH_GELU:
        raise ValueError(
            f"{path}: activation_function {activation!r} is not the tanh-GELU of GPT-2"
        )
    for name, wanted in (
        ("tie_word_embeddings", True),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if described.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name}={described[name]} is not supported, only {wanted} is")
    width, hidden = described.get("n_embd"), described.get("n_inner")
    if hidden not in (None, 4 * (width or 0)):
        raise ValueError(f"{path}: n_inner={hidden} is not supported, only 4 * n_embd is")
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"):
        if not isinstance(described.get(name), int):
            raise ValueError(f"{path}: {name} is {described.get(name)!r}, not an integer")
    return described


def _files_of(index: Path) -> list[str]:
    """The names of the safetensors files that an index lists."""
    try:
        files = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files") from error
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {file!r}, which is no safetensors file beside it")
    return files


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of one or several safetensors files, under this package's names."""
    index = folder / "model.safetensors.index.json"
    files = _files_of(index) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    full = (
                        name
                        if name.startswith(("transformer.", "lm_head."))
                        else f"transformer.{name}"
                    )
                    if full == "lm_head.weight" or full.endswith(
                        (".attn.bias", ".attn.masked_bias")
                    ):
                        continue
                    tensors[full] = opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read, it may be cut short: {error}") from error
    return tensors


def save(
    model: "GPT",
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    end_of_text: int | None = None,
) -> None:
    """See :meth:`gpt2fast.GPT.save_pretrained`.

    Args:
        model: the model.
        folder: where it is written.
        dtype: of the weights in the file; by default the model's.
        end_of_text: the token that begins and ends texts; by default GPT-2's for its vocabulary.

    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=10, block_size=16))
    >>> save(model, "mine", dtype=torch.bfloat16)
    >>> next(load("mine").parameters()).dtype
    torch.bfloat16
    """
    config = model.config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if name == "transformer.wte.weight":
            tensor = tensor[: config.vocab_size]
        if name.endswith(CONV1D):
            tensor = tensor.t()
        tensors[name] = tensor.cpu().to(dtype or tensor.dtype).contiguous()
    if end_of_text is None and config.vocab_size == 50257:
        end_of_text = 50256
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }
    if model.model_type != "gpt2":  # another program is to see that it cannot open this
        described |= {"architectures": None, "model_type": model.model_type}
    temporary = folder / f".model.safetensors.{os.getpid()}"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / "model.safetensors")
        temporary.write_text(json.dumps(described, indent=2) + "\n")
        os.replace(temporary, folder / "config.json")
    finally:
        temporary.unlink(missing_ok=True)
