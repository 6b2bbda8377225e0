"""`python -m benchmarks.docs` says the whole of every op, and the hand-written pages are true."""

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import gpt2fast.ops
from benchmarks import docs
from gpt2fast import backends, functional

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gpt2fast"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages by name, as the command writes them."""
    folder = tmp_path_factory.mktemp("pages")
    paths = docs.write(folder / "new")
    return {path.name: path.read_text() for path in paths if path.suffix == ".md"}


def test_the_command_names_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["docs", "--out", str(tmp_path)])
    docs.main()
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, tmp_path.iterdir()))


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_has_a_page_with_each_section(written: dict[str, str], op: str) -> None:
    sections = dict(re.findall(r"^## (.+)\n([\s\S]*?)(?=^## |\Z)", written[f"{op}.md"], re.M))
    assert tuple(sections) == docs.SECTIONS
    for word in ("Args:", "Raises:", "float32"):
        assert word in sections["Functions"]
    for kind in ("cpu", "triton", "cuda"):
        assert docs.files(op, kind), f"no {kind} sources"
        assert f"ops/{op}/{kind}.py" in sections["Backends"]
    for word in ("moves", "work"):  # a kernel's head comment says them
        assert re.search(rf"^ *{word}\b", sections["Kernels"], re.M), word
    assert re.search(r"\| +\d[\d.e+]* MB", sections["Bytes and FLOPs"])
    assert "gpt2fast cpu" in sections["Measured speed"]
    assert "threads, torch" in sections["Measured speed"]


def test_every_public_function_is_on_one_page(written: dict[str, str]) -> None:
    for name in functional.__all__:
        summary = inspect.getdoc(getattr(functional, name)).partition("\n")[0]  # type: ignore[union-attr]
        (page,) = (text for text in written.values() if f"### {name}\n" in text)
        assert summary in page


def test_every_kernel_source_is_on_a_page(written: dict[str, str]) -> None:
    sources = [*ROOT.glob("csrc/*/*_cpu.cpp"), *ROOT.glob("csrc/*/*.cu")]
    sources += ROOT.glob("gpt2fast/ops/*/triton.py")
    everything = "\n".join(written.values())
    for source in sources:
        if source.parent.name not in ("testing", "decode"):  # no ops: faults, and a whole model
            assert f"`{source.relative_to(ROOT)}`\n" in everything, source


def test_the_index_and_links_lead_somewhere(written: dict[str, str]) -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", written["index.md"]))
    assert linked == written.keys() - {"index.md"}
    assert "training step of GPT-2 124M" in written["index.md"]


def test_the_loss_curves_are_shown_and_within_their_bound(written: dict[str, str]) -> None:
    latest = docs.curves()
    assert latest is not None
    assert f"]({latest.stem}.png)" in written["convergence.md"]
    found = json.loads(latest.read_text())
    assert all(len(losses) >= 300 for losses in found["losses"].values())
    for precision, far in found["distances"].items():
        assert far["gpt2fast"] <= 2 * far["reference"]
        assert f"{far['gpt2fast']:.1e}" in written["convergence.md"], precision


def test_what_the_feature_table_says_of_torch_is_there(written: dict[str, str]) -> None:
    page = written["peers.md"]
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths == {8}  # six packages
    names = re.findall(r"`torch\.([\w.]+)\.(\w+)`(?: \(`(\w+)`)?", page)
    assert len(names) >= 6
    for module, name, argument in names:
        function = getattr(importlib.import_module(f"torch.{module}"), name)
        said = (
            str(function.__doc__)
            if inspect.isbuiltin(function)
            else str(inspect.signature(function))
        )
        assert not argument or argument in said


def test_no_room_imports_from_above(written: dict[str, str]) -> None:
    table = re.findall(r"^\| (`.+?) \|", written["architecture.md"], re.M)
    rank = {room: i for i, row in enumerate(table) for room in re.findall(r"`(\w+)`", row)}
    found = [path for path in PACKAGE.iterdir() if path.suffix in ("", ".py")]
    assert rank.keys() == {path.stem for path in found if path.name[0] not in "._"}
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        home = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if home in rank and isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "gpt2fast":
                    names = [f"gpt2fast.{alias.name}" for alias in node.names]
                for name in names:
                    parts = name.split(".")
                    if parts[0] == "gpt2fast" and len(parts) > 1 and parts[1] in rank:
                        assert rank[home] <= rank[parts[1]], f"{path} imports {name}"
                        checked += 1
    assert checked > 200


def test_the_op_of_the_how_to_works(
    written: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", written["add_an_op.md"], re.S)
    for name, text in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    home = tmp_path / "gpt2fast" / "ops"
    monkeypatch.setattr(gpt2fast.ops, "__path__", [*gpt2fast.ops.__path__, str(home)])
    monkeypatch.setattr(sys, "path", [str(tmp_path / "tests" / "ops"), *sys.path])
    tests = importlib.import_module("test_layer_scale")
    names = [name for name in vars(tests) if name.startswith("test_")]
    assert len(names) == 3
    for name in names:
        getattr(tests, name)()
    loaded = sys.modules["gpt2fast.ops.layer_scale.cpu"]
    assert Path(str(loaded.__file__)).is_relative_to(tmp_path)


def test_examples_name_what_a_bare_import_has() -> None:
    """gpt2fast loads its parts at first use, so that one that is not listed is there only by chance."""
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    examples = [line for text in sources for line in text.splitlines() if ">>> " in line]
    examples += re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = re.compile(r"(?<!from )(?<!import )\bgpt2fast\.([a-zA-Z_]\w*)")
    assert {"functional", "backends"} <= {n for text in examples for n in names.findall(text)}
    for text in examples:
        assert {*names.findall(text)} <= {*gpt2fast.__all__}, text
