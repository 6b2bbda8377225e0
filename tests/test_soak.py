"""The short form of tests/soak.py: a few kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sessions are forks")
def test_a_few_kills() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--kills", "2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 kills") == 2
