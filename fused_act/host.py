"""The host path in C++: what an eager call runs instead of the Python of families/.

The host extension (csrc/host) decides "kernel or torch?" for the usual case, calls the raw op and
makes the autograd node, for what a call of torch's own op costs. What it does not take it hands
back to Python. It is built for one torch alone; without it Python does everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

import torch
from torch.autograd.graph import Node

from fused_act import extensions
from fused_act._torch_private import OpOverload
from fused_act.activations import ROWS
from fused_act.dispatch import Backend, Kernels
from fused_act.families.base import Row

REBUILD = "where a C++ compiler is, reinstall with `pip install --no-build-isolation .`"


@functools.cache
def extension() -> ModuleType | str:
    """The extension for this torch, loaded, or why it is not here and what to do."""
    name = extensions.host_name()
    if name is None:
        return "this torch does not tell its commit, so there is no extension for it alone"
    path = extensions.host_path(name)
    if path is None:
        others = extensions.built_hosts()
        if name in others:
            return f"built for another Python than this; {REBUILD}"
        if others:
            versions = ", ".join(sorted(others.values()))
            return f"built for torch {versions}, this is torch {torch.__version__}; {REBUILD}"
        reason = extensions.left_out("host")
        if reason is not None:
            return f"the build left the host extension out: {reason}; {REBUILD}"
        return f"this install has no host extension; {REBUILD}"
    loader = ExtensionFileLoader(f"fused_act.{name}", str(path))
    try:
        if extensions.is_truncated(path):
            return f"the host extension is truncated; {REBUILD}"
        module = module_from_spec(ModuleSpec(loader.name, loader, origin=str(path)))
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        return f"the host extension does not load ({error}); {REBUILD}"
    Node.register(module.Node)
    return module


def connect(backend: Backend) -> dict[str, Callable[..., Any]]:
    """A path for each row that C++ can call in `backend`, by the name of the row."""
    module = extension()
    if isinstance(module, str):
        return {}
    return {
        name: make_path(module, ROWS[name], kernels, backend)
        for name, kernels in backend.kernels.items()
        # A stand-in for kernels may be any function.
        if all(op is None or isinstance(op, OpOverload) for op in kernels)
    }


def make_path(
    module: ModuleType, row: Row, kernels: Kernels, backend: Backend
) -> Callable[..., Any]:
    """What calls `row` in C++: `path(x, inplace, arguments) -> y`, or NotImplemented."""
    names = {
        field: tuple(op.name().partition(".")[::2])
        for field, op in kernels._asdict().items()
        if op is not None
    }
    path: Callable[..., Any] = module.Path(
        kernels, names, backend.device_types, *row.recordings(kernels)
    )
    return path
