"""How a module gets a fast forward, how it loses it again, and the account of both.

A fast forward is a plain function of a module, bound as the module's own `forward`. The module stays
the object it was: class, parameters, buffers, hooks and state_dict are untouched, and the class's
forward is there for whatever the fast one does not cover. It is bound by a `partial`, which, other
than a method, survives deepcopy and pickle: copies are fast too.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import nn

_Forward = TypeVar("_Forward", bound=Callable[..., Any])
_FAST: set[Callable[..., Any]] = set()
_PLAN = "_gpt2fast_plan"


def fast_forward(function: _Forward) -> _Forward:
    """Marks `function` as one that :func:`bind` may bind and :func:`revert` may take away."""
    _FAST.add(function)
    return function


def bound(module: nn.Module) -> Callable[..., Any] | None:
    """The fast forward that `module` has, or None."""
    own = module.__dict__.get("forward")
    function = own.func if isinstance(own, partial) else None
    return function if function in _FAST else None


def obstacle(module: nn.Module) -> str | None:
    """Why `module` cannot be given another forward, or None."""
    if "forward" in module.__dict__ and bound(module) is None:
        return "its forward was replaced on the instance by somebody else"
    return None


def bind(module: nn.Module, function: Callable[..., Any], plan: Any = None) -> None:
    """Makes `function` the forward of `module`; `plan` is what it needs to know, see :func:`plan`."""
    assert function in _FAST
    module.__dict__["forward"] = partial(function, module)
    module.__dict__[_PLAN] = plan


def plan(module: nn.Module) -> Any:
    """What :func:`bind` was given for this module."""
    return module.__dict__[_PLAN]


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `module` would compute without us."""
    return type(module).forward(module, *args, **kwargs)


def revert(module: nn.Module) -> int:
    """Gives every module in the tree its own forward back; returns how many had a fast one.

    Raises:
        RuntimeError: somebody wrapped a fast forward in the meantime; nothing is changed then.

    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    >>> report = gpt2fast.optimize(model)
    >>> revert(model), revert(model)
    (1, 0)
    """
    wrapped = [
        name or type(part).__name__
        for name, part in module.named_modules()
        if _PLAN in part.__dict__ and bound(part) is None
    ]
    if wrapped:
        raise RuntimeError(
            f"the forward of {', '.join(wrapped)} was wrapped after gpt2fast replaced it; undo that"
            " first"
        )
    count = 0
    for part in module.modules():
        if bound(part) is not None:
            del part.__dict__["forward"]
            part.__dict__.pop(_PLAN, None)
            count += 1
    return count


@dataclass(frozen=True)
class Entry:
    """One module and what became of it: `reason` says why it was left alone, or what to know.

    >>> report = gpt2fast.optimize(torch.nn.Sequential(torch.nn.LayerNorm(8)))
    >>> report.entries
    [Entry(name='0', module='LayerNorm', kind='layer_norm', replaced=True, reason='')]
    """

    name: str
    module: str  # the name of its class
    kind: str  # attention, mlp, gelu, layer_norm, embedding or loss
    replaced: bool
    reason: str = ""


@dataclass
class SwapReport:
    """What was replaced, what was left alone and why; printable.

    Attributes:
        entries: one for every module that was looked at.

    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    >>> report = gpt2fast.optimize(model)
    >>> print(report)
    replaced: layer_norm: LayerNorm (0)
    >>> report.revert()
    1
    """

    entries: list[Entry] = field(default_factory=list)
    _models: list[weakref.ref[nn.Module]] = field(default_factory=list, repr=False)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Entry]:
        """The modules that run on our kernels now."""
        return [entry for entry in self.entries if entry.replaced]

    @property
    def left_alone(self) -> list[Entry]:
        """The modules that could have been ours by their kind, each with a reason."""
        return [entry for entry in self.entries if not entry.replaced]

    def counts(self) -> dict[str, int]:
        """How many modules of each kind were replaced."""
        return dict(Counter(entry.kind for entry in self.replaced))

    def revert(self) -> int:
        """Undoes it; returns how many modules got their own forward back. A second call does nothing.

        Raises:
            RuntimeError: a forward was wrapped by somebody else in the meantime.
        """
        while self._undo:
            self._undo.pop()()
        models = [model for reference in self._models if (model := reference()) is not None]
        count = sum(revert(model) for model in models)
        self._models.clear()
        return count

    def add(self, name: str, module: nn.Module, kind: str, why_not: str | None, note: str) -> None:
        """Adds the entry of one module: left alone where there is a `why_not`."""
        reason = note if why_not is None else why_not
        self.entries.append(Entry(name, type(module).__name__, kind, why_not is None, reason))

    def __str__(self) -> str:
        return "\n".join(self._lines()) or "gpt2fast: nothing here that it could replace"

    def _lines(self) -> Iterator[str]:
        for title, entries in (("replaced", self.replaced), ("left alone", self.left_alone)):
            groups: dict[tuple[str, str, str], list[str]] = {}
            for entry in entries:
                key = (entry.kind, entry.module, entry.reason)
                groups.setdefault(key, []).append(entry.name or "the module itself")
            for (kind, module, reason), names in groups.items():
                where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
                count = f"{len(names)} x " if len(names) > 1 else ""
                yield f"{title}: {kind}: {count}{module} ({where})" + (
                    f": {reason}" if reason else ""
                )
