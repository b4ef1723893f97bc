"""The CUDA C++ functors and loops as a host library: see host_kernels.cpp.

The host stands in for the GPU: it takes correctly rounded functions for the approximate
instructions, then ones that are off by as much as the hardware's may be.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fused_act.dispatch import DTYPES

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> dict[str, ctypes.CDLL]:
    """The host build of each activation, by name, out of the registration lines of register.cu."""
    registrations = re.findall(
        r'elementwise::implement<(\w+)((?:, double)*)>\(library, "(\w+)"\)',
        (ROOT / "csrc" / "register.cu").read_text(),
    )
    include = Path(torch.__file__).parent / "include"
    builds = {}
    for struct, parameters, name in registrations:
        command = [
            COMPILER,
            *("-std=c++20", "-O2", "-shared", "-fPIC", f"-I{include}"),
            f"-DACTIVATION={struct}",
            f"-DPARAMETER_COUNT={parameters.count('double')}",
            str(ROOT / "tests" / "host_kernels.cpp"),
            *("-o", str(folder / f"{name}.so")),
        ]
        builds[name] = subprocess.Popen(command)
    built = {}
    for name, process in builds.items():
        assert process.wait() == 0, f"{name} does not build, see above"
        library = built[name] = ctypes.CDLL(str(folder / f"{name}.so"))
        library.tile.restype = library.count_blocks.restype = ctypes.c_int64
        for function in (library.run_exp2, library.run_reciprocal):
            function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    return built


class Host:
    """The host build of one case: forward and backward on CPU tensors."""

    def __init__(self, library: ctypes.CDLL, case):
        self.library, self.saves = library, case.activation.saves
        self.masked = self.saves == "mask"
        self.parameters = (ctypes.c_double * max(1, len(case.parameters)))(*case.parameters)

    def tile(self, dtype: torch.dtype) -> int:
        return self.library.tile(DTYPES.index(dtype))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, block: int = 0) -> Tensor:
        """Write f(x) and the mask. `block`: the number of the block that the tensors begin with."""
        start = block * self.tile(x.dtype)
        self.library.run_forward(
            ctypes.c_int(DTYPES.index(x.dtype)),
            self.parameters,
            address(x, start),
            address(y, start),
            None if mask is None else address(mask, start // 8),
            *self.span(x, block),
        )
        return y

    def backward(
        self,
        grad_output: Tensor,
        saved: Tensor,
        grad_input: Tensor,
        block: int = 0,
        saves: str | None = None,
    ) -> Tensor:
        """Write the gradient, out of what is saved; `saves` says what that is, if not as a rule."""
        start = block * self.tile(grad_output.dtype)
        self.library.run_backward(
            ctypes.c_int(DTYPES.index(grad_output.dtype)),
            self.parameters,
            address(grad_output, start),
            address(saved, start // 8 if self.masked else start),
            address(grad_input, start),
            *self.span(grad_output, block),
            ctypes.c_char((saves or self.saves)[0].encode()),
        )
        return grad_input

    def span(self, x: Tensor, block: int) -> list[ctypes.c_int64]:
        """numel, first block, end of the blocks, of a tensor whose last ones are in `x`."""
        numel = ctypes.c_int64(block * self.tile(x.dtype) + x.numel())
        end = self.library.count_blocks(DTYPES.index(x.dtype), numel)
        return [numel, ctypes.c_int64(block), ctypes.c_int64(end)]

    def pair(self, x: Tensor) -> dict[str, Tensor]:
        """f(x), and f'(x) as the gradient of a gradient of 1."""
        mask = torch.empty(-(-x.numel() // 8), dtype=torch.uint8) if self.masked else None
        y = self.forward(x, torch.empty_like(x), mask)
        saved = {"x": x, "y": y, "mask": mask}[self.saves]
        derivative = self.backward(torch.ones_like(x), saved, torch.empty_like(x))
        return {"forward": y, "derivative": derivative}

    def derivative_from_output(self, y: Tensor) -> Tensor:
        return self.backward(torch.ones_like(y), y, torch.empty_like(y), saves="y")


def address(tensor: Tensor, start: int) -> ctypes.c_void_p:
    """Where a tensor would begin whose elements from `start` on are those of `tensor`."""
    return ctypes.c_void_p(tensor.data_ptr() - start * tensor.itemsize)
