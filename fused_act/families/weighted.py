"""Activations with a learnable weight, one or one for each channel: what they share.

y = f(x, weight). Backward computes the gradient of x and that of the weight, a sum over all
elements of its channel, in one pass over x and grad_output. The raw ops are, for prelu,

    prelu(x, weight) -> y
    prelu_backward(grad_output, x, weight) -> grad_input, grad_weight

where `weight` is fp32 and has one dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fused_act._torch_private import unwrap_if_dead
from fused_act.dispatch import PLAIN, Kernels
from fused_act.families.base import (
    Context,
    KernelFunction,
    Row,
    call,
    convert,
    function_class,
    is_backward_differentiated,
    kernels_for,
)
from fused_act.families.compiled import graph_name, outside
from fused_act.families.raw_op import RawOp, check, like_x
from fused_act.families.recording import Recording, Recordings


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Weighted(Row):
    """One activation with a weight.

    `torch.compile` gets torch's own ops, which Inductor fuses, the sum for the weight included.

    Args:
        name, spelling: as in `Row`.
        torch_forward: `torch_forward(x, weight) -> y` in torch's own ops.
        derived_from: the row with the same formula whose parameter is the weight here, if there is
            one: its Triton functions and its C++ struct are those of this row, too.
        takes_fp32: whether the weight of a 16-bit `x` may be in fp32.
        autocasts: whether autocast has torch's own op run in the lower precision.
    """

    torch_forward: Callable[[Tensor, Tensor], Tensor]
    derived_from: Row | None = None
    takes_fp32: bool = False
    autocasts: bool = False

    family: ClassVar[str] = "weighted"
    signature: ClassVar[str] = "Tensor x, Tensor weight"

    @property
    def pair(self) -> Row:
        return self.derived_from or self

    def make_eager(self) -> Kernels:
        return Kernels(self.torch_forward)

    def make_function(self) -> type[KernelFunction]:
        """The `torch.autograd.Function`: `apply(x, weight) -> y`."""

        def forward(
            ctx: Context, x: Tensor, weight: Tensor, kernels: Kernels | None = None
        ) -> Tensor:
            if kernels is None:
                kernels = kernels_for(self, x) if self.fits(x, weight) else self.eager
            # CUDA's backward runs on engine threads and maybe after `use_backend` has ended.
            ctx.kernels = kernels
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, weight)
            if ctx.kernels is self.eager:
                return self.torch_forward(x, weight)
            return call(ctx.kernels.forward, x, as_vector(weight))

        def backward(ctx: Context, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
            return (*gradients(self, ctx, grad_output), None)

        return function_class(self, "Function", "x", forward, backward)

    def recordings(self, kernels: Kernels) -> Recordings:
        return Recordings(
            Recording.of(self.Function, "x", partial(gradients, self)),
            takes_fp32=self.takes_fp32,
            autocasts=self.autocasts,
        )

    def fits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the kernels take `weight` with an `x` that they take.

        What they do not take is torch's, whose error says what is wrong with it.
        """
        return (
            type(weight) in PLAIN
            and weight.layout is torch.strided
            and weight.device == x.device
            and (weight.dtype is x.dtype or (self.takes_fp32 and weight.dtype is torch.float32))
            and weight.dim() <= 1
            and weight.numel() in (1, channels(x))
        )

    def activate_in_python(self, x: Tensor, weight: Tensor, inplace: bool = False) -> Tensor:
        kernels = kernels_for(self, x)
        autocasts = kernels is not self.eager and self.autocasts
        if autocasts and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        if kernels is self.eager or not self.fits(x, weight):
            return self.torch_forward(x, weight)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            if torch.compiler.is_compiling():
                return self.graph_op(x, weight, graph_name())
            x, weight = map(unwrap_if_dead, (x, weight))
            # One output: a Function that saves no mask has no anchor.
            return self.Function.apply_kernels(x, weight, kernels)  # type: ignore[return-value]
        return call(kernels.forward, x, as_vector(weight))

    def raw_ops(self) -> dict[str, RawOp]:
        args = "Tensor x, Tensor weight"
        schema = f"{self.name}_backward(Tensor grad_output, {args}) -> (Tensor, Tensor)"
        return {
            "forward": RawOp(f"{self.name}({args}) -> Tensor", like_x, check_weighted),
            "backward": RawOp(schema, like_x_and_weight, check_backward),
        }


def like_x_and_weight(grad_output: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape)


def check_weighted(
    op: str,
    device_types: tuple[str, ...] | None,
    x: Tensor,
    weight: Tensor,
    grad_output: Tensor | None = None,
) -> None:
    """As `check`; the weight is fp32, a vector of one element or one for each channel of `x`."""
    check(op, device_types, x, grad_output)
    if weight.dtype is not torch.float32:
        raise TypeError(f"{op}: expected weight to be float32, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{op}: expected weight on {x.device}, got {weight.device}")
    if weight.dim() != 1 or not weight.is_contiguous() or weight.numel() not in (1, channels(x)):
        raise ValueError(
            f"{op}: expected a contiguous weight of shape (1,) or ({channels(x)},) for x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)} with stride {weight.stride()}"
        )


def check_backward(
    op: str,
    device_types: tuple[str, ...] | None,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
) -> None:
    check_weighted(op, device_types, x, weight, grad_output)


def channels(x: Tensor) -> int:
    """The length of dimension 1, or 1 where there is none."""
    return x.size(1) if x.dim() > 1 else 1


def as_vector(weight: Tensor) -> Tensor:
    """The weight as the kernels take it."""
    if weight.dtype is torch.float32 and weight.dim() == 1 and weight.is_contiguous():
        return weight  # three ops less
    return convert(weight, torch.float32).reshape(-1).contiguous()


def gradients(
    row: Weighted, ctx: Context, grad_output: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and of the weight, themselves differentiable under `create_graph=True`."""
    if grad_output is None:
        return None, None
    x, weight = ctx.saved_tensors
    if ctx.kernels is row.eager or is_backward_differentiated():
        return outside(torch_gradients, row, ctx, x, weight, grad_output)
    grad_input, grad_weight = call(ctx.kernels.backward, grad_output, x, as_vector(weight))
    grad_weight = convert(grad_weight, weight.dtype).reshape(weight.shape)
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    return grad_input if needs_input else None, grad_weight if needs_weight else None


def torch_gradients(
    row: Weighted, ctx: Context, x: Tensor, weight: Tensor, grad_output: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by torch's own op, differentiable under `create_graph=True`."""
    create_graph = torch.is_grad_enabled()
    needed = [i for i in range(2) if ctx.needs_input_grad[i]]
    with torch.enable_grad():
        # In the same graph, but without the hooks that they may have.
        inputs = [x.view_as(x), weight.view_as(weight)]
        if not create_graph:
            inputs = [each.detach().requires_grad_() for each in inputs]
        y = row.torch_forward(*inputs)
    grads = torch.autograd.grad(
        y, [inputs[i] for i in needed], grad_output, create_graph=create_graph
    )
    found = dict(zip(needed, grads))
    return found.get(0), found.get(1)
