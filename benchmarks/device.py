"""Proves and measures the kernels on this machine's GPU, in one command, without a network.

    python -m benchmarks.device                     # every stage that is not done yet
    python -m benchmarks.device --stages tests ops  # only these
    python -m benchmarks.device --again             # from the beginning
    python -m benchmarks.device --rehearse          # without a GPU: shows that the stages run

A stage is a process of its own, stopped after --minutes. What it found is in its folder under --out
as soon as it ends; a stage that ended well is not run again, so that the command can be stopped at any
time and called again. Results: <out>/results.md, and JSON beside it.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
PACKAGES = ("gpt2fast", "torch", "triton", "numpy", "transformers")


def _output(*command: str) -> str:
    """What a command prints, or why it did not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not run: {error}"
    return (done.stdout + done.stderr).strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """What the numbers belong to."""
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed files": _output("git", "status", "--short"),
        "gpu": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
    }


#: name -> (command, what it shows). {out} is the stage's folder.
Stage = tuple[list[str], str]


def stages(rehearse: bool) -> dict[str, Stage]:
    """Every stage in order."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    only = "test_layer_norm and triton" if rehearse else "triton or cuda or cublaslt"
    benchmark = [*pytest, "benchmarks", "--benchmark-only"]
    few = ["tests/ops", "-k", "(triton and dtype0 or cuda) and not 1025 and (layer_norm or gelu)"]
    small = ["-k", "nano or layer_norm"] if rehearse else []
    whole_step = [*pytest, "benchmarks/test_training_step.py", "--benchmark-only"]
    per_op = ["--ignore=benchmarks/test_training_step.py"]
    return {
        "build": (
            [PYTHON, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"],
            "the package builds and installs",
        ),
        "tests": (
            [*pytest, "-n", "8", "tests/ops", "-k", only, "--junitxml={out}/tests.xml"],
            "every op against the fp64 rule, on the device",
        ),
        "large": (
            [*pytest, "tests/test_device.py", "--junitxml={out}/tests.xml"],
            "real shapes, offsets beyond 2^31, CUDA graphs, determinism",
        ),
        "ops": (
            [*benchmark, *per_op, *small, "--benchmark-json={out}/benchmarks.json"],
            "every op against eager, torch.compile and each SDPA backend",
        ),
        "step": (
            [*whole_step, *small, "--benchmark-json={out}/benchmarks.json"],
            "the training step of 124M and 355M",
        ),
        "profile": (
            [PYTHON, "-m", "benchmarks.profile_step", "--json={out}/profile.json"],
            "where the step's time goes",
        ),
        "tune": (
            [PYTHON, "-m", "benchmarks.tune", "--write={out}/tuned.json"],
            "configurations beside the rules'",
        ),
        "sanitizer": (
            ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=9", *pytest, *few],
            "no access out of bounds, on small cases",
        ),
    }


def run_stage(name: str, stage: Stage, out: Path, seconds: float, rehearse: bool) -> dict[str, Any]:
    """Runs one stage with a time limit; its output goes to the terminal and to a log."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [part.format(out=folder) for part in stage[0]]
    result: dict[str, Any] = {"command": " ".join(command), "shows": stage[1]}
    if shutil.which(command[0]) is None:
        return result | {"status": "skipped", "why": f"{command[0]} is not installed"}
    environ = os.environ | {"PYTHONUNBUFFERED": "1", "GPT2FAST_TUNED": str(out / "tune")}
    if rehearse:
        environ["GPT2FAST_REHEARSAL"] = "1"
    began = time.monotonic()
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result |= {"seconds": round(time.monotonic() - began, 1), "code": code}
    result["status"] = "ok" if code == 0 else "out of time" if code is None else "failed"
    result["end"] = log.read_text(errors="replace").splitlines()[-12:]
    return result


def _report_benchmarks(path: Path) -> str:
    from benchmarks import report

    rows, _ = report.load(path)
    return report.tables(rows)


def _report_profile(path: Path) -> str:
    rows = json.loads(path.read_text())
    lines = ["| kernel | calls | ms a step | share |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['kernel'][:80]} | {row['calls']} | {row['ms']:.2f} | {row['share']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


REPORTS: dict[str, Callable[[Path], str]] = {
    "benchmarks.json": _report_benchmarks,
    "profile.json": _report_profile,
}


def write_report(out: Path) -> Path:
    """results.md from what the stages left."""
    about = json.loads((out / "environment.json").read_text())
    done = json.loads((out / "stages.json").read_text())
    lines = [f"# {about['gpu'] or 'no GPU'}, {about['date'][:10]}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if value]
    lines += ["", "| stage | shows | status | seconds |", "|---|---|---|---:|"]
    for name, result in done.items():
        why = f": {result['why']}" if "why" in result else ""
        lines.append(
            f"| {name} | {result['shows']} | {result['status']}{why} | {result.get('seconds', '')} |"
        )
    for name, result in done.items():
        lines += ["", f"## {name}", "", f"`{result['command']}`", ""]
        if result["status"] != "ok":
            lines += ["```", *result.get("end", [result.get("why", "")]), "```", ""]
        for file, report in REPORTS.items():
            if (out / name / file).exists():
                try:
                    lines += [report(out / name / file), ""]
                except Exception as error:  # a stage that was cut short must not hide the others
                    lines += [f"{file} is not readable: {error}", ""]
    path = out / "results.md"
    path.write_text("\n".join(lines))
    return path


def main() -> int:
    known = stages(rehearse=False)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--out", type=Path, default=ROOT / "device-results")
    parser.add_argument("--minutes", type=float, default=8, help="limit of a stage [8]")
    parser.add_argument("--total", type=float, help="start no stage after so many minutes")
    parser.add_argument("--again", action="store_true", help="run stages that ended well again")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        parser.error("PyTorch sees no NVIDIA GPU; --rehearse runs the stages on a CPU")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(environment(), indent=1))
    state = out / "stages.json"
    done = json.loads(state.read_text()) if state.exists() else {}
    began = time.monotonic()
    chosen = stages(options.rehearse)
    for name in options.stages:
        if not options.again and done.get(name, {}).get("status") == "ok":
            print(f"{name}: done before", flush=True)
            continue
        if options.total and time.monotonic() - began > 60 * options.total:
            print(f"{name}: left for the next call", flush=True)
            continue
        print(f"{name}: {chosen[name][1]} ...", flush=True)
        done[name] = run_stage(name, chosen[name], out, 60 * options.minutes, options.rehearse)
        state.write_text(json.dumps(done, indent=1))
        write_report(out)
        result = done[name]
        print(f"{name}: {result['status']} ({result.get('seconds', 0)} s)", flush=True)
        for line in result.get("end", [])[-12 if result["status"] != "ok" else -2 :]:
            print(f"    {line}", flush=True)
    print(f"\n{write_report(out)}")
    return (
        0 if all(done.get(n, {}).get("status") in ("ok", "skipped") for n in options.stages) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
