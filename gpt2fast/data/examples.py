"""Examples to imitate: prompts and responses, with the loss on the responses only.

A line of JSONL is ``{"prompt": ..., "response": ...}`` or ``{"messages": [{"role": ..., "content":
...}, ...]}``. An example is the prompt's tokens, the response's and end-of-text; prompt and response
are encoded apart and follow each other as they are, so a space or line end between them belongs to
one of the two. Messages are written as text, for GPT-2 has no tokens for roles:

    System: content\\n\\nUser: content\\n\\nAssistant: content<|endoftext|>\\n\\nUser: ...

where all that an assistant says, from the space after the colon to end-of-text, is a response.

On disk examples are shards like any others. Three numbers that are no tokens mark, in the stream,
where an example begins and where the loss does and does not count; they are taken out when it is
read. So a program that knows nothing of examples refuses the shard instead of training on prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2fast.data.tokenizers import Tokenizer, Tokens, without_surrogates

__all__ = ["IGNORE", "PROMPT", "RESPONSE", "START", "encode_example", "split_example"]

START: Final = 65535  #: an example begins, with a prompt
RESPONSE: Final = 65534  #: what follows is a response
PROMPT: Final = 65533  #: what follows is a prompt again

#: The target of a position that has none: PyTorch's ignore_index.
IGNORE: Final = -100


def encode_example(coder: Tokenizer, value: Any, where: str) -> tuple[Tokens, int]:
    """The tokens of a JSON object as they lie on disk, with marks, and its characters.

    Raises:
        ValueError: it is neither form, holds no response, or the tokenizer's vocabulary leaves no
            room for the marks; `where` is named.
    """
    if coder.vocab_size > PROMPT:
        raise ValueError(f"examples need a vocabulary of at most {PROMPT}, got {coder.vocab_size}")
    ids: list[npt.NDArray[np.uint16]] = [np.array([START], dtype=np.uint16)]
    characters = 0
    for text, is_response in _parts(value, where):
        characters += len(text)
        part = coder.encode(without_surrogates(text))
        if not is_response:
            ids.append(part)
            continue
        end = [] if coder.eot_token is None else [coder.eot_token]
        ids += [np.array([RESPONSE], np.uint16), part, np.array([*end, PROMPT], np.uint16)]
    return np.concatenate(ids).astype(np.uint16, copy=False), characters


def _parts(value: Any, where: str) -> Iterator[tuple[str, bool]]:
    """Texts in order, and whether each is a response."""
    match value:
        case {"prompt": str(prompt), "response": str(response)}:
            if not response:
                raise ValueError(f"{where}: the response is empty")
            yield prompt, False
            yield response, True
        case {"messages": [_, *_] as messages}:
            yield from _conversation(messages, where)
        case _:
            has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where}: prompt and response, or messages, are wanted, got {has}")


def _conversation(messages: list[Any], where: str) -> Iterator[tuple[str, bool]]:
    prompt, responses = "", 0
    for number, message in enumerate(messages):
        match message:
            case {"role": ("system" | "user" | "assistant") as role, "content": str(content)}:
                pass
            case _:
                raise ValueError(
                    f"{where}: message {number}: role (system, user or assistant) and content, a "
                    "text, are wanted"
                )
        prompt += ("\n\n" if number else "") + f"{role.capitalize()}:"
        if role == "assistant":
            if not content:
                raise ValueError(f"{where}: message {number}: the response is empty")
            yield prompt, False
            yield f" {content}", True
            prompt, responses = "", responses + 1
        else:
            prompt += f" {content}"
    if not responses:
        raise ValueError(f"{where}: no message of an assistant")


def split_example(stored: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Tokens (n,) of an example without marks, and which of them the loss counts."""
    ids = stored.astype(np.int64)
    switch = np.where(ids == RESPONSE, 1, np.where(ids >= PROMPT, -1, 0))
    # A mark holds until the next: its place, carried on.
    last = np.maximum.accumulate(np.where(switch != 0, np.arange(len(ids)), 0))
    kept = switch == 0
    return ids[kept], (switch[last] > 0)[kept]
