"""HellaSwag: which of four endings goes on from a context (Zellers et al. 2019, arXiv:1905.07830).

The context is encoded by itself, each ending with a space before it, and the loss of an ending is
that of its own tokens only. `acc` takes the ending with the smallest sum, `acc_norm` with the
smallest mean. That is how build-nanogpt and the published numbers of GPT-2 do it (124M: 0.2859 and
0.2955).

Scoring them one by one would run the model over a context four times and over every position of the
vocabulary. Here an example is its context, once, and after it the endings without their last tokens;
examples follow each other in one row of tokens, without padding. Norms and matrix products do not
mind whose token is whose. Attention does: an ending sees the context and itself, at the positions
that it has behind the context. The head is applied to the positions that predict an ending's token,
and to no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from gpt2fast import functional
from gpt2fast.data.download import fetch
from gpt2fast.data.tokenizers import Tokenizer
from gpt2fast.model import GPT, KVCache
from gpt2fast.nn import Attend

__all__ = [
    "Example",
    "HellaSwagResult",
    "Scores",
    "download_examples",
    "evaluate_hellaswag",
    "read_examples",
    "score_examples",
]

HellaSwagSplit = Literal["val", "train"]

URL: Final = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"
#: Of rowanz/hellaswag at a29ff8e; of the training split none is known to us.
SHA256: Final[dict[str, str | None]] = {
    "val": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "train": None,
}

#: Positions in one call of the model: enough to keep two cores busy, or a GPU.
BATCH_TOKENS: Final = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class Example:
    """A context, its possible endings and the index of the right one.

    >>> example = Example("The sky is", ("blue", "loud"), label=0)
    >>> example.endings[example.label]
    'blue'
    """

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Scores:
    """The losses of all endings, by example: sums in nats and the number of tokens, each (n, E).

    `truncated` counts the examples that were cut to fit the model's block_size.

    >>> import numpy as np
    >>> Scores(np.array([[6.0, 8.0]]), np.array([[2, 4]]), truncated=0).means
    array([[3., 2.]])
    """

    losses: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    truncated: int

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """Loss a token, (n, E)."""
        return self.losses / self.tokens


@dataclass(frozen=True)
class HellaSwagResult:
    """Accuracies and their standard errors, as shares of `examples`.

    `acc` goes by the sum of an ending's losses, `acc_norm` by their mean. `truncated` counts the
    examples that were cut to fit the model's block_size.

    >>> HellaSwagResult(100, 0.29, 0.3, 0.045, 0.046, truncated=0).acc_norm
    0.3
    """

    examples: int
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    truncated: int


def download_examples(split: HellaSwagSplit = "val") -> Path:
    """The file of a split, from the cache or downloaded into it.

    Raises:
        DownloadError: it is in no cache and could not be fetched; the message says what to do.

    >>> import inspect
    >>> inspect.signature(download_examples).parameters["split"].default  # or "train"
    'val'
    """
    return fetch(
        URL.format(split),
        f"hellaswag_{split}.jsonl",
        SHA256[split],
        what=f"HellaSwag's {split} split",
        by_hand="--data PATH",
    )


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """The examples of a JSONL file: objects with ctx, endings and label, one a line.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is something else (named by its number), or there is none.

    >>> from pathlib import Path
    >>> line = '{"ctx": "The sky is", "endings": ["blue", "loud"], "label": 0}'
    >>> _ = Path("mine.jsonl").write_text(line)
    >>> read_examples("mine.jsonl")
    [Example(context='The sky is', endings=('blue', 'loud'), label=0)]
    """
    examples: list[Example] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(examples) == limit:
                break
            if line.strip():
                try:
                    examples.append(_example(json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not examples:
        raise ValueError(f"{path}: no examples")
    return examples


def _example(value: Any) -> Example:
    match value:
        case {"ctx": str(context), "endings": [_, _, *_] as endings, "label": int(label)}:
            pass
        case {"ctx": str(), "endings": list()} if "label" not in value:
            raise ValueError("no label: HellaSwag's test split cannot be scored, use val")
        case _:
            raise ValueError("not an example: ctx, a list of endings and label are wanted")
    if not all(isinstance(ending, str) for ending in endings):
        raise ValueError("endings must be strings")
    if not 0 <= label < len(endings):
        raise ValueError(f"label {label} is none of {len(endings)} endings")
    if not context:
        raise ValueError("ctx is empty")
    return Example(context, tuple(endings), label)


def evaluate_hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> HellaSwagResult:
    """Accuracies on `examples`; see `score_examples` for the arguments.

    Raises:
        InterruptedError, ValueError: as `score_examples`.

    >>> from gpt2fast.data import ByteTokenizer
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=32))
    >>> examples = [Example("The sky is", ("blue", "loud!"), label=0)]
    >>> evaluate_hellaswag(model, ByteTokenizer(), examples).acc in (0.0, 1.0)
    True
    """
    scores = score_examples(
        model,
        tokenizer,
        examples,
        batch_tokens=batch_tokens,
        dtype=dtype,
        progress=progress,
        cancelled=cancelled,
    )
    labels = np.array([example.label for example in examples])
    acc = float(np.mean(scores.losses.argmin(1) == labels))
    acc_norm = float(np.mean(scores.means.argmin(1) == labels))

    def error(share: float) -> float:
        return float(np.sqrt(share * (1 - share) / max(1, len(examples) - 1)))

    return HellaSwagResult(
        len(examples), acc, acc_norm, error(acc), error(acc_norm), scores.truncated
    )


def score_examples(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Scores:
    """The loss of every ending of every example.

    What is longer than block_size is cut: the context from its beginning, so that the longest
    ending fits, to at least its last token; then endings at their end.

    Args:
        model: on its device; runs in evaluation mode.
        tokenizer: the model's.
        examples: all with the same number of endings.
        batch_tokens: positions in a call of the model; by default 4096 on a CPU.
        dtype: bfloat16 or float16 runs under autocast.
        progress: show a progress bar if stderr is a terminal.
        cancelled: asked before each batch.

    Raises:
        InterruptedError: `cancelled`.
        ValueError: no examples, different numbers of endings, batch_tokens below 1, or the
            tokenizer's vocabulary is not the model's.

    >>> from gpt2fast.data import ByteTokenizer
    >>> model = gpt2fast.GPT(gpt2fast.GPTConfig(1, 2, 8, vocab_size=257, block_size=32))
    >>> examples = [Example("The sky is", ("blue", "loud!"), label=0)]
    >>> scores = score_examples(model, ByteTokenizer(), examples)
    >>> scores.losses.shape, scores.tokens  # an ending is scored with the blank before it
    ((1, 2), array([[5, 6]]))
    """
    device = next(model.parameters()).device
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if len({len(example.endings) for example in examples}) != 1:
        raise ValueError("examples with one number of endings are wanted, and at least one example")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model "
            f"vocab_size={model.config.vocab_size}"
        )
    encoded = [_encode(tokenizer, example, model.config.block_size) for example in examples]
    losses = np.zeros((len(examples), len(examples[0].endings)))
    tokens = np.array([[len(ending) for ending in item.endings] for item in encoded])
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None),
            tqdm(total=len(examples), unit=" examples", disable=None if progress else True) as bar,
        ):
            for batch in _batches(encoded, batch_tokens):
                if cancelled():
                    raise InterruptedError("the scoring was cancelled")
                losses[batch] = _score(model, [encoded[i] for i in batch], device)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return Scores(losses, tokens, sum(item.truncated for item in encoded))


@dataclass(frozen=True)
class _Encoded:
    context: npt.NDArray[np.uint16]
    endings: list[npt.NDArray[np.uint16]]
    truncated: bool

    @property
    def positions(self) -> int:
        """What the model is run over; an ending's last token is no input."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def _encode(tokenizer: Tokenizer, example: Example, block_size: int) -> _Encoded:
    context = tokenizer.encode(example.context)
    endings = [tokenizer.encode(" " + ending) for ending in example.endings]
    over = len(context) + max(map(len, endings)) - 1 - block_size
    if over <= 0:
        return _Encoded(context, endings, False)
    kept = context[min(over, len(context) - 1) :]
    room = block_size + 1 - len(kept)
    return _Encoded(kept, [ending[:room] for ending in endings], True)


