"""The backends: what they have in common, which of them are available, which one is selected.

This is the ground that the package stands on: it imports nothing of ours. The backends register
themselves, see `fused_act.backends`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOADING = threading.Lock()

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN = (Tensor, torch.nn.Parameter)  # the types that kernels take; a subclass is torch's


class Kernels(NamedTuple):
    """The functions of one activation in one backend.

    Each takes the tensors and then the activation's parameters. None is what it does not need, for
    it saves something else for backward. With a weight, `weight` follows `x`, and backward returns
    the gradients of both.
    """

    forward: Callable[..., Tensor]  # (x) -> y
    forward_out: Callable[..., None] | None = None  # (x, out=y), where y may be x
    # (grad_output, x) or (grad_output, mask, then parameters, stride) -> grad_input
    backward: Callable[..., Tensor] | None = None
    backward_from_output: Callable[..., Tensor] | None = None  # (grad_output, y) -> grad_input
    forward_with_mask: Callable[..., tuple[Tensor, Tensor]] | None = None  # (x) -> y, mask
    forward_with_mask_out: Callable[..., Tensor] | None = None  # (x, out=y) -> mask


@dataclasses.dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute the activations.

    Args:
        name: what `use_backend` calls it.
        unavailable: why it cannot run here and what to do about it, or None if it can.
        load: loads what the backend needs and returns its functions, by the name of a row.
        device_types: the devices whose tensors it takes; None means all of them.
        is_installed: whether this install is meant to have it, so that users should hear where it
            cannot run.
        connect: returns what eager calls run in C++ once the backend is loaded, by the name of a
            row, see `fused_act.host`.
    """

    name: str
    unavailable: Callable[[], str | None]
    load: Callable[[], dict[str, Kernels]]
    device_types: tuple[str, ...] | None
    is_installed: Callable[[], bool] = lambda: False
    connect: Callable[[Backend], dict[str, Callable[..., Any]]] = lambda backend: {}
    kernels: dict[str, Kernels] = dataclasses.field(default_factory=dict, init=False)
    paths: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict, init=False)

    def ready(self) -> Backend:
        """This backend, loaded. Done when it is selected, since Dynamo cannot trace it."""
        with LOADING:  # an op takes a kernel once, and two threads may come first
            if not self.kernels:
                self.kernels.update(self.load())
                self.paths.update(self.connect(self))
        return self

    def check_input(self, op: str, x: Tensor) -> None:
        """Raise unless this backend, forced by the user, takes `x`: nothing is changed silently."""
        if self.device_types is None:
            return
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: expected input to be a Tensor, got {type(x).__name__}")
        if type(x) not in PLAIN:
            raise TypeError(
                f"{op}: the {self.name!r} backend takes plain tensors, got {type(x).__name__}; "
                "use_backend('auto') leaves tensor subclasses to torch"
            )
        if x.dtype not in DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            got = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: the {self.name!r} backend takes {expected}; input is {got}")
        if x.device.type not in self.device_types:
            expected = " or ".join(self.device_types)
            raise ValueError(
                f"{op}: the {self.name!r} backend takes {expected} tensors; input is on {x.device}"
            )
        if x.layout is not torch.strided or x.is_nested:
            layout = "nested" if x.is_nested else x.layout
            raise TypeError(
                f"{op}: the {self.name!r} backend takes strided tensors; input is {layout}"
            )


def older(version: str, minimum: tuple[int, int]) -> bool:
    """Whether `version` comes before `minimum`; one that does not start with two numbers does not.

    What follows the numbers tells how it was built: "3.6.0+git1234", "2.11.0a0".
    """
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and tuple(map(int, release.groups())) < minimum


def gpu_unavailable() -> str | None:
    """Why no GPU here can run the kernels, with a cure if there is one, or None if one can."""
    if not torch.cuda.is_available():
        built_with_cuda = torch.version.cuda is not None
        cure = "see whether `nvidia-smi` does" if built_with_cuda else "install torch with CUDA"
        return f"torch sees no CUDA GPU; {cure}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this is a ROCm build of torch"
    # bfloat16 and the clamps that let NaN through came with sm_80.
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return (
            f"the kernels need a GPU of compute capability 8.0 or higher, this is {major}.{minor}"
        )
    return None


# The backends by name, in the order of preference of `auto`. The last one takes every tensor. They
# survive a reload of this module alone, which registers none, and so does the one that is forced.
BACKENDS: dict[str, Backend] = globals().get("BACKENDS", {})

# The backend that the user forced, or None for `auto`. A plain global: Dynamo guards on it, and
# rejects ContextVar.get().
forced: Backend | None = globals().get("forced")

# What `auto` takes for CUDA tensors once the first one has settled it. Until then it has no paths.
settled: Backend = globals().get("settled") or Backend("auto", lambda: None, dict, None)


def is_kernel_forced() -> bool:
    """Whether the user forced a backend of kernels, which refuses what they do not take."""
    return forced is not None and forced.device_types is not None


def register(*backends: Backend) -> None:
    """Add `backends`, best first."""
    BACKENDS.update((backend.name, backend) for backend in backends)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run here, best first; `"torch"` is always the last.

    `python -m fused_act` says why the others cannot.
    """
    return tuple(name for name, backend in BACKENDS.items() if backend.unavailable() is None)


@functools.cache
def automatic() -> Backend:
    """The backend that `auto` takes for a plain CUDA tensor; settled at the first such tensor.

    Warns, once, where that is not the best that the user could expect: torch's own ops, or Triton
    beside an extension that is broken. Triton in a pure-Python install is as it should be.
    """
    global settled
    *kernel_backends, fallback = BACKENDS.values()
    reasons, is_installed = [], False
    for backend in kernel_backends:
        reason = backend.unavailable()
        if reason is None:
            break
        reasons.append(f"{backend.name!r} is not available: {reason}")
        is_installed = is_installed or backend.is_installed()
    else:
        backend = fallback
    if backend is fallback or is_installed:
        text = f"fused_act: {backend.name!r} takes CUDA tensors; {'. '.join(reasons)}"
        warnings.warn(text, stacklevel=2)
    settled = backend.ready()
    return settled


class use_backend:
    """Force a backend, as a statement or as a context manager.

    Args:
        name: `"cuda"` (the CUDA C++ extension), `"triton"`, `"torch"` (torch's own ops), or
            `"auto"`, the default: for each tensor the best of them that takes it.

    A forced kernel backend raises for a tensor that it does not take. The setting holds for all
    threads of the process. Under `torch.compile` a forced backend puts that backend's opaque op
    into the graph, and changing it recompiles. `torch.export`, `torch.jit` and FX get torch's own
    op from every backend, so that what they make runs without this package.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend is not available here; the message says why and what to do.

    Example::

        with fused_act.use_backend("triton"):
            y = fused_act.mish(x)
    """

    def __init__(self, name: str):
        global forced
        if name != "auto" and name not in BACKENDS:
            expected = ", ".join(map(repr, ("auto", *BACKENDS)))
            raise ValueError(f"use_backend: expected one of {expected}, got {name!r}")
        backend = None
        if name != "auto":
            backend = BACKENDS[name]
            reason = backend.unavailable()
            if reason is not None:
                raise RuntimeError(f"use_backend: {name!r} is not available: {reason}")
        self.backend = backend and backend.ready()
        self.previous = forced
        forced = self.backend

    def __enter__(self) -> use_backend:
        global forced
        forced = self.backend
        return self

    def __exit__(self, *exception: object) -> None:
        global forced
        forced = self.previous
