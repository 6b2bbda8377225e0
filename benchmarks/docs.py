"""Writes the documentation as Markdown: a page for each op, loss curves, and benchmarks/pages.

python -m benchmarks.docs --out DIR

An op's page is made of what the sources already say: the docstrings of its public functions, its
reference, the head comments of its kernels, and the measurements in benchmarks/results. Nothing runs.
"""

import argparse
import ast
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import convergence, report
from gpt2fast import backends, functional, nn

ROOT = Path(__file__).parents[1]
PAGES = Path(__file__).parent / "pages"
RESULTS = Path(__file__).parent / "results"
#: By backend, what it is and the sources that may hold its kernels.
SOURCES = {
    "reference": ("plain PyTorch, the specification", "gpt2fast/ops/{0}/reference.py"),
    "cpu": ("C++ for the CPU", "gpt2fast/ops/{0}/cpu.py", "csrc/{0}/*_cpu.cpp"),
    "triton": ("Triton for NVIDIA GPUs", "gpt2fast/ops/{0}/triton.py"),
    "cuda": ("CUDA C++ for NVIDIA GPUs", "gpt2fast/ops/{0}/cuda.py", "csrc/{0}/{0}*.cu"),
    "cublaslt": ("NVIDIA's library, never the default unmeasured", "gpt2fast/ops/{0}/cublaslt.py"),
}
#: The ops that have a page; the last two have kernels for the CPU only.
OPS = (*backends.OPS, "linear", "block")
#: Ops without a function of their own: the module that runs on them.
MODULES: dict[str, Callable[..., Any]] = {"block": nn.Block}
#: What a page says of an op, in this order.
SECTIONS = ("Functions", "Reference", "Backends", "Kernels", "Bytes and FLOPs", "Measured speed")


def page(op: str) -> str:
    """The page of an op, its room's name."""
    texts = (
        "\n".join(map(function_text, functions(op))),
        fenced((ROOT / SOURCES["reference"][1].format(op)).read_text(), "python"),
        backends_text(op),
        "\n".join(f"`{path}`\n\n{fenced(head)}" for path, head in kernels(op).items()),
        cost_text(op),
        speed_text(op),
    )
    parts = [f"## {title}\n\n{text}" for title, text in zip(SECTIONS, texts, strict=True)]
    return "\n".join([f"# {op}\n", *parts])


def functions(op: str) -> list[Callable[..., Any]]:
    """The public functions of an op, or its module."""
    if op in MODULES:
        return [MODULES[op]]
    public = (getattr(functional, name) for name in functional.__all__)
    return [one for one in public if one.__module__ == f"gpt2fast.ops.{op}.functional"]


def function_text(function: Callable[..., Any]) -> str:
    """A function's signature and docstring."""
    arguments = ", ".join(
        str(parameter).partition(":")[0]
        + ("" if parameter.default is parameter.empty else f"={parameter.default!r}")
        for parameter in inspect.signature(function).parameters.values()
    )
    room = "nn" if inspect.isclass(function) else "functional"
    signature = f"gpt2fast.{room}.{function.__name__}({arguments})"
    text = fenced(f"{signature}\n\n{inspect.getdoc(function)}")
    return f"### {function.__name__}\n\n{text}"


def files(op: str, backend: str) -> list[str]:
    """The sources of a backend that exist."""
    patterns = SOURCES[backend][1:]
    found = (path for pattern in patterns for path in sorted(ROOT.glob(pattern.format(op))))
    return [str(path.relative_to(ROOT)) for path in found]


def backends_text(op: str) -> str:
    rows = []
    for name in backends.NAMES:
        sources = files(op, name)
        rows.append([name, SOURCES[name][0], ", ".join(f"`{f}`" for f in sources) or "none"])
    return report.table(["backend", "what it is", "sources"], rows) + "\n"


def kernels(op: str) -> dict[str, str]:
    """The head comments that describe kernels, by file: what only calls kernels has one line."""
    paths = (path for backend in ("cpu", "triton", "cuda") for path in files(op, backend))
    heads = {path: head_comment(ROOT / path) for path in paths}
    return {path: head for path, head in heads.items() if "\n" in head}


def head_comment(path: Path) -> str:
    """The comment or docstring that a source begins with."""
    text = path.read_text()
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    head = re.match(r"(//[^\n]*\n)+", text)
    return "" if head is None else re.sub(r"^// ?", "", head.group(), flags=re.MULTILINE).rstrip()


