"""The loops and functors of the CUDA kernels as host libraries: see the C++ files in host/.

The host stands in for the GPU: it takes correctly rounded functions for the approximate
instructions, then ones that are off by as much as the hardware's may be.
"""

from __future__ import annotations

import ctypes
import functools
import re

import torch
from torch import Tensor

from fused_act.dispatch import DTYPES
from fused_act.families.base import Row
from tests.shared.accuracy import as_batch
from tests.shared.compiling import ROOT, SHARED, shared_library

SOURCES = SHARED / "host"


@functools.cache
def library(row: Row) -> ctypes.CDLL:
    """The host build of a row, out of its registration line."""
    registration = rf'{row.family}::implement<(\w+)((?:, double)*)>\(library, "{row.name}"\)'
    text = (ROOT / "csrc" / "register.cu").read_text()
    struct, parameters = re.search(registration, text).groups()
    options = [f"-DACTIVATION={struct}", f"-DPARAMETER_COUNT={parameters.count('double')}"]
    return ctypes.CDLL(str(shared_library(SOURCES / f"{row.family}.cpp", row.name, options)))


def host(case):
    """The host build of a case."""
    return HOSTS[case.row.family](case)


class Host:
    """What the host builds of all families share."""

    def __init__(self, case):
        self.case, self.library = case, library(case.row)
        for function in ("count_blocks", "tile"):
            if hasattr(self.library, function):
                getattr(self.library, function).restype = ctypes.c_int64
        for function in ("run_exp2", "run_reciprocal"):
            if hasattr(self.library, function):
                getattr(self.library, function).argtypes = [ctypes.c_float]
                getattr(self.library, function).restype = ctypes.c_float


class ElementwiseHost(Host):
    """The loops of an elementwise activation."""

    def __init__(self, case):
        super().__init__(case)
        self.saves = case.row.saves
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

    def evaluate(self, x: Tensor) -> dict[str, Tensor]:
        """The results for a vector, see `accuracy.evaluate`."""
        mask = torch.empty(-(-x.numel() // 8), dtype=torch.uint8) if self.masked else None
        y = self.forward(x, torch.empty_like(x), mask)
        saved = {"x": x, "y": y, "mask": mask}[self.saves]
        derivative = self.backward(torch.ones_like(x), saved, torch.empty_like(x))
        return {"forward": y, "derivative": derivative}

    def derivative_from_output(self, y: Tensor) -> Tensor:
        return self.backward(torch.ones_like(y), y, torch.empty_like(y), saves="y")


class WeightedHost(Host):
    """The loops of an activation with a weight. The weights are those of dimension 1."""

    def sizes(self, x: Tensor, weight: Tensor) -> list[ctypes.c_int64]:
        inner = x.stride(1) if weight.numel() > 1 else 0
        return [ctypes.c_int64(size) for size in (x.numel(), weight.numel(), inner)]

    def forward(self, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        self.library.run_forward(
            DTYPES.index(x.dtype), *map(address, (x, weight, y)), *self.sizes(x, weight)
        )
        return y

    def backward(
        self, grad_output: Tensor, x: Tensor, weight: Tensor, grad_input: Tensor
    ) -> Tensor:
        """Returns the gradient of the weight; writes that of x."""
        sums = torch.zeros(x.numel() + weight.numel() + 2)
        shape = (ctypes.c_int64 * 3)()
        self.library.run_backward(
            DTYPES.index(x.dtype),
            *map(address, (grad_output, x, weight, grad_input, sums)),
            ctypes.c_int64(sums.numel()),
            *self.sizes(x, weight),
            shape,
        )
        count = shape[0] * shape[1] * shape[2]
        return sums[:count].reshape(*shape).sum((0, 2))

    def evaluate(self, x: Tensor) -> dict[str, Tensor]:
        """The results for a vector with a weight for each element, see `accuracy.evaluate`."""
        batch, weight, gradient = as_batch(self.case, x)
        y = self.forward(batch, weight, torch.empty_like(batch))
        derivative = torch.empty_like(batch)
        added = self.backward(gradient, batch, weight, derivative)
        return {
            "forward": y[0, :, 0],
            "derivative": derivative[0, :, 0],
            "weight_derivative": added,
        }


class MirroredHost(Host):
    """The loops of a mirrored activation, on a matrix whose rows are written twice side by side."""

    @staticmethod
    def elements_of_block(dtype: torch.dtype) -> int:
        return 256 * 16 // dtype.itemsize

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None, first: int = 0) -> None:
        """Run the loops on all of `x`, or from block `first` on, with which its rows begin."""
        skipped = first * self.elements_of_block(x.dtype) // x.shape[1]
        addresses = [address(each, skipped * each[:1].numel()) for each in (x, y)]
        addresses += [None if mask is None else address(mask, skipped * mask[:1].numel())]
        self.library.run_forward(
            DTYPES.index(x.dtype), *addresses, *self.span(x.dtype, skipped, x.shape, first)
        )

    def backward(
        self, grad_output: Tensor, mask: Tensor, grad_input: Tensor, first: int = 0
    ) -> None:
        dtype = grad_input.dtype
        skipped = first * self.elements_of_block(dtype) // grad_input.shape[1]
        tensors = (grad_output, mask, grad_input)
        addresses = [address(each, skipped * each[:1].numel()) for each in tensors]
        self.library.run_backward(
            DTYPES.index(dtype), *addresses, *self.span(dtype, skipped, grad_input.shape, first)
        )

    def evaluate(self, x: Tensor) -> dict[str, Tensor]:
        """The results for a vector, see `accuracy.evaluate`."""
        y = x.new_empty(1, 2, x.numel())
        mask = torch.empty(1, 2, -(-x.numel() // 8), dtype=torch.uint8)
        self.forward(x.view(1, -1), y, mask)
        derivative = torch.empty_like(x)
        self.backward(torch.ones_like(y), mask, derivative.view(1, -1))
        return {"forward": y.flatten(), "derivative": derivative}

    def span(
        self, dtype: torch.dtype, skipped: int, shape: torch.Size, first: int
    ) -> list[ctypes.c_int64]:
        sizes = [ctypes.c_int64(size) for size in (skipped + shape[0], shape[1])]
        last = self.library.count_blocks(DTYPES.index(dtype), *sizes)
        return [*sizes, ctypes.c_int64(first), ctypes.c_int64(last)]


HOSTS = {"elementwise": ElementwiseHost, "weighted": WeightedHost, "mirrored": MirroredHost}


def address(tensor: Tensor, start: int = 0) -> ctypes.c_void_p:
    """Where a tensor would begin whose elements from `start` on are those of `tensor`."""
    return ctypes.c_void_p(tensor.data_ptr() - start * tensor.itemsize)
