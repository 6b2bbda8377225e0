"""Compiles the CUDA kernels that GPT-2 launches with nvcc, for GPUs that are not here, and reports.

    python -m benchmarks.cuda_report [--arch 80 90a] [--case layer_norm] [--built] [--write FILE.md]

For each kernel and GPU: registers, spilled bytes (stack), shared memory, resident warps, and how many
global accesses in the machine code are of 16 bytes, and how many instructions are tensor cores' or
TMA's. Which kernels, with how many threads and how much shared memory, the tests' emulator tells,
which lists launches without running them. --built reads the installed extension, which must hold code
for the GPUs, and compiles the sources for Hopper only, for what ptxas says of them. Ends with an error
where a kernel spills or asks for more than the GPU has, and where ptxas says that it serialises wgmma
or ignores setmaxnreg. Needs nvcc, g++, and cuobjdump (of the CUDA toolkit or of the triton package).
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.cuda_cases import CASES
from gpt2fast.ops.cuda_common import recording
from tests import cuda_emulator

CSRC, BUILD = cuda_emulator.CSRC, cuda_emulator.ROOT / "build" / "cuda_report"
#: Multiprocessors, shared memory of a block, and of a multiprocessor: A100; H100 and H200.
GPUS = {"80": (108, 163 << 10, 164 << 10), "90a": (132, 227 << 10, 228 << 10)}


@dataclasses.dataclass(frozen=True)
class Launch:
    case: str
    symbol: str
    op: str
    threads: int
    shared: int


def launches(arch: str, cases: Iterable[str]) -> list[Launch]:
    """The distinct launches of `cases` on a GPU."""
    kernels, found = cuda_emulator.load(), {}
    for case in cases:
        with recording(*GPUS[arch][:2]):
            CASES[case]()
        for symbol, op, _, threads, shared in kernels.launches():
            found.setdefault((symbol, threads, shared), Launch(case, symbol, op, threads, shared))
    return list(found.values())


def tool(name: str) -> str:
    """A tool of the CUDA toolkit, or the one that the triton package brings."""
    folders = [str(Path(nvcc).parent)] if (nvcc := shutil.which("nvcc")) else []
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    for folder in (None, "/usr/local/cuda/bin", *folders):
        if found := shutil.which(name, path=folder):
            return found
    raise SystemExit(f"{name} was not found")


def output(*command: str | Path, told: Path | None = None) -> str:
    """What a command prints; its remarks go to the file `told`."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    if told:
        told.write_text(done.stdout + done.stderr)
    return done.stdout


def losses(told: str) -> list[str]:
    """Of what the compiler said: that it serialises wgmma (C7510) or ignores setmaxnreg (C7508)."""
    return [line for line in told.splitlines() if re.search(r"\(C75\d\d\)", line)]


#: What cmake/cuda.cmake has nvcc do.
OPTIONS = ("-std=c++17", "-O3", "--extended-lambda", "-fmad=false")


def compiled(source: Path, arch: str) -> Path:
    """The machine code of a source, as the build makes it; what the compiler said is beside it."""
    headers = b"".join(p.read_bytes() for p in sorted(CSRC.rglob("*.h")))
    key = hashlib.sha256(source.read_bytes() + headers).hexdigest()[:16]
    made = BUILD / f"{source.stem}-{arch}-{key}.cubin"
    if not made.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{source.stem}-{arch}-*"):
            old.unlink()
        options = (*OPTIONS, f"-I{CSRC}", "-cubin", f"-arch=sm_{arch}")
        told = made.with_suffix(".log")
        output(tool("nvcc"), *options, source, "-o", made, told=told)
    return made


OPCODES = {"HMMA": "mma", "HGMMA": "wgmma", "UTMALDG": "loads", "UTMASTG": "stores"}


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel."""

    registers: int
    stack: int
    wide: int
    narrow: int
    products: str  # tensor-core instructions
    copies: str  # TMA's, to shared memory and from it


def built() -> Path:
    """The installed extension."""
    found = importlib.util.find_spec("gpt2fast._cuda")
    if found is None or found.origin is None:
        raise SystemExit("--built: the CUDA kernels are not built; `gpt2fast info` says why")
    return Path(found.origin)


def codes(file: Path, arch: str, symbols: set[str]) -> dict[str, Code]:
    """The kernels of `symbols` that a cubin, or an extension, has for a GPU."""
    dump = (tool("cuobjdump"), "--gpu-architecture", f"sm_{arch}")
    usage = dict(
        (name, (int(registers), int(stack)))
        for name, registers, stack in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+)",
            output(*dump, "--dump-resource-usage", file),
        )
    )
    found = {}
    wanted = sorted(symbols & usage.keys())
    if not wanted:
        return {}
    listing = output(*dump, "--dump-sass", "--function", ",".join(wanted), file)
    for part in listing.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        memory = re.findall(r"\s((?:LDG|STG|LDGSTS)\.[A-Z0-9_.]+)", code)
        wide = sum(".128" in opcode for opcode in memory)
        counts = {o: len(re.findall(rf"\s{o}\.", code)) for o in OPCODES}
        products = ", ".join(f"{counts[o]} {OPCODES[o]}" for o in ("HMMA", "HGMMA") if counts[o])
        copies = f"{counts['UTMALDG']} / {counts['UTMASTG']}" if counts["UTMALDG"] else ""
        narrow = len(memory) - wide
        found[name.strip()] = Code(*usage[name.strip()], wide, narrow, products, copies)
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    arch: str
    launch: Launch
    code: Code

    @property
    def warps(self) -> int:
        """How many warps fit on a multiprocessor at once, of 64."""
        of_block = -(-self.launch.threads // 32)
        per_warp = -(-self.code.registers * 32 // 256) * 256
        blocks = min(64 // of_block, 65536 // (per_warp * of_block), 32)
        blocks = min(blocks, GPUS[self.arch][2] // (self.launch.shared + 1024))
        return blocks * of_block

    @property
    def complaint(self) -> str:
        """Why this must not ship; empty where all is well."""
        if self.code.stack:
            return f"spills: {self.code.stack} bytes of stack"
        if self.launch.shared > GPUS[self.arch][1]:
            return f"{self.launch.shared} bytes of shared memory"
        return "" if self.warps else "no block fits on a multiprocessor"


def plain(symbol: str) -> str:
    """The kernel's name with its template arguments."""
    name = output("c++filt", symbol).partition("(")[0].strip()
    name = name.replace("gpt2fast::cuda::", "").removeprefix("void ")
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    return name.replace("_kernel", "")


