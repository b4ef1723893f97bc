"""Builds the CUDA extension where nvcc is and the host extension where a C++ compiler is.

Where neither is, the package is pure Python.

FUSED_ACT_BUILD_CUDA   `auto` (default): build it if nvcc and torch >= 2.10 are here, else say what
                       is left out. `1` (or FORCE_CUDA=1): build it or fail. `0`: leave it out.
FUSED_ACT_BUILD_HOST   the same for the host extension, which needs torch (one that tells the commit
                       it was built from), a C++ compiler and Python's headers. The extension is
                       for this torch and this Python alone, so a wheel for all of them is built
                       with `0`.
TORCH_CUDA_ARCH_LIST   GPU architectures by number, as in "8.0;9.0+PTX".
CXX                    the C++ compiler for the host extension, with options if need be.

torch's CUDAExtension is of no use here: on a CPU build of torch it refuses, though the extension
needs only headers that such a build has too. So nvcc is called here, and whether a GPU is present
is never asked: builds run in containers without one.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
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


def torch_missing():
    """Why torch cannot be built against, as "reason; cure", else None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return (
            "torch cannot be imported by the build; pass --no-build-isolation to pip, or "
            "--no-isolation to build"
        )
    return None


def cuda_missing():
    """Why the CUDA extension cannot be built here, as "reason" or "reason; cure", else None."""
    if find_nvcc() is None:
        return "nvcc is neither on PATH nor under CUDA_HOME"
    if torch_missing() is not None:
        return torch_missing()
    import torch

    version = tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups()))
    if version < MINIMUM_TORCH:
        return f"torch {torch.__version__} is older than 2.10"
    return None


