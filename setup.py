"""Builds the CUDA extension where nvcc is, else a pure-Python package.

FUSED_ACT_BUILD_CUDA   `auto` (default): build it if nvcc and torch >= 2.10 are here, else say what
                       is left out. `1` (or FORCE_CUDA=1): build it or fail. `0`: leave it out.
TORCH_CUDA_ARCH_LIST   GPU architectures by number, as in "8.0;9.0+PTX".

torch's CUDAExtension is of no use here: on a CPU build of torch it refuses, though the extension
needs only headers that such a build has too. So nvcc is called here, and whether a GPU is present
is never asked: builds run in containers without one.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MINIMUM_TORCH = (2, 10)
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def find_nvcc():
    """nvcc from CUDA_HOME or PATH, else None."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return shutil.which("nvcc", path=Path(os.environ[variable]) / "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def missing():
    """Why the CUDA extension cannot be built here, as "reason" or "reason; cure", else None."""
    if find_nvcc() is None:
        return "nvcc is neither on PATH nor under CUDA_HOME"
    try:
        import torch
    except ImportError:
        return (
            "torch cannot be imported by the build; pass --no-build-isolation to pip, or "
            "--no-isolation to build"
        )
    version = tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups()))
    if version < MINIMUM_TORCH:
        return f"torch {torch.__version__} is older than 2.10"
    return None


def setting():
    """The value of FUSED_ACT_BUILD_CUDA."""
    choice = os.environ.get("FUSED_ACT_BUILD_CUDA") or "auto"
    if os.environ.get("FORCE_CUDA") == "1":
        choice = "1"
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FUSED_ACT_BUILD_CUDA: expected 0, 1 or auto, got {choice!r}")
    return choice


def builds_cuda():
    """Whether to build the CUDA extension; says so if not, and fails if it was demanded."""
    if setting() == "0":
        return False
    reason = missing()
    if reason is None:
        return True
    if setting() == "1":
        raise SystemExit(f"fused_act: the CUDA extension was demanded but {reason}")
    print(f"fused_act: building without the CUDA extension: {reason}")
    return False


def gencode_flags():
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST."""
    flags = []
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    for architecture in re.findall(r"[^;,\s]+", chosen) or ARCHITECTURES.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", architecture)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected e.g. 9.0 or 9.0+PTX, got {architecture!r}"
            )
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


class BuildWithNvcc(build_ext):
    """Calls nvcc for the one source there is, if anything has changed since the last time."""

    def build_extension(self, extension):
        import torch

        torch_path = Path(torch.__file__).parent
        target = Path(self.get_ext_fullpath(extension.name))
        command = [
            find_nvcc(),
            *("-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", "--threads", "0"),
            "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
            "-DUSE_CUDA",
            f"-I{torch_path / 'include'}",
            *gencode_flags(),
            *("-cudart", "static"),
            f"-L{torch_path / 'lib'}",
            # A CPU build of torch has no symbol of ours to offer to the linker, which would drop
            # the library, and with it the way to libtorch_cuda on a GPU machine.
            *("-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"),
            *extension.sources,
            *("-o", str(target)),
        ]
        stamp = Path(self.build_temp) / "nvcc_command.txt"
        line = " ".join(command)
        if not self.force and self.is_current(extension, target, stamp, line):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        print(line, flush=True)
        subprocess.run(command, check=True, cwd=ROOT)
        stamp.write_text(line)

    @staticmethod
    def is_current(extension, target, stamp, line):
        """Whether `target` is newer than the sources and came from this very command."""
        if not target.exists() or not stamp.exists() or stamp.read_text() != line:
            return False
        sources = [*extension.sources, *extension.depends]
        return target.stat().st_mtime > max(Path(source).stat().st_mtime for source in sources)


class BuildWithNote(build_py):
    """Puts a note into the package that says why the extension is not in it, though nvcc is here.

    pip builds in isolation, without torch, and shows nothing of what a build prints. The package
    reads the note where users ask for the extension, see backends/cuda.py.
    """

    def run(self):
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        note = folder / "fused_act" / "left_out.txt"
        note.unlink(missing_ok=True)
        if setting() != "0" and not extensions and find_nvcc() is not None:
            note.write_text(missing().partition(";")[0])


extensions = []
if builds_cuda():
    extensions = [
        Extension(
            "fused_act._C",
            sources=["csrc/register.cu"],
            depends=[str(path) for path in sorted(Path("csrc").glob("*.*h"))],
            py_limited_api=True,
        )
    ]

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithNvcc, "build_py": BuildWithNote},
    # The extension never calls Python, so that one wheel serves all of them.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
