"""Compiles every Triton kernel of GPT-2 ahead of time, for GPUs that are not here, and reports.

    python -m benchmarks.triton_report [--arch 80 90 100] [--case layer_norm] [--write FILE.md]

For each kernel and GPU: registers, spilled bytes (stack), shared memory, resident warps, matrix
instructions and 16-byte accesses in the machine code. Ends with an error where a kernel does not
compile, spills, asks for more shared memory than the GPU has, or has wgmma instructions that ptxas
makes wait for each other.
"""

import argparse
import dataclasses
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.triton_cases import CASES
from gpt2fast.ops.triton_common import A100, B200, H100, Launch, Target, compile_options, recording

TARGETS = {target.arch: target for target in (A100, H100, B200)}
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A kernel to compile: found again by module and name in another process."""

    case: str
    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int
    arch: int

    @property
    def same(self) -> tuple[Any, ...]:
        """Equal for jobs with the same machine code."""
        return dataclasses.astuple(self)[1:]


def job(case: str, launch: Launch, arch: int) -> Job:
    """What Triton would specialise at this launch: as its JIT does, 1 is a constant, multiples of 16
    are known as such, and integers beyond 32 bits are wide."""
    kernel = launch.kernel
    names = kernel.arg_names
    signature, constants, aligned = {}, dict(launch.constants), []
    for position, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned.append(position)
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(position)
        else:
            signature[name] = "fp32"
    for name in names:
        if name not in signature:
            assert name in constants, f"{kernel.fn.__name__}: {name} is missing at its launch"
            signature[name] = "constexpr"
    ordered = tuple((name, signature[name]) for name in names)
    return Job(
        case,
        kernel.fn.__module__,
        kernel.fn.__name__,
        ordered,
        tuple(sorted(constants.items())),
        tuple(aligned),
        launch.warps,
        launch.stages,
        arch,
    )


def jobs(target: Target, cases: Iterable[str]) -> list[Job]:
    """The distinct kernels that `cases` launch on `target`."""
    found: dict[tuple[Any, ...], Job] = {}
    for name in cases:
        with recording(target) as launches:
            CASES[name]()
        for launch in launches:
            made = job(name, launch, target.arch)
            found.setdefault(made.same, made)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Row:
    """What the compiler made of a job."""

    job: Job
    error: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    matrix: str = ""
    wide: int = 0
    narrow: int = 0
    serialized: bool = False

    @property
    def warps_resident(self) -> int:
        """How many warps fit on a multiprocessor at once."""
        target = TARGETS[self.job.arch]
        per_warp = -(-self.registers * 32 // 256) * 256
        programs = min(64, 65536 // (per_warp * self.job.warps), 32)
        if self.shared:
            programs = min(programs, (target.shared + 1024) // (self.shared + 1024))
        return min(64, programs * self.job.warps)

    @property
    def complaint(self) -> str:
        """Why this must not ship; empty where all is well."""
        if self.error:
            return self.error
        if self.stack:
            return f"spills: {self.stack} bytes of stack"
        if self.shared > TARGETS[self.job.arch].shared:
            return f"{self.shared} bytes of shared memory"
        return "its wgmma instructions are serialized" if self.serialized else ""


def _tool(name: str, *arguments: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [folder / name, *arguments], check=True, capture_output=True, text=True
    ).stdout


MATRIX = {"HGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05"}


def compile_one(work: Job) -> Row:
    """Compiles a job and reads its machine code."""
    kernel = getattr(__import__(work.module, fromlist=[work.name]), work.name)
    names = [name for name, _ in work.signature]
    constants = {(names.index(name),): value for name, value in work.constants}
    attributes = {(position,): [["tt.divisibility", 16]] for position in work.aligned}
    source = ASTSource(kernel, dict(work.signature), constants, attributes)
    options = compile_options(work.warps, work.stages)
    knobs = triton.knobs
    try:
        with (
            knobs.compilation.scope(),
            knobs.nvidia.scope(),
            redirect_stdout(io.StringIO()) as told,
        ):
            knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
            made = triton.compile(source, target=GPUTarget("cuda", work.arch, 32), options=options)
    except Exception as error:  # whatever the compiler says goes into the table
        return Row(work, error=f"{type(error).__name__}: {str(error).strip()[:200]}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("cuobjdump", "--dump-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.M)
    matrix: dict[str, int] = {}
    for opcode in opcodes:
        if label := MATRIX.get(opcode.partition(".")[0]):
            matrix[label] = matrix.get(label, 0) + 1
    memory = [o for o in opcodes if o.startswith(("LDG", "STG"))]
    bulk = sum(o.startswith(("UTMALDG", "UTMASTG")) for o in opcodes)
    asynchronous = [o for o in opcodes if o.startswith("LDGSTS")]
    wide = sum(".128" in o or ".256" in o for o in memory)
    if bulk:
        matrix["TMA"] = bulk
    if asynchronous:
        matrix["cp.async"] = len(asynchronous)
    return Row(
        work,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=made.metadata.shared,
        matrix=", ".join(f"{count} {label}" for label, count in matrix.items()),
        wide=wide,
        narrow=len(memory) - wide,
        serialized="wgmma.mma_async instructions are serialized" in told.getvalue(),
    )


def markdown(rows: list[Row]) -> str:
    """The report."""
    lines = [
        "# Triton kernels of GPT-2, compiled ahead of time",
        "",
        f"Made by `python -m benchmarks.triton_report --write FILE` with Triton {triton.__version__},"
        " without a GPU: these are the compiler's numbers, not timings. Each kernel is compiled as"
        f" its op launches it at {len(CASES)} cases (B 64, T 1024; benchmarks/triton_cases.py);"
        " kernels with the same machine code are listed once.",
        "",
        "Warps: resident on a multiprocessor at once, of 64, as registers and shared memory allow."
        " 16-byte: global loads and stores of 16 bytes a thread, and narrower ones (statistics,"
        " partial sums, indices). Spills are bytes of stack; any makes the command fail.",
    ]
    for arch in sorted({row.job.arch for row in rows}):
        lines += [
            "",
            f"## sm_{arch}",
            "",
            "| first case | kernel | constants | warps/stages | registers | spills | shared |"
            " resident warps | 16-byte / narrower | matrix and copy instructions |",
            "|---|---|---|---|---:|---:|---:|---:|---|---|",
        ]
        for row in rows:
            if row.job.arch != arch:
                continue
            constants = " ".join(
                f"{name}={value}"
                for name, value in row.job.constants
                if name.isupper() and not isinstance(value, torch.dtype)
            )
            kernel = row.job.name.strip("_").removesuffix("_kernel")
            head = f"| {row.job.case} | {kernel} | {constants} "
            if row.error:
                lines.append(head + f"| **{row.error}** |")
                continue
            lines.append(
                head + f"| {row.job.warps}/{row.job.stages} | {row.registers} | {row.stack}"
                f" | {row.shared} | {row.warps_resident} | {row.wide} / {row.narrow}"
                f" | {row.matrix} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(TARGETS), default=[80, 90, 100]
    )
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the report to a file")
    options = parser.parse_args()
    chosen = [name for name in CASES if options.case in name]
    if not chosen:
        parser.error(f"no case contains {options.case!r}; there are {', '.join(CASES)}")
    work = [made for arch in options.arch for made in jobs(TARGETS[arch], chosen)]
    rows = []
    with ProcessPoolExecutor() as pool:
        for number, row in enumerate(pool.map(compile_one, work), 1):
            rows.append(row)
            print(f"\r{number}/{len(work)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    report = markdown(rows)
    if options.write:
        options.write.write_text(report)
    else:
        print(report)
    complaints = [row for row in rows if row.complaint]
    for row in complaints:
        print(f"sm_{row.job.arch} {row.job.case} {row.job.name}: {row.complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
