"""Every public name says what it takes, gives and raises, and shows it in an example that runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast import ecosystem

#: Public is what `__all__` lists of the modules and packages that lie directly in gpt2fast; of a
#: module without one, what it defines itself. What lies deeper is public where it is imported above.
PUBLIC = (
    "",
    *(m.name for m in pkgutil.iter_modules(gpt2fast.__path__) if m.name[0] != "_"),
    *(f"ecosystem.{m.name}" for m in pkgutil.iter_modules(ecosystem.__path__) if m.name[0] != "_"),
)
#: A doctest of a module itself; the others are those of names.
MODULES = ("", "swap")
SHAPE = re.compile(
    r"\((\.\.\.|\w+( \w+)*)(, [\w. ]+)*,?\)|\(\w \+ 1,\)|int64 \(B"
    r"|any shapes?|x's shape|scalar|one-element"
)
#: What an entry under Args may say instead: it is told elsewhere, or no tensor is taken.
ELSEWHERE = re.compile(r"shapes|as for|as in|only (None|their\s+defaults)")
#: Mathematics names where its formula is from, or the function that does.
SOURCE = re.compile(r"Source: |:(func|class):`|source are the module's")
FORMULAS = re.compile(r"bigram|ecosystem\..*|functional|nn|optim")
DTYPE = re.compile(r"dtype|float32|bfloat16|fp32|bf16|int64|int32")


def load(name: str) -> ModuleType:
    return importlib.import_module(f"gpt2fast.{name}".rstrip("."))


def public(module: ModuleType) -> dict[str, Any]:
    """The functions and classes that a module offers."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    values = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value))
    }


def everything() -> Iterator[Any]:
    seen = set()
    for name in PUBLIC:
        for key, value in public(load(name)).items():
            if value not in seen:
                seen.add(value)
                yield pytest.param(name, value, id=f"{name}.{key}".lstrip("."))


@pytest.mark.parametrize(("module", "value"), list(everything()))
def test_public_name(
    module: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = inspect.getdoc(value) or ""
    assert ">>>" in text, "no example"
    if "Raises" not in text and not issubclass_of(value, BaseException):
        assert not raising(value), "raises something that its docstring does not name"
    if takes_tensors(value):
        assert SHAPE.search(text), "no shapes"
        assert DTYPE.search(text), "no dtypes"
        for name, entry in tensors_of(value, text).items():
            assert SHAPE.search(entry) or ELSEWHERE.search(entry), f"no shape of {name}"
    if FORMULAS.fullmatch(module):
        assert SOURCE.search(text), "no source"
    run_examples(value, module, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(load(name), name, tmp_path, monkeypatch)


def run_examples(value: Any, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an empty folder, after ``import gpt2fast, torch`` and a star import of the module."""
    monkeypatch.chdir(folder)
    names = {**public(load(module)), "gpt2fast": gpt2fast, "torch": torch}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = doctest.DocTestFinder(recurse=inspect.isclass(value)).find(
        value, getattr(value, "__name__", None), globs=names
    )
    torch.manual_seed(0)
    for test in tests:
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0


def issubclass_of(value: Any, kind: type) -> bool:
    return inspect.isclass(value) and issubclass(value, kind)


def raising(value: Any) -> bool:
    """Whether the body of a function, or of a class's constructor, raises or checks arguments."""
    body = value.__init__ if inspect.isclass(value) else inspect.unwrap(value)
    try:
        source = inspect.getsource(body)
    except (OSError, TypeError):  # a constructor that was not written: a dataclass
        return False
    return bool(re.search(r"^\s+(raise|check_\w+\(|_check\w*\()", source, flags=re.MULTILINE))


def tensors_of(value: Any, text: str) -> dict[str, str]:
    """By the name of each tensor that has an entry under Args, what that says."""
    entries = re.findall(
        r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", text.partition("Args:\n")[2], re.MULTILINE
    )
    named = {name: entry for names, entry in entries for name in names.split(", ")}
    return {
        parameter.name: named[parameter.name]
        for parameter in inspect.signature(value).parameters.values()
        if "Tensor" in str(parameter.annotation) and parameter.name in named
    }


def takes_tensors(value: Any) -> bool:
    body = value.forward if inspect.isclass(value) and hasattr(value, "forward") else value
    try:
        parameters = inspect.signature(body).parameters.values()
    except ValueError:
        return False
    return any(p.annotation is Tensor or "Tensor" in str(p.annotation) for p in parameters)
