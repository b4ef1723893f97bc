"""Activations of x and of -x side by side: y = cat([f(x), f(-x)], dim), read and written once.

`f` is an elementwise activation without parameters whose derivative is 0 or 1. The raw ops are, for
crelu, which mirrors relu,

    crelu(x, dim) -> y
    crelu_with_mask(x, dim) -> y, mask
    crelu_backward(grad_output, mask, dim, stride)

where `stride` is that of `x`, and the mask has two rows of bits, which begin with a byte, for each
row that `Layout` tells of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_act._torch_private import unwrap_if_dead
from fused_act.dispatch import Kernels
from fused_act.families.base import (
    KernelFunction,
    Row,
    call,
    function_class,
    is_backward_differentiated,
    kernels_for,
)
from fused_act.families.compiled import first, graph_name
from fused_act.families.elementwise import Elementwise
from fused_act.families.masks import MaskContext, save_mask, unpack, zeros_of_input
from fused_act.families.raw_op import (
    RawOp,
    check,
    check_mask,
    check_stride,
    dense_stride,
    empty_mask,
    empty_strided,
)
from fused_act.families.recording import Recording, Recordings


class MirroredContext(MaskContext, Protocol):
    parameters: tuple[int]  # dim


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Mirrored(Row):
    """One mirrored activation.

    `torch.compile` gets torch's own ops, of which Inductor makes one kernel.

    Args:
        name, spelling: as in `Row`.
        derived_from: `f`, whose Triton functions and C++ struct the kernels take.
    """

    derived_from: Elementwise

    family: ClassVar[str] = "mirrored"
    signature: ClassVar[str] = "Tensor x, int dim"

    @property
    def pair(self) -> Row:
        return self.derived_from

    def make_eager(self) -> Kernels:
        return Kernels(self.torch_forward, backward=self.torch_backward)

    def make_function(self) -> type[KernelFunction]:
        """The `torch.autograd.Function`: `apply(x, dim) -> y`."""

        def forward(
            ctx: MirroredContext, x: Tensor, dim: int, kernels: Kernels | None = None
        ) -> Tensor | tuple[Tensor, Tensor]:
            # CUDA's backward runs on engine threads and maybe after `use_backend` has ended.
            kernels = self.kernels_along(x, dim) if kernels is None else kernels
            ctx.kernels, ctx.parameters = kernels, (dim,)
            if kernels is self.eager:
                ctx.set_materialize_grads(False)
                ctx.save_for_backward(x)
                return self.torch_forward(x, dim)
            y, mask = call(kernels.forward_with_mask, x, dim)
            return save_mask(ctx, y, x.shape, dense_stride(x), mask)

        def backward(
            ctx: MirroredContext, grad_output: Tensor | None, grad_anchor: Tensor | None = None
        ) -> tuple[Tensor | None, ...]:
            return grad_input(self, ctx, grad_output, grad_anchor), None, None

        return function_class(self, "Function", "mask", forward, backward)

    def recordings(self, kernels: Kernels) -> Recordings:
        return Recordings(
            Recording.of(self.Function, "mask", lambda ctx, grad: (grad_input(self, ctx, grad),))
        )

    def kernels_along(self, x: Tensor, dim: int) -> Kernels:
        """The kernels for `x`; torch's own ops also along a `dim` that does not exist.

        The error is then torch's.
        """
        kernels = kernels_for(self, x)
        exists = kernels is self.eager or (type(dim) is int and -x.dim() <= dim < x.dim())
        return kernels if exists else self.eager

    def activate_in_python(self, x: Tensor, dim: int, inplace: bool = False) -> Tensor:
        kernels = self.kernels_along(x, dim)
        if kernels is self.eager:
            return self.torch_forward(x, dim)
        if torch.is_grad_enabled() and x.requires_grad:
            if torch.compiler.is_compiling():
                return self.graph_op(x, dim, graph_name())
            x = unwrap_if_dead(x)
            return first(self.Function.apply_kernels(x, dim, kernels))
        return call(kernels.forward, x, dim)

    def torch_forward(self, x: Tensor, dim: int) -> Tensor:
        f = self.derived_from.torch_forward
        return torch.cat([f(x, inplace=False), f(-x, inplace=False)], dim)

    def torch_backward(self, grad_output: Tensor, x: Tensor, mirrored: Tensor, dim: int) -> Tensor:
        """The gradient, where `f` is that of `x` and of `mirrored`, as a rule -x."""
        halves = (grad_output.narrow(dim, start, x.size(dim)) for start in (0, x.size(dim)))
        grad: Tensor
        mirrored_grad: Tensor
        grad, mirrored_grad = map(self.derived_from.torch_backward, halves, (x, mirrored))
        return grad - mirrored_grad

    def raw_ops(self) -> dict[str, RawOp]:
        name, x = self.name, "Tensor x, int dim"
        args = "Tensor grad_output, Tensor mask, int dim, SymInt[] stride"
        masked = f"{name}_with_mask({x}) -> (Tensor, Tensor)"
        return {
            "forward": RawOp(f"{name}({x}) -> Tensor", empty_y, check_x),
            "forward_with_mask": RawOp(masked, empty_y_and_mask, check_x),
            "backward": RawOp(f"{name}_backward({args}) -> Tensor", empty_x, check_backward),
        }


def grad_input(
    row: Mirrored,
    ctx: MirroredContext,
    grad_output: Tensor | None,
    grad_anchor: Tensor | None = None,
) -> Tensor | None:
    """The gradient with respect to `x`, as `elementwise.grad_input`."""
    if grad_output is None and grad_anchor is None:
        return None
    saved, *anchor = ctx.saved_tensors
    (dim,) = ctx.parameters
    if grad_output is None:
        return zeros_of_input(ctx, anchor[0])
    if ctx.kernels is row.eager:
        return row.torch_backward(grad_output, saved, -saved, dim)
    if not is_backward_differentiated():
        return call(ctx.kernels.backward, grad_output, saved, dim, ctx.stride)
    layout = Layout.of(ctx.shape, ctx.stride, dim)
    bits = unpack(saved)[..., : layout.columns].flatten().contiguous()
    signs = bits.as_strided(layout.shape, layout.stride).to(grad_output.dtype) * 2 - 1
    x, mirrored = (signs.narrow(dim, start, ctx.shape[dim]) for start in (0, ctx.shape[dim]))
    return row.torch_backward(grad_output, x, mirrored, dim) + anchor[0].sum()


class Layout(NamedTuple):
    """A dense tensor `x` as a matrix in memory, of which each row is written twice side by side.

    Args:
        rows, columns: the size of the matrix.
        shape, stride: those of `y`, which keeps the order of the dimensions of `x`.
    """

    rows: int
    columns: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], stride: Sequence[int], dim: int) -> Layout:
        dim %= len(shape)
        # A stride that nothing steps by may be anything, so it is the order that counts.
        inside = [step < stride[dim] for step in stride]
        outside = [not within and i != dim for i, within in enumerate(inside)]
        inner = math.prod(size for size, within in zip(shape, inside) if within)
        rows = math.prod(size for size, without in zip(shape, outside) if without)
        y_shape, y_stride = list(shape), list(stride)
        y_shape[dim], y_stride[dim] = 2 * shape[dim], inner
        y_stride = [2 * step if without else step for step, without in zip(y_stride, outside)]
        return cls(rows, shape[dim] * inner, tuple(y_shape), tuple(y_stride))

    @property
    def mask_shape(self) -> tuple[int, int, int]:
        """One bit for each element of `y`; its rows begin with a byte."""
        return self.rows, 2, (self.columns + 7) // 8


def empty_y(x: Tensor, dim: int) -> Tensor:
    layout = Layout.of(x.shape, dense_stride(x), dim)
    return empty_strided(x, layout.shape, layout.stride)


def empty_y_and_mask(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    layout = Layout.of(x.shape, dense_stride(x), dim)
    return empty_strided(x, layout.shape, layout.stride), empty_mask(x, *layout.mask_shape)


def empty_x(grad_output: Tensor, mask: Tensor, dim: int, stride: Sequence[int]) -> Tensor:
    return empty_strided(grad_output, unmirrored(grad_output.shape, dim), stride)


def unmirrored(shape: Sequence[int], dim: int) -> list[int]:
    """The shape of `x`, where that of `y` is `shape`."""
    halved = list(shape)
    halved[dim] //= 2
    return halved


def check_x(op: str, device_types: tuple[str, ...] | None, x: Tensor, dim: int) -> None:
    """Raise unless a kernel can safely mirror `x` along `dim`."""
    check(op, device_types, x)
    if not -x.dim() <= dim < x.dim():
        expected = f"between {-x.dim()} and {x.dim() - 1}" if x.dim() > 0 else "x with dimensions"
        raise IndexError(f"{op}: expected dim {expected}, got {dim} for shape {tuple(x.shape)}")


def check_backward(
    op: str,
    device_types: tuple[str, ...] | None,
    grad_output: Tensor,
    mask: Tensor,
    dim: int,
    stride: Sequence[int],
) -> None:
    """Likewise for the arguments of backward, `stride` being that of `x`."""
    check_x(op, device_types, grad_output, dim)
    if grad_output.size(dim) % 2 != 0:
        raise ValueError(
            f"{op}: expected grad_output of even size along dim {dim}, got {grad_output.size(dim)}"
        )
    shape = unmirrored(grad_output.shape, dim)
    check_stride(op, shape, stride)
    check_mask(op, grad_output, mask, Layout.of(shape, stride, dim).mask_shape)
