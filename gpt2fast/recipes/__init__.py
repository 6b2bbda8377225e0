"""Named configurations: ``gpt2fast train --config NAME``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_recipe", "recipes"]

_FOLDER = Path(__file__).parent


def recipes() -> list[str]:
    """The names.

    >>> recipes()
    ['gpt2-124m-fineweb-edu', 'gpt2-124m-one-gpu', 'shakespeare-cpu']
    """
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a configuration that is given by name or path; a file of the name goes first.

    Raises:
        FileNotFoundError: it is neither.

    >>> find_recipe("shakespeare-cpu").name
    'shakespeare-cpu.toml'
    """
    path = Path(name)
    if path.exists() or path.suffix:
        return path
    if str(name) not in recipes():
        raise FileNotFoundError(
            f"{name}: no such file, and no recipe: those are {', '.join(recipes())}"
        )
    return _FOLDER / f"{name}.toml"