def room(benchmark: str) -> str | None:
    """The op that a benchmark is about, None for one about a whole model."""
    ops = sorted(OPS, key=len, reverse=True)  # gelu_mlp before gelu
    return next((op for op in ops if op in benchmark), None)


def measured(op: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the latest results for an op (None: whole models), and where they are from."""
    wholes = sorted(
        (report.load(path) for path in RESULTS.glob("*.json")), key=lambda pair: pair[1]["datetime"]
    )
    latest: dict[str, tuple[list[dict[str, Any]], str]] = {}
    for rows, whole in wholes:
        for name in dict.fromkeys(row["op"] for row in rows if room(row["op"]) == op):
            latest[name] = [row for row in rows if row["op"] == name], report.title(whole)
    found = [row for rows, _ in latest.values() for row in rows]
    return found, list(dict.fromkeys(title for _, title in latest.values()))


def cost_text(op: str) -> str:
    """What any implementation must move and compute at the shapes of GPT-2 124M."""
    rows, _ = measured(op)
    shown = {
        (row["op"], row["label"], row["direction"]): (row["bytes"], row["flops"]) for row in rows
    }
    lines = [
        [*key, f"{size / 1e6:.3g} MB", f"{flops / 1e9:.3g} GFLOP" if flops else "not counted"]
        for key, (size, flops) in shown.items()
    ]
    note = (
        "Inputs read once and outputs written once, at shapes of GPT-2 124M: the least that any"
        " implementation does. Elementwise work is not counted, since memory bounds it.\n\n"
    )
    return note + report.table(["benchmark", "shape", "direction", "bytes", "FLOPs"], lines) + "\n"


def speed_text(op: str | None) -> str:
    rows, titles = measured(op)
    return "".join(f"{title}\n\n" for title in titles) + report.tables(rows)


def curves() -> Path | None:
    """The latest result of benchmarks.convergence; a picture lies beside it."""
    return max((RESULTS / "convergence").glob("*.json"), default=None)


def convergence_text(path: Path) -> str:
    """The page of the loss curves."""
    found = json.loads(path.read_text())
    rows = [
        [p, f"{far['gpt2fast']:.1e}", f"{far['reference']:.1e}", f"{2 * far['reference']:.1e}"]
        for p, far in found["distances"].items()
    ]
    head = ["precision", "gpt2fast", "plain PyTorch", "bound of gpt2fast's"]
    text = inspect.cleandoc(convergence.__doc__ or "").partition("\n\nwrites")[0]
    why = inspect.cleandoc(convergence.__doc__ or "").partition(".png. ")[2]
    return (
        f"# Loss curves\n\n{text}\n\n{why}\n\n{found['setting']}; {path.stem}.\n\n"
        f"![loss curves]({path.with_suffix('.png').name})\n\n"
        f"Mean distance from the curve in fp64 over {len(found['losses']['fp64 reference'])} steps:"
        f"\n\n{report.table(head, rows)}\n"
    )


def fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def pages() -> Iterator[tuple[str, str]]:
    """The name and the text of every page."""
    hand = sorted(PAGES.glob("*.md"))
    titles = {path.name: path.read_text().partition("\n")[0].removeprefix("# ") for path in hand}
    drawn = curves()
    index = [
        "# gpt2fast\n",
        *(f"- [{title}]({name})" for name, title in titles.items()),
        *(["- [Loss curves against plain PyTorch](convergence.md)"] if drawn else []),
        "\n## Operations\n",
        *(f"- [{op}]({op}.md): {summary(op)}" for op in OPS),
        "\n## Whole models\n",
        speed_text(None),
    ]
    yield "index.md", "\n".join(index)
    for path in hand:
        yield path.name, path.read_text()
    if drawn:
        yield "convergence.md", convergence_text(drawn)
    for op in OPS:
        yield f"{op}.md", page(op)


def summary(op: str) -> str:
    return ", ".join(f"`{function.__name__}`" for function in functions(op))


def write(folder: Path) -> list[Path]:
    """Writes all pages and their picture into a folder, which is made if need be; returns paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in pages():
        (folder / name).write_text(text)
        written.append(folder / name)
    if drawn := curves():
        picture = drawn.with_suffix(".png")
        written.append(Path(shutil.copy(picture, folder / picture.name)))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where pages go")
    for path in write(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
