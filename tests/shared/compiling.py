"""Compiles C++ files of the tests, once for all processes and runs."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
SHARED = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
INCLUDE = Path(torch.__file__).parent / "include"
LIBRARIES = Path(torch.__file__).parent / "lib"


@functools.cache
def digest() -> str:
    """A checksum of all that a build depends on."""
    found = hashlib.sha256(torch.__version__.encode())
    found.update(subprocess.check_output([COMPILER, "--version"]))
    files = {SHARED / f"{name}.py" for name in ("compiling", "host_kernels", "cpu_ops")}
    for folder in (ROOT / "csrc", SHARED / "host", SHARED / "cpu"):
        files |= {*folder.glob("*.*")}
    for path in sorted(files):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def shared_library(source: Path, name: str, options: Sequence[str]) -> Path:
    """The library that `source` makes with these options, called `name`.

    Whoever comes first builds it and the others wait.
    """
    folder = ROOT / "build" / "tests" / digest()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.so"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished.so")
            command = [COMPILER, "-std=c++20", "-O2", "-g0", "-shared", "-fPIC", f"-I{INCLUDE}"]
            subprocess.run([*command, str(source), *options, "-o", str(unfinished)], check=True)
            os.replace(unfinished, path)
    return path
