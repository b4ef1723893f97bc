"""Activations with a learnable weight, one or one for each channel: what they share.

No activation is named here. y = f(x, weight); backward computes the gradient of x and that of the
weight, a sum over all elements of its channel, in one pass over x and grad_output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from fused_act.activation import (
    KernelFunction,
    call,
    define_graph_op,
    function_class,
    graph_name,
    is_backward_differentiated,
    kernels_for,
)
from fused_act.backends import PLAIN, Kernels
from fused_act.backends.eager import convert


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedActivation:
    """One activation with a weight, as the generic code sees it.

    Args:
        name: names the ops (`prelu`, `prelu_backward`) and the Triton functions.
        torch_forward: `torch_forward(x, weight) -> y` in torch's own ops.
        takes_fp32: whether the weight of a 16-bit `x` may be in fp32.
        autocasts: whether autocast has torch's own op run in the lower precision.
    """

    name: str
    torch_forward: Callable[[Tensor, Tensor], Tensor]
    takes_fp32: bool = False
    autocasts: bool = False
    eager: Kernels = dataclasses.field(init=False)
    Function: type[KernelFunction] = dataclasses.field(init=False)
    graph_op: OpOverload = dataclasses.field(init=False)

    # `torch.compile` gets torch's own ops, which Inductor fuses, the sum for the weight included.
    fuses: ClassVar[Callable[..., bool]] = staticmethod(lambda: False)

    def activate(self, x: Tensor, weight: Tensor) -> Tensor:
        return activate_weighted(self, x, weight)

    def __post_init__(self):
        object.__setattr__(self, "eager", Kernels(self.torch_forward))
        object.__setattr__(self, "Function", make_function(self))
        object.__setattr__(self, "graph_op", define_graph_op(self, "Tensor x, Tensor weight"))


def channels(x: Tensor) -> int:
    """The length of dimension 1, or 1 where there is none."""
    return x.size(1) if x.dim() > 1 else 1


def fits(row: WeightedActivation, x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take `weight` with an `x` that they take.

    What they do not take is torch's, whose error says what is wrong with it.
    """
    return (
        type(weight) in PLAIN
        and weight.layout is torch.strided
        and weight.device == x.device
        and (weight.dtype is x.dtype or (row.takes_fp32 and weight.dtype is torch.float32))
        and weight.dim() <= 1
        and weight.numel() in (1, channels(x))
    )


def activate_weighted(row: WeightedActivation, x: Tensor, weight: Tensor) -> Tensor:
    """Compute `row` of `x`, recording it for autograd where `x` or `weight` requires grad."""
    kernels = kernels_for(row, x)
    if kernels is not row.eager and row.autocasts and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if kernels is row.eager or not fits(row, x, weight):
        return row.torch_forward(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if torch.compiler.is_compiling():
            return row.graph_op(x, weight, graph_name())
        x, weight = map(torch._C._functorch.unwrap_if_dead, (x, weight))
        return row.Function.apply_kernels(x, weight, kernels)
    return call(kernels.forward, x, as_vector(weight))


def as_vector(weight: Tensor) -> Tensor:
    """The weight as the kernels take it."""
    return convert(weight, torch.float32).reshape(-1).contiguous()


def make_function(row: WeightedActivation) -> type[KernelFunction]:
    """The `torch.autograd.Function` of `row`: `apply(x, weight) -> y`."""

    def forward(ctx, x, weight, kernels=None):
        if kernels is None:
            kernels = kernels_for(row, x) if fits(row, x, weight) else row.eager
        # CUDA's backward runs on engine threads and maybe after `use_backend` has ended.
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight)
        if ctx.kernels is row.eager:
            return row.torch_forward(x, weight)
        return call(ctx.kernels.forward, x, as_vector(weight))

    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        if ctx.kernels is row.eager or is_backward_differentiated():
            return (*torch_gradients(row, ctx, x, weight, grad_output), None)
        grad_input, grad_weight = call(ctx.kernels.backward, grad_output, x, as_vector(weight))
        grad_weight = convert(grad_weight, weight.dtype).reshape(weight.shape)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        return (grad_input if needs_input else None), (grad_weight if needs_weight else None), None

    return function_class(row, "Function", "x", forward, backward)


def torch_gradients(row, ctx, x, weight, grad_output) -> list[Tensor | None]:
    """The gradients by torch's own op, differentiable under `create_graph=True`."""
    create_graph = torch.is_grad_enabled()
    needed = [i for i in range(2) if ctx.needs_input_grad[i]]
    with torch.enable_grad():
        # In the same graph, but without the hooks that they may have.
        inputs = [x.view_as(x), weight.view_as(weight)]
        if not create_graph:
            inputs = [each.detach().requires_grad_() for each in inputs]
        y = row.torch_forward(*inputs)
    grads: list[Tensor | None] = [None, None]
    found = torch.autograd.grad(
        y, [inputs[i] for i in needed], grad_output, create_graph=create_graph
    )
    for i, grad in zip(needed, found):
        grads[i] = grad
    return grads
