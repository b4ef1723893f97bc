"""Triton without a GPU: launches are written down, and nothing runs.

The rest of a launch is Triton's own: it binds the arguments, tells what kind of arguments they are
and finds what it compiled for that kind.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from fused_act.activations import ROWS
from fused_act.backends.triton import elementwise, mirrored, weighted
from fused_act.backends.triton.activations import functions_of
from fused_act.backends.triton.launcher import Launcher

KERNELS = [
    getattr(module, name)
    for module in (elementwise, mirrored, weighted)
    for name in ("forward_kernel", "backward_kernel")
]


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What Triton and the launcher look at in a tensor."""

    dtype: torch.dtype
    address: int
    device: int = 0

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device


class Launch(NamedTuple):
    """What a GPU would have been asked to run.

    Args:
        kernel: what was compiled, by its place in the order of compilations.
        metadata: what Triton says of it to its launcher.
        device: the current one.
        arguments: all of the kernel, tensors as their addresses.
    """

    kernel: int
    metadata: tuple
    device: int
    stream: int
    grid: tuple[int, int, int]
    arguments: tuple


class Compiled(CompiledKernel):
    """Stands for what Triton would compile of `src` with `options`, which takes a second."""

    def __init__(self, stub: Stub, src: ASTSource, options: dict[str, Any]) -> None:
        self.src, self.options, self.name = src, options, src.fn.__name__
        self.module, self.function, *_ = stub.load_binary(self.name)
        self.packed_metadata, self._run = (self.name,), stub.launch

    def __del__(self) -> None:
        """Nothing was loaded."""


class Stub:
    """A driver: Triton's launches go into `launches`.

    Its devices are numbers. `device` is the current one.
    """

    def __init__(self) -> None:
        self.device = 0
        self.loaded: list[str] = []
        self.launches: list[Launch] = []
        self.utils = self  # Triton has a part of its driver there

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**17}

    def load_binary(self, name: str, *args: Any) -> tuple[object, int, int, int, int]:
        """The module, the kernel, its registers and spills, and the threads that it can have."""
        self.loaded.append(name)
        return self, len(self.loaded), 40, 0, 1024

    def compile(self, src: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
        return Compiled(self, src, options)

    def launcher_cls(self, src: ASTSource, metadata: object) -> Callable[..., None]:
        return self.launch

    def launch(
        self, x, y, z, stream, kernel, packed_metadata, metadata, enter_hook, exit_hook, *arguments
    ) -> None:
        if enter_hook is not None:
            enter_hook(metadata)
        values = tuple(each.data_ptr() if hasattr(each, "data_ptr") else each for each in arguments)
        grid = x, y, z
        self.launches.append(Launch(kernel, packed_metadata, self.device, stream, grid, values))
        if exit_hook is not None:
            exit_hook(metadata)

    @contextlib.contextmanager
    def device_of(self, tensor: torch.Tensor | Pointer) -> Iterator[None]:
        """Stands for `torch.cuda.device_of`."""
        before, self.device = self.device, tensor.get_device()
        yield
        self.device = before

    def launched(self) -> list[Launch]:
        """The launches since the last call."""
        found, self.launches = self.launches, []
        return found


@contextlib.contextmanager
def stubbed(stub: Stub, compiles: bool = False) -> Iterator[Stub]:
    """Let Triton work with `stub`, without what it compiled before.

    Args:
        compiles: Triton compiles kernels, and no `Compiled` stands for them.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", stub))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", stub.device_of))
        if not compiles:
            stack.enter_context(mock.patch.object(triton.compiler, "compile", stub.compile))
        for kernel in KERNELS:
            caches = collections.defaultdict(kernel.create_binder)
            stack.enter_context(mock.patch.object(kernel, "device_caches", caches))
        yield stub


def example() -> tuple[Launcher, int, tuple, tuple]:
    """The launcher of an activation without parameters, and arguments for it: `launcher(*call)`."""
    functions = functions_of(ROWS["mish"], "forward", None)
    launcher = Launcher(elementwise.forward_kernel, functions, elementwise.OPTIONS)
    x, y = (Pointer(torch.float32, 2**40 + 2**36 * i) for i in range(2))
    return launcher, 1, (x, y, None, 100, ()), (2048,)


def launch_publicly(
    launcher: Launcher, blocks: int, arguments: tuple, constants: tuple
) -> CompiledKernel | None:
    """What `launcher(blocks, arguments, constants)` stands for."""
    with torch.cuda.device_of(arguments[0]):
        return launcher.kernel[(blocks,)](
            *arguments, *launcher.functions, *constants, **launcher.options
        )
