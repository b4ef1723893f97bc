"""Backends for CPU tensors, to test and time what a call does on the host: see the files in cpu/.

`CSRC` runs the raw ops of csrc/ with everything but the GPU. `TORCH_KERNELS` runs torch's own
kernels, so that only the way to them differs. Neither is ever installed.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fused_act
from fused_act import dispatch, host, ops
from fused_act.dispatch import Backend, Kernels
from tests.shared.compiling import INCLUDE, LIBRARIES, ROOT, SHARED, shared_library

SOURCES = SHARED / "cpu"


def registrations() -> str:
    """The lines of csrc/register.cu that register the ops."""
    text = (ROOT / "csrc" / "register.cu").read_text()
    return " ".join(re.findall(r"^ *\w+::implement<.*;$", text, re.MULTILINE))


@functools.cache
def load_library(name: str) -> None:
    """Load the build of a C++ file."""
    options = [
        *("-Wno-attributes", f"-I{SOURCES}", f"-DREGISTRATIONS={registrations()}"),
        f"-I{INCLUDE / 'torch' / 'csrc' / 'api' / 'include'}",
        *(f"-L{LIBRARIES}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    path = shared_library(SOURCES / f"{name}.cpp", f"cpu_{name}", options)
    torch.ops.load_library(str(path))


def load_csrc() -> dict[str, Kernels]:
    ops.define("fused_act_csrc", ("cpu",))
    load_library("ops")
    return ops.kernels("fused_act_csrc")


def load_torch_kernels() -> dict[str, Kernels]:
    load_library("torch_kernels")
    # A parameter more or fewer than a raw op has takes an op in between, which costs a dispatch.
    places = {"mish": "aten"} | dict.fromkeys(("swish", "relu6", "prelu"), "fused_act_torch")
    found = {}
    for name, place in places.items():
        namespace = getattr(torch.ops, place)
        op, backward = getattr(namespace, name), getattr(namespace, f"{name}_backward")
        found[name] = Kernels(op.default, getattr(op, "out", None), backward.default)
    return found


CSRC = Backend("csrc", lambda: None, load_csrc, ("cpu",), connect=host.connect)
TORCH_KERNELS = Backend(
    "torch kernels", lambda: None, load_torch_kernels, ("cpu",), connect=host.connect
)


@contextlib.contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Force one of these backends, which is there for as long as this is entered."""
    dispatch.BACKENDS[backend.name] = backend
    try:
        with fused_act.use_backend(backend.name):
            yield
    finally:
        del dispatch.BACKENDS[backend.name]


@contextlib.contextmanager
def python_way(backend: Backend) -> Iterator[None]:
    """Let `backend` go through Python, as where there is no host extension."""
    paths = dict(backend.ready().paths)
    backend.paths.clear()
    try:
        yield
    finally:
        backend.paths.update(paths)


class Counter:
    """Counts the calls that C++ took and those that it handed back."""

    def __init__(self):
        self.taken = self.declined = 0

    def count(self, path: Callable[..., Any], *args: Any) -> Any:
        y = path(*args)
        self.taken += y is not NotImplemented
        self.declined += y is NotImplemented
        return y


@contextlib.contextmanager
def counted(backend: Backend) -> Iterator[Counter]:
    """Count the calls of `backend` in C++."""
    paths, counter = dict(backend.ready().paths), Counter()
    for name, path in paths.items():
        backend.paths[name] = functools.partial(counter.count, path)
    try:
        yield counter
    finally:
        backend.paths.update(paths)


# The ways to the ops of csrc/: through the host extension, which is counted, and through Python.
@contextlib.contextmanager
def in_cpp() -> Iterator[Counter]:
    with forced(CSRC), counted(CSRC) as counter:
        yield counter


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    with forced(CSRC), python_way(CSRC):
        yield
