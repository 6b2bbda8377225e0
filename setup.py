"""Builds the extensions with CMake; an extension that cannot be built is left out with its reason.

The reason and the compiler are written to gpt2fast/_build_info.json, which `gpt2fast info` shows.
GPT2FAST_REQUIRE=cpu,cuda turns a missing part into an error; GPT2FAST_SKIP=cpu,cuda leaves it out.
The CUDA kernels are compiled for the GPUs of this machine; GPT2FAST_CUDA_ARCHS=80,90a,90-virtual names
others, and builds them on a machine without one.
GPT2FAST_TEST_WIDE=1 adds sixteen-lane kernels that run on any CPU; GPT2FAST_SANITIZE=address,undefined
checks memory (both for tests).
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PARTS = ("cpu", "cuda")


def names(variable: str) -> set[str]:
    """The parts that an environment variable lists, checked."""
    listed = {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}
    if unknown := listed - set(PARTS):
        raise SystemExit(f"{variable} lists {sorted(unknown)}; known parts are {list(PARTS)}")
    return listed


class PartUnavailable(Exception):
    """Why a part was not built, in words for the user."""


def run(*command: str | Path) -> str:
    """Runs a build command and returns its output; its end is the reason when it fails."""
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, text=True, capture_output=True, check=False
    )
    output = done.stdout + done.stderr
    print(output, flush=True)
    if done.returncode:
        if told := re.search(r"GPT2FAST_REASON: ([^\n]+)", output):
            raise PartUnavailable(told.group(1).strip())
        errors = [line for line in output.splitlines() if "error" in line.lower()]
        tail = "\n".join((errors or output.splitlines())[:12])
        raise PartUnavailable(f"{Path(str(command[0])).name} failed:\n{tail}")
    return output


def find(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        raise PartUnavailable(f"{tool} was not found")
    return path


def compiler() -> str:
    """The C++ compiler, as CMake would choose it."""
    for name in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise PartUnavailable("no C++ compiler was found (c++, g++, clang++ or $CXX)")


def compiler_version(part: str) -> str:
    name = nvcc() if part == "cuda" else compiler()
    done = subprocess.run([name, "--version"], text=True, capture_output=True, check=False)
    lines = (done.stdout or done.stderr).splitlines() or [""]
    return next((line for line in lines if line.startswith("Cuda compilation")), lines[0])


def nvcc() -> str:
    """The CUDA compiler: $CUDACXX, on the path, or of the toolkit in $CUDA_HOME or its usual place."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for name in (
        os.environ.get("CUDACXX"),
        "nvcc",
        *(f"{home}/bin/nvcc" for home in homes if home),
    ):
        if name and (found := shutil.which(name)):
            return found
    raise PartUnavailable("nvcc was not found (on the path, in $CUDA_HOME or as $CUDACXX)")


def cuda_architectures() -> str:
    """Those that were asked for, or of the GPUs here: compiling for others would take minutes."""
    asked = os.environ.get("GPT2FAST_CUDA_ARCHS", "")
    if asked or "cuda" in names("GPT2FAST_REQUIRE"):
        return asked
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = ""
    if shutil.which(query[0]):
        done = subprocess.run(query, text=True, capture_output=True, check=False)
        output = done.stdout if done.returncode == 0 else ""
    found = sorted({int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", output)})
    usable = [f"{number}{'a' if number == 90 else ''}-real" for number in found if number >= 80]
    if not usable:
        raise PartUnavailable(
            "nvidia-smi shows no GPU of compute capability 8.0 or later;"
            " GPT2FAST_CUDA_ARCHS=80,90a,90-virtual builds for others"
        )
    return ",".join(usable)


class CMakeBuild(build_ext):
    """One CMake configure and build per part, in build/<part>-<tag>, which later builds reuse."""

    def run(self) -> None:
        self.report: dict[str, dict[str, str | bool]] = {}
        for extension in self.extensions:  # a stale library must not outlive a failed build
            for folder in (ROOT, Path(self.build_lib)):
                for old in (folder / "gpt2fast").glob(f"{extension.name.rpartition('.')[2]}.*"):
                    if old.suffix in (".so", ".dylib", ".pyd"):
                        old.unlink()
        super().run()
        text = json.dumps({"python": platform.python_version(), "parts": self.report}, indent=2)
        folders = [Path(self.build_lib) / "gpt2fast"] + (
            [ROOT / "gpt2fast"] if self.inplace else []
        )
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_info.json").write_text(text + "\n")

    def build_extension(self, ext: Extension) -> None:
        part = ext.name.rpartition("._")[2]
        try:
            if part in names("GPT2FAST_SKIP"):
                raise PartUnavailable("left out by GPT2FAST_SKIP")
            self.build_part(part, Path(self.get_ext_fullpath(ext.name)).resolve())
            self.report[part] = {"built": True, "compiler": compiler_version(part)}
        except PartUnavailable as error:
            if part in names("GPT2FAST_REQUIRE"):
                raise SystemExit(f"gpt2fast: GPT2FAST_REQUIRE={part}, but: {error}") from None
            self.report[part] = {"built": False, "reason": str(error)}
            print(f"gpt2fast: the {part} kernels were not built: {error}", flush=True)

    def build_part(self, part: str, target: Path) -> None:
        if sys.platform == "win32":
            raise PartUnavailable("native Windows is not supported; WSL 2 is")
        compiler()
        cmake, ninja = find("cmake"), find("ninja")
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / f"{part}-{tag}"
        options = [
            f"-DGPT2FAST_PART={part}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # pip's isolated path changes at every install
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYBIND11_INCLUDE={self.pybind11_headers(build)}",
            f"-DGPT2FAST_SANITIZE={os.environ.get('GPT2FAST_SANITIZE', '')}",
            f"-DGPT2FAST_TEST_WIDE={os.environ.get('GPT2FAST_TEST_WIDE', '0')}",
        ]
        if part == "cuda":
            options.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
            os.environ["GPT2FAST_CUDA_ARCHS"] = cuda_architectures()
        run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options)
        run(cmake, "--build", build, "--parallel", str(os.cpu_count() or 1))
        built = list(build.glob(f"_{part}.*{Path(target).suffix}"))
        if len(built) != 1:
            raise PartUnavailable(f"the build left {len(built)} libraries in {build}, not one")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built[0], target)

    @staticmethod
    def pybind11_headers(build: Path) -> Path:
        """The headers at a place that does not change, so that a second build compiles nothing."""
        import pybind11

        stable = build / "include"
        marker = stable / f"version-{pybind11.__version__}"
        if not marker.exists():
            shutil.rmtree(stable, ignore_errors=True)
            shutil.copytree(pybind11.get_include(), stable)
            marker.touch()
        return stable


setup(
    ext_modules=[Extension(f"gpt2fast._{part}", sources=[], optional=True) for part in PARTS],
    cmdclass={"build_ext": CMakeBuild},
)
