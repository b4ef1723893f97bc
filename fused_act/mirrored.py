"""Activations of x and of -x side by side: y = cat([f(x), f(-x)], dim), read and written once.

`f` is an elementwise activation without parameters whose derivative is 0 or 1. No activation is
named here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from fused_act.activation import (
    Activation,
    KernelFunction,
    call,
    define_graph_op,
    dense_stride,
    first,
    function_class,
    graph_name,
    is_backward_differentiated,
    kernels_for,
    save_mask,
    unpack,
    zeros_of_input,
)
from fused_act.backends import Kernels


@dataclasses.dataclass(frozen=True, eq=False)
class MirroredActivation:
    """One mirrored activation, as the generic code sees it.

    Args:
        name: names the ops (`crelu`, `crelu_with_mask`, `crelu_backward`).
        activation: `f`, whose Triton functions and C++ struct the kernels take.
    """

    name: str
    activation: Activation
    eager: Kernels = dataclasses.field(init=False)
    Function: type[KernelFunction] = dataclasses.field(init=False)
    graph_op: OpOverload = dataclasses.field(init=False)

    # `torch.compile` gets torch's own ops, of which Inductor makes one kernel.
    fuses: ClassVar[Callable[..., bool]] = staticmethod(lambda: False)

    def activate(self, x: Tensor, dim: int) -> Tensor:
        return activate_mirrored(self, x, dim)

    def __post_init__(self):
        object.__setattr__(self, "eager", Kernels(self.torch_forward, backward=self.torch_backward))
        object.__setattr__(self, "Function", make_function(self))
        object.__setattr__(self, "graph_op", define_graph_op(self, "Tensor x, int dim"))

    def torch_forward(self, x: Tensor, dim: int) -> Tensor:
        f = self.activation.torch_forward
        return torch.cat([f(x, inplace=False), f(-x, inplace=False)], dim)

    def torch_backward(self, grad_output: Tensor, x: Tensor, mirrored: Tensor, dim: int) -> Tensor:
        """The gradient, where `f` is that of `x` and of `mirrored`, as a rule -x."""
        halves = (grad_output.narrow(dim, start, x.size(dim)) for start in (0, x.size(dim)))
        grad, mirrored_grad = map(self.activation.torch_backward, halves, (x, mirrored))
        return grad - mirrored_grad


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


def mirrored_kernels_for(row: MirroredActivation, x: Tensor, dim: int) -> Kernels:
    """The kernels that compute `row`; torch's own ops also along a `dim` that does not exist.

    The error is then torch's.
    """
    kernels = kernels_for(row, x)
    exists = kernels is row.eager or (type(dim) is int and -x.dim() <= dim < x.dim())
    return kernels if exists else row.eager


def activate_mirrored(row: MirroredActivation, x: Tensor, dim: int) -> Tensor:
    """Compute `row` of `x`, recording it for autograd where `x` requires grad."""
    kernels = mirrored_kernels_for(row, x, dim)
    if kernels is row.eager:
        return row.torch_forward(x, dim)
    if torch.is_grad_enabled() and x.requires_grad:
        if torch.compiler.is_compiling():
            return row.graph_op(x, dim, graph_name())
        x = torch._C._functorch.unwrap_if_dead(x)  # as torch's own apply does
        return first(row.Function.apply_kernels(x, dim, kernels))
    return call(kernels.forward, x, dim)


def make_function(row: MirroredActivation) -> type[KernelFunction]:
    """The `torch.autograd.Function` of `row`: `apply(x, dim) -> y`."""

    def forward(ctx, x, dim, kernels=None):
        # CUDA's backward runs on engine threads and maybe after `use_backend` has ended.
        kernels = mirrored_kernels_for(row, x, dim) if kernels is None else kernels
        ctx.kernels, ctx.dim = kernels, dim
        if kernels is row.eager:
            ctx.save_for_backward(x)
            return row.torch_forward(x, dim)
        y, mask = call(kernels.forward_with_mask, x, dim)
        return save_mask(ctx, y, x.shape, dense_stride(x), mask)

    def backward(ctx, grad_output, grad_anchor=None):
        saved, *anchor = ctx.saved_tensors
        dim = ctx.dim
        if ctx.kernels is row.eager:
            return row.torch_backward(grad_output, saved, -saved, dim), None, None
        if grad_output is None:
            return zeros_of_input(ctx, anchor[0]), None, None
        if not is_backward_differentiated():
            return call(ctx.kernels.backward, grad_output, saved, dim, ctx.stride), None, None
        layout = Layout.of(ctx.shape, ctx.stride, dim)
        bits = unpack(saved)[..., : layout.columns].reshape(-1)
        signs = bits.as_strided(layout.shape, layout.stride).to(grad_output.dtype) * 2 - 1
        halves = (signs.narrow(dim, start, ctx.shape[dim]) for start in (0, ctx.shape[dim]))
        return row.torch_backward(grad_output, *halves, dim) + anchor[0].sum(), None, None

    return function_class(row, "Function", "mask", forward, backward)