def find_cxx():
    """The C++ compiler that CXX names, with its options, or one from PATH, else None."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    found = filter(shutil.which, ("g++", "clang++", "c++"))
    return next(([name] for name in found), None)


def host_missing():
    """Likewise for the host extension."""
    if torch_missing() is not None:
        return torch_missing()
    if host_name() is None:
        return "this torch does not tell the commit that it was built from"
    if find_cxx() is None:
        return "there is no C++ compiler, neither g++, clang++, c++ nor what CXX names"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers are missing"
    return None


def host_name():
    """The name of the host extension for the torch that is here, see fused_act/extensions.py."""
    return runpy.run_path(str(ROOT / "fused_act" / "extensions.py"))["host_name"]()


def setting(kind):
    """The value of FUSED_ACT_BUILD_CUDA or FUSED_ACT_BUILD_HOST."""
    variable = f"FUSED_ACT_BUILD_{kind.upper()}"
    choice = os.environ.get(variable) or "auto"
    if kind == "CUDA" and os.environ.get("FORCE_CUDA") == "1":
        choice = "1"
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"{variable}: expected 0, 1 or auto, got {choice!r}")
    return choice


def builds(kind):
    """Whether to build an extension; says so if not, and fails if it was demanded."""
    if setting(kind) == "0":
        return False
    reason = MISSING[kind]()
    if reason is None:
        return True
    if setting(kind) == "1":
        raise SystemExit(f"fused_act: the {kind} extension was demanded but {reason}")
    print(f"fused_act: building without the {kind} extension: {reason}")
    return False


MISSING = {"CUDA": cuda_missing, "host": host_missing}


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


class BuildExtensions(build_ext):
    """Calls nvcc and the C++ compiler, for what has changed since the last time."""

    def run(self):
        self.failed = {}
        super().run()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "fused_act"
        if "host" in EXTENSIONS:
            write_note("host", package, self.failed.get("host"))
        if self.failed:  # what an earlier build left in place is not of these sources
            for stale in package.glob(f"{host_name()}.*"):
                stale.unlink()

    def build_extension(self, extension):
        import torch

        torch_path = Path(torch.__file__).parent
        target = Path(self.get_ext_fullpath(extension.name))
        make = self.cuda_command if extension.name == "fused_act._C" else self.host_command
        command = [*make(extension, torch_path), *extension.sources, *("-o", str(target))]
        stamp = Path(self.build_temp) / f"{extension.name}.txt"
        line = " ".join(command)
        if not self.force and self.is_current(extension, target, stamp, line):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        print(line, flush=True)
        try:
            subprocess.run(command, check=True, cwd=ROOT)
        except subprocess.CalledProcessError:
            # The host extension is a matter of speed, and another torch may have another API.
            if extension.name == "fused_act._C" or setting("host") == "1":
                raise
            self.failed["host"] = f"it does not compile for torch {torch.__version__}"
            print(f"fused_act: building without the host extension: {self.failed['host']}")
            target.unlink(missing_ok=True)
            return
        stamp.write_text(line)

    @staticmethod
    def cuda_command(extension, torch_path):
        return [
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
        ]

    @staticmethod
    def host_command(extension, torch_path):
        import torch

        include = torch_path / "include"
        return [
            *find_cxx(),
            *("-std=c++20", "-O2", "-DNDEBUG", "-g0", "-shared", "-fPIC", "-fvisibility=hidden"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-DFUSED_ACT_HOST={extension.name.rpartition('.')[2]}",
            *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
            f"-I{sysconfig.get_paths()['include']}",
            # Python has imported torch before, so the loader finds them without a path. The linker
            # drops what nothing before it needs, and the sources come after it.
            *(f"-L{torch_path / 'lib'}", "-Wl,--no-as-needed"),
            *("-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"),
        ]

    @staticmethod
    def is_current(extension, target, stamp, line):
        """Whether `target` is newer than the sources and came from this very command."""
        if not target.exists() or not stamp.exists() or stamp.read_text() != line:
            return False
        sources = [*extension.sources, *extension.depends]
        return target.stat().st_mtime > max(Path(source).stat().st_mtime for source in sources)


def write_note(kind, package, reason):
    """Say in the package why an extension is not in it, or nothing if `reason` is None.

    pip builds in isolation, without torch, and shows nothing of what a build prints. The package
    reads the note where users ask for the extension, see fused_act/extensions.py.
    """
    note = package / f"left_out_{kind.lower()}.txt"
    note.unlink(missing_ok=True)
    if reason is not None:
        note.write_text(reason.partition(";")[0])


class BuildWithNotes(build_py):
    """Notes which extensions are left out against what users may expect."""

    def run(self):
        super().run()
        names = {extension.name.rpartition(".")[2] for extension in EXTENSIONS.values()}
        for built in Path(self.build_lib, "fused_act").glob("_*.so"):
            if built.name.partition(".")[0] not in names:  # of an earlier build with other settings
                built.unlink()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "fused_act"
        wanted = {kind: setting(kind) != "0" and kind not in EXTENSIONS for kind in MISSING}
        wanted["CUDA"] = wanted["CUDA"] and find_nvcc() is not None
        for kind, is_wanted in wanted.items():
            write_note(kind, package, MISSING[kind]() if is_wanted else None)


EXTENSIONS = {}
if builds("CUDA"):
    EXTENSIONS["CUDA"] = Extension(
        "fused_act._C",
        sources=["csrc/register.cu"],
        depends=[str(path) for path in sorted(Path("csrc").glob("*.*h"))],
        py_limited_api=True,
    )
if builds("host"):
    EXTENSIONS["host"] = Extension(
        f"fused_act.{host_name()}",
        sources=["csrc/host/module.cpp"],
        depends=[str(path) for path in sorted(Path("csrc/host").glob("*.h"))],
        optional=setting("host") != "1",  # setuptools goes on without the file
    )

setup(
    ext_modules=list(EXTENSIONS.values()),
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildWithNotes},
    # The CUDA extension never calls Python, so that one wheel serves all of them. The host
    # extension is for one Python, as for one torch.
    options={} if "host" in EXTENSIONS else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
