"""Ways to break an install, and what it then says: for test_broken_installs.py and the README."""

import ctypes.util
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fused_act
from fused_act.backends import cuda

COMPILER = shutil.which("gcc") or shutil.which("clang")
TRITON = importlib.util.find_spec("triton")
has_triton = pytest.mark.skipif(TRITON is None, reason="needs triton")
compiles = pytest.mark.skipif(
    COMPILER is None or not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").exists(),
    reason="needs a C compiler and Python's headers",
)
lacks_libcuda = pytest.mark.skipif(
    ctypes.util.find_library("cuda") is not None, reason="needs a machine without libcuda"
)

NOWHERE = f"{sys.executable}/below_a_file"  # not even root can make a folder there

GPU = """
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(
    name="GPU", major=9, minor=0, total_memory=2**36
)
"""

REPORT = """
import contextlib, io, json, os, types, warnings
import torch
import torch.nn.functional as F
{prelude}
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as warned_on_cpu:
    import fused_act, fused_act.__main__

    x = torch.linspace(-8, 8, 65, requires_grad=True)
    equal = True
    for function, reference in (
        (fused_act.mish, F.mish), (fused_act.silu, F.silu), (fused_act.relu6, F.relu6)
    ):
        y, expected = function(x), reference(x)
        equal &= torch.equal(y, expected)
        gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)]
        equal &= torch.equal(*gradients)
with warnings.catch_warnings(record=True) as warned:
    for _ in range(2):
        selected = fused_act.dispatch.automatic()  # as at the first CUDA tensor, and the second
    if selected.name == "torch":
        equal &= torch.equal(selected.kernels["mish"].forward(x), F.mish(x))
errors = {{}}
for name in ("cuda", "triton"):
    try:
        fused_act.use_backend(name)
    except RuntimeError as error:
        errors[name] = str(error)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    fused_act.__main__.main()
print(json.dumps({{
    "file": fused_act.__file__,
    "equal": equal,
    "warned_on_cpu": [str(w.message) for w in warned_on_cpu if "fused_act" in str(w.message)],
    "selected": selected.name,
    "warned": [str(w.message) for w in warned if "fused_act" in str(w.message)],
    "errors": errors,
    "printed": printed.getvalue(),
}}))
"""


def compile_library(path, source):
    command = [COMPILER, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)


def driver_environment(folder: Path) -> dict[str, str]:
    """The environment in which Triton starts: where no driver is, a libcuda that does nothing."""
    environment = {"TRITON_CACHE_DIR": str(folder / "cache")}
    if torch.cuda.is_available() or TRITON is None or COMPILER is None:
        return environment
    sources = Path(TRITON.origin).parent.joinpath("backends", "nvidia").glob("*.c")
    names = {name for file in sources for name in re.findall(r"\bcu[A-Z]\w+", file.read_text())}
    compile_library(
        folder / "libcuda.so.1", "".join(f"int {name}() {{ return 0; }}\n" for name in names)
    )
    return environment | {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


class Install:
    """A copy of the package, without the extension, and how Python is started to use it."""

    def __init__(self, root, environment):
        self.root = root
        self.extension = root / "fused_act" / "_C.abi3.so"
        self.flags = []
        self.prelude = GPU
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name != "CC" and not name.startswith("TRITON")
        }
        self.environment |= {"PYTHONPATH": str(root)} | environment
        shutil.copytree(
            Path(fused_act.__file__).parent,
            root / "fused_act",
            ignore=shutil.ignore_patterns("_C.*", "_host_*", "__pycache__"),
        )

    def report(self):
        result = subprocess.run(
            [sys.executable, *self.flags, "-c", REPORT.format(prelude=self.prelude)],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])


def nothing(install):
    pass


def no_triton(install):
    # Python without its site-packages, and links to all that is in them but Triton.
    install.flags = ["-S"]
    for folder in sys.path:
        if folder.endswith("-packages"):
            for path in Path(folder).iterdir():
                link = install.root / path.name
                if not path.name.startswith(("triton", "fused_act")) and not link.is_symlink():
                    link.symlink_to(path)


def old_triton(install):
    folder = install.root / "triton-3.5.1+git1234.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: triton\nVersion: 3.5.1+git1234\n"
    )


def isolated_build(install):
    (install.root / "fused_act" / "left_out_cuda.txt").write_text(NO_TORCH)