def markdown(rows: list[Row]) -> str:
    told = output(tool("nvcc"), "--version").splitlines()
    version = next(line for line in told if line.startswith("Cuda compilation"))
    lines = [
        "# CUDA kernels of GPT-2, compiled ahead of time",
        "",
        f"Made by `python -m benchmarks.cuda_report --write FILE` with {version}, without a GPU:"
        f" these are the compiler's numbers, not timings. Kernels as their ops launch them at"
        f" {len(CASES)} cases (B 64, T 1024; benchmarks/cuda_cases.py), each listed once.",
        "",
        "Warps: resident on a multiprocessor at once, of 64. 16-byte: global loads and stores of 16"
        " bytes a thread in the machine code, and narrower ones (statistics, edges of rows that do"
        " not start on 16 bytes, partial sums). Tensor cores: their instructions; a wgmma of"
        " 64x256x16 has 128 times the multiplications of an mma. TMA: instructions that load and"
        " store tiles. Registers of a kernel that moves them between its warps are those it starts"
        " with. Spills are bytes of stack; any makes the command fail, as does ptxas where it"
        " serialises wgmma.",
    ]
    for arch in sorted({row.arch for row in rows}):
        lines += [
            "",
            f"## sm_{arch}",
            "",
            "| first case | kernel | threads | registers | spills | shared | resident warps |"
            " 16-byte / narrower | tensor cores | TMA |",
            "|---|---|---:|---:|---:|---:|---:|---|---:|---:|",
        ]
        for row in rows:
            if row.arch == arch:
                launch, code = row.launch, row.code
                lines.append(
                    f"| {launch.case} | {plain(launch.symbol)} | {launch.threads}"
                    f" | {code.registers} | {code.stack} | {launch.shared} | {row.warps}"
                    f" | {code.wide} / {code.narrow} | {code.products} | {code.copies} |"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(GPUS), default=sorted(GPUS))
    parser.add_argument("--case", default="", help="only cases whose name begins so")
    parser.add_argument("--built", action="store_true", help="of the installed extension")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the report to a file")
    options = parser.parse_args()
    chosen = [name for name in CASES if name.startswith(options.case)]
    if not chosen:
        parser.error(f"no case begins with {options.case!r}; there are {', '.join(CASES)}")
    ops = {name.split()[0] for name in chosen}
    # An op may launch what another has whose name is part of its own.
    sources = [s for s in sorted(CSRC.glob("*/*.cu")) if any(s.parent.name in op for op in ops)]
    work = [(source, arch) for arch in options.arch for source in sources]
    if options.built:
        work = [
            (source, arch) for source, arch in work if "hopper" in source.name and arch == "90a"
        ]
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda job: (job[1], compiled(*job)), work))
    files = [(arch, built()) for arch in options.arch] if options.built else cubins
    rows, missing = [], []
    for arch in options.arch:
        wanted, made = launches(arch, chosen), {}
        for of, file in files:
            if of == arch:
                made |= codes(file, arch, {launch.symbol for launch in wanted})
        for launch in wanted:
            if launch.symbol in made:
                rows.append(Row(arch, launch, made[launch.symbol]))
            else:
                missing.append(f"sm_{arch} {launch.case}: nvcc made no kernel {launch.symbol}")
    report = markdown(rows)
    if options.write:
        options.write.write_text(report)
    else:
        print(report)
    complaints = [
        f"sm_{row.arch} {row.launch.case} {plain(row.launch.symbol)}: {row.complaint}"
        for row in rows
        if row.complaint
    ]
    logs = [(arch, file.with_suffix(".log")) for arch, file in cubins]
    complaints += [f"sm_{arch}: {loss}" for arch, log in logs for loss in losses(log.read_text())]
    for line in (*missing, *complaints):
        print(line, file=sys.stderr)
    return 1 if missing or complaints else 0


if __name__ == "__main__":
    sys.exit(main())