def _batches(encoded: Sequence[_Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of neighbours that run together: at most `batch_tokens` positions, or one example."""
    batch: list[int] = []
    taken = 0
    for index, item in enumerate(encoded):
        if batch and taken + item.positions > batch_tokens:
            yield batch
            batch, taken = [], 0
        batch.append(index)
        taken += item.positions
    yield batch


class _Packed(KVCache):
    """Examples in one row of tokens, and the attention within them.

    Attributes:
        idx: tokens, (1, T): of each example the context, then every ending but its last token.
        scored, targets: the rows of the hidden states that predict the endings' tokens, and these
            tokens, (N,); one ending after the other.
    """

    def __init__(self, batch: Sequence[_Encoded], device: torch.device) -> None:
        tokens, positions, scored, keys = [], [], [], []
        starts = {"q": [0], "k": [0]}
        end = 0  # of the row so far
        for item in batch:
            context = np.arange(end, end + len(item.context))
            tokens.append(item.context)
            positions.append(context - end)
            end += len(context)
            for ending in item.endings:
                own = np.arange(end, end + len(ending) - 1)
                tokens.append(ending[:-1])
                positions.append(len(context) + own - end)
                scored += [context[-1:], own]
                # The first ending goes on from the context, and is one document with it.
                keys += [context, own]
                starts["q"].append(end + len(own))
                starts["k"].append(starts["k"][-1] + len(context) + len(own))
                end += len(own)

        def tensor(parts: Sequence[npt.NDArray[Any]], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(device, dtype)

        self.idx, self.positions = (tensor(part).unsqueeze(0) for part in (tokens, positions))
        self.scored, self.targets = tensor(scored), tensor([e for i in batch for e in i.endings])
        self.capacity, self.length = end, 0
        self._keys = tensor(keys)
        self._starts = [tensor([np.array(s)], torch.int32) for s in starts.values()]
        self._longest = [int(np.diff(s).max()) for s in starts.values()]

    def attention(self, layer: int) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
            key, value = (part[0].index_select(0, self._keys) for part in (key, value))
            (q_starts, k_starts), (longest_q, longest_k) = self._starts, self._longest
            y = functional.flash_attn_varlen_func(
                query[0], key, value, q_starts, k_starts, longest_q, longest_k, dropout_p,
                causal=True,
            )  # fmt: skip
            return y.unsqueeze(0)

        return attend


def _score(model: GPT, batch: Sequence[_Encoded], device: torch.device) -> npt.NDArray[np.float64]:
    """Summed losses (B, E) of a batch."""
    packed = _Packed(batch, device)
    hidden = model.hidden(packed.idx, packed)[0]
    losses = functional.linear_cross_entropy(
        hidden.index_select(0, packed.scored),
        model.transformer.wte.weight,
        packed.targets,
        reduction="none",
        vocab_size=model.config.vocab_size,
    )
    lengths = [len(ending) for item in batch for ending in item.endings]
    starts = np.cumsum([0, *lengths[:-1]])
    return np.add.reduceat(losses.double().cpu().numpy(), starts).reshape(len(batch), -1)