def other_abi(install):
    # The constructor of c10::Error as it was called before torch took the C++11 ABI.
    symbol = "_ZN3c105ErrorC2ENS_14SourceLocationESs"
    compile_library(install.extension, f"void {symbol}(); void *needed = {symbol};")


def truncated(install):
    if cuda.extension() is None:
        other_abi(install)
        whole = install.extension.read_bytes()
    else:
        whole = cuda.extension().read_bytes()
    install.extension.write_bytes(whole[:4096])


def old_torch(install):
    other_abi(install)
    install.prelude += "\ntorch.__version__ = '2.9.1+cu128'\n"


def no_driver(install):
    compile_library(install.extension, "")
    install.environment["CUDA_VISIBLE_DEVICES"] = ""
    install.prelude = "\ntorch.version.cuda = torch.version.cuda or '13.0'\n"


def unwritable_cache(install):
    install.environment["TRITON_CACHE_DIR"] = NOWHERE


def unwritable_cache_after_the_start(install):
    install.prelude += f"""
import triton
triton.runtime.driver.active
os.environ["TRITON_CACHE_DIR"] = {NOWHERE!r}
"""


def no_compiler(install):
    install.environment |= {
        "PATH": str(install.root),
        "TRITON_CACHE_DIR": str(install.root / "cache"),
        "TRITON_LIBCUDA_PATH": str(install.root),
    }


def wrong_compiler(install):
    no_compiler(install)
    install.environment["CC"] = "/nowhere/cc"


def no_libcuda(install):
    for name in ("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"):
        install.environment.pop(name, None)
    install.environment["TRITON_CACHE_DIR"] = str(install.root / "cache")


REBUILD = r"reinstall with `FUSED_ACT_BUILD_CUDA=1 pip install --no-build-isolation \.`"
NO_TORCH = "torch cannot be imported by the build"
LEFT_OUT = f"the build left the CUDA extension out though nvcc was there: {NO_TORCH}; {REBUILD}"
NO_EXTENSION = f"this install has no CUDA extension; where nvcc is, {REBUILD}"
NEEDS = (
    r"; it needs a C compiler .*Python's headers, libcuda\.so\.1, and a cache .*TRITON_CACHE_DIR"
)
NO_GPU = "torch sees no CUDA GPU; see whether `nvidia-smi` does"


def does_not_load(error):
    return rf"the extension does not load \(.*{error}.*\); {REBUILD}"


def does_not_start(error):
    return rf"triton does not start \({error}.*\){NEEDS}"


OLD_TORCH = r"the extension needs torch 2\.10 or newer, this is torch 2\.9\.1\+cu128"
NO_TRITON = "triton is not installed; install it with `pip install triton`"
OLD_TRITON = r"triton 3\.5\.1\+git1234 is too old; install 3\.6 or newer"
NO_FOLDER = does_not_start("NotADirectoryError")


class Broken(NamedTuple):
    """A way to break an install.

    Args:
        breaks: breaks an `Install`.
        cuda, triton: why this backend cannot run, a regular expression; None if it can.
        needs: what the test needs.
    """

    breaks: Callable[[Install], None]
    cuda: str
    triton: str | None
    needs: tuple[pytest.MarkDecorator, ...]


CASES = [
    Broken(nothing, NO_EXTENSION, None, (has_triton, compiles)),
    Broken(no_triton, NO_EXTENSION, NO_TRITON, ()),
    Broken(old_triton, NO_EXTENSION, OLD_TRITON, ()),
    Broken(isolated_build, LEFT_OUT, None, (has_triton, compiles)),
    Broken(other_abi, does_not_load("undefined symbol"), None, (has_triton, compiles)),
    Broken(truncated, does_not_load("is truncated"), None, (has_triton, compiles)),
    Broken(old_torch, OLD_TORCH, None, (has_triton, compiles)),
    Broken(no_driver, NO_GPU, f"{NO_GPU}; with TRITON_INTERPRET=1", (has_triton, compiles)),
    Broken(unwritable_cache, NO_EXTENSION, NO_FOLDER, (has_triton,)),
    Broken(unwritable_cache_after_the_start, NO_EXTENSION, NO_FOLDER, (has_triton, compiles)),
    Broken(no_compiler, NO_EXTENSION, does_not_start("RuntimeError: .*C compiler"), (has_triton,)),
    Broken(wrong_compiler, NO_EXTENSION, does_not_start("FileNotFoundError: .*/cc"), (has_triton,)),
    Broken(no_libcuda, NO_EXTENSION, does_not_start("AssertionError"), (has_triton, lacks_libcuda)),
]
