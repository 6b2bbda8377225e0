"""Runs transformers' own GPT-2 model tests twice, as they are and on gpt2fast's kernels.

    python -m tests.peers.run_transformers CHECKOUT [pytest options]

CHECKOUT is a folder that holds transformers' `tests` of the version installed (its repository; the
source archive lacks them). They need `parameterized`, `accelerate` and `datasets`. Nothing of it is
copied here. The second run calls `gpt2fast.apply_gpt2fast_to_gpt2()` first: every GPT-2 that a test
builds carries our forwards. It fails where a test passes without us and not with us.

Seen on 22 November 2026 on a CPU, transformers 5.2.0 with the tests of 1 March 2026 (5.3.0.dev0):
142 passed, 145 were skipped (they need a GPU, weights, network), 1979 subtests passed and one test
failed (prompt lookup decoding: it calls a method of 5.3.0) without gpt2fast; the same with it. Seen
again that evening, both ways, at 99380f9 and what followed it.
Earlier that day: 150 passed and 163 skipped, both ways, with 5.23.0 and the nearest tests to be had.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import gpt2fast

ROOT = Path(gpt2fast.__file__).resolve().parents[1]
FILE = "tests/models/gpt2/test_modeling_gpt2.py"


def pytest_configure(config: pytest.Config) -> None:
    """This file is also the plugin of the second run."""
    gpt2fast.apply_gpt2fast_to_gpt2()


def outcomes(checkout: Path, options: list[str]) -> dict[str, str]:
    """What became of every test of one run."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "results.xml"
        paths = [str(ROOT), str(checkout / "utils"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", FILE, "-q", f"--junitxml={found}", *options]
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        if not found.exists():
            raise SystemExit("pytest did not run; see its message above")
        cases = ElementTree.parse(found).getroot().iter("testcase")
        return {
            f"{case.get('classname')}::{case.get('name')}": next(
                (child.tag for child in case if child.tag in ("failure", "error", "skipped")),
                "passed",
            )
            for case in cases
        }


def main() -> None:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / FILE).exists():
        raise SystemExit(f"{__doc__}\nthere is no {FILE} in the folder given")
    checkout, options = Path(sys.argv[1]).resolve(), sys.argv[2:]
    before = outcomes(checkout, options)
    # by path, not by package: the checkout has a package of the name `tests`, too
    sys_path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONPATH"] = sys_path
    after = outcomes(checkout, [*options, "-p", Path(__file__).stem])
    print(f"without gpt2fast: {dict(Counter(before.values()))}")
    print(f"with gpt2fast:    {dict(Counter(after.values()))}")
    lost = [name for name, result in before.items() if result == "passed" != after.get(name)]
    print("\n".join(f"no longer passes: {name}: {after.get(name)}" for name in lost))
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
