"""Activations of each element by itself, with float parameters: what they share.

Their raw ops are, for one that saves its input (mish), its output (tanh) or a mask (relu6):

    mish(x) -> y                        relu6(x) -> y
    mish.out(x, *, out)                 relu6.out(x, *, out)
    mish_backward(grad_output, x)       relu6_with_mask(x) -> y, mask
                                        relu6_with_mask.out(x, *, out) -> mask
    tanh_backward_from_output(          relu6_backward(grad_output, mask, stride)
        grad_output, y)

`mask` is uint8, ceil(numel / 8) long: bit i % 8 of byte i // 8 tells whether the gradient passes
element i in memory order. `stride` is that of `y`, which fixes this order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node, increment_version
from torch.compiler import is_dynamo_compiling

from fused_act._torch_private import is_view, unwrap_if_dead, version_of
from fused_act.dispatch import Kernels
from fused_act.families.base import (
    KernelFunction,
    Row,
    call,
    convert,
    from_input,
    function_class,
    is_backward_differentiated,
    kernels_for,
)
from fused_act.families.compiled import first, graph_name, outside, vary
from fused_act.families.elementwise_ops import (
    check_masked_backward,
    check_x,
    like_grad_output,
    like_saved,
    like_x_and_mask,
    mask_of,
    nothing,
)
from fused_act.families.masks import MaskContext, save_mask, unpack, zeros_of_input
from fused_act.families.raw_op import RawOp, dense_stride, like_x
from fused_act.families.recording import Recording, Recordings


class ElementwiseContext(MaskContext, Protocol):
    parameters: tuple[float, ...]
    input_version: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Elementwise(Row):
    """One elementwise activation.

    Args:
        name, spelling, torch_node: as in `Row`.
        torch_forward: torch's own op, `torch_forward(x, *parameters, inplace) -> y`.
        torch_backward: its gradient, bit for bit: `torch_backward(grad_output, x, *parameters)`.
        torch_backward_from_output: likewise, `torch_backward_from_output(grad_output, y,
            *parameters)`, where torch saves `y`: always, or in place only.
        forward: the formula in torch ops, for fp32 `x`, that `torch.compile` gets to fuse.
        derivative: likewise, the derivative with respect to `x`.
        fuses: whether `torch.compile` gets `forward`, for these parameters, rather than
            `torch_forward`, which Inductor may do as well as can be done.
        parameters: names of the float parameters that follow `x`.
        saves: what the kernels save for backward out of place: `x`; `y`; or `mask`, one bit an
            element, which tells whether the gradient passes as at x = 1, or else as at x = -1.
        torch_parameters: the parameters that a node called `torch_node` had, or None if it is that
            of another function.

    `InplaceFunction` records a call in place.
    """

    torch_forward: Callable[..., Tensor]
    # `Any` stands for None: what is called is there, and a check would cost each call.
    torch_backward: Callable[..., Tensor] | Any = None
    torch_backward_from_output: Callable[..., Tensor] | Any = None
    forward: Callable[..., Tensor] | Any = None
    derivative: Callable[..., Tensor] | Any = None
    fuses: Callable[..., bool] = lambda *parameters: False
    parameters: tuple[str, ...] = ()
    saves: Literal["x", "y", "mask"] = "x"
    torch_parameters: Callable[[Node], tuple[float, ...] | None] = lambda node: ()
    InplaceFunction: type[KernelFunction] = dataclasses.field(init=False)

    family: ClassVar[str] = "elementwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forward is not None:
            self.define("formula", self.make_formula())
        self.define("InplaceFunction", self.make_inplace_function())

    @property
    def saves_inplace(self) -> str:
        """What the kernels save where `y` takes the place of `x`."""
        return self.saves if self.torch_backward_from_output is None else "y"

    @property
    def signature(self) -> str:
        return "Tensor x" + "".join(f", float {parameter}" for parameter in self.parameters)

    def make_eager(self) -> Kernels:
        """Backward needs `x`, or `y` where torch does."""

        def forward(x: Tensor, *parameters: float) -> Tensor:
            return self.torch_forward(x, *parameters, inplace=False)

        def forward_out(x: Tensor, *parameters: float, out: Tensor) -> None:
            out.copy_(forward(x, *parameters))

        return Kernels(forward, forward_out, self.torch_backward, self.torch_backward_from_output)

    def make_formula(self) -> Kernels:
        """Out of place, in fp32."""

        def forward(x: Tensor, *parameters: float) -> Tensor:
            return convert(self.forward(convert(x, torch.float32), *parameters), x.dtype)

        def backward(grad_output: Tensor, x: Tensor, *parameters: float) -> Tensor:
            derivative = self.derivative(convert(x, torch.float32), *parameters)
            return convert(convert(grad_output, torch.float32) * derivative, x.dtype)

        return Kernels(forward, backward=backward)

    def make_function(self) -> type[KernelFunction]:
        """The `torch.autograd.Function`: `apply(x, *parameters) -> y`."""
        count = len(self.parameters)

        def forward(
            ctx: ElementwiseContext, x: Tensor, *args: Any
        ) -> Tensor | tuple[Tensor, Tensor]:
            parameters = args[:count]
            # CUDA's backward runs on engine threads and maybe after `use_backend` has ended.
            kernels: Kernels = (args[count:] or [kernels_for(self, x, *parameters)])[0]
            ctx.kernels, ctx.parameters = kernels, parameters
            if kernels.forward_with_mask is None:
                ctx.set_materialize_grads(False)
                y = call(kernels.forward, x, *parameters)
                ctx.save_for_backward(y if self.saves == "y" else x)
                return y
            ctx.input_version = version_of(x)
            y, mask = call(kernels.forward_with_mask, x, *parameters)
            return save_mask(ctx, y, y.shape, y.stride(), mask)

        def backward(
            ctx: ElementwiseContext, grad_output: Tensor | None, grad_anchor: Tensor | None = None
        ) -> tuple[Tensor | None, ...]:
            grad = grad_input(self, self.saves, ctx, grad_output, grad_anchor)
            return (grad, *[None] * (count + 1))

        return function_class(self, "Function", self.saves, forward, backward, from_input)

    def make_inplace_function(self) -> type[KernelFunction]:
        """Likewise in place: `apply(source, x, *parameters)` writes `x`, which is then returned.

        `source` has the values of `x`. It is `x` itself where that is not saved, else a clone that
        keeps its place in the graph, so that a second derivative finds its way.
        """
        count, saves = len(self.parameters), self.saves_inplace

        def forward(
            ctx: ElementwiseContext, source: Tensor, x: Tensor, *args: Any
        ) -> Tensor | tuple[Tensor, Tensor]:
            parameters, kernels = args[:count], args[count]
            ctx.kernels, ctx.parameters = kernels, parameters
            ctx.mark_dirty(x)
            if kernels.forward_with_mask_out is None:
                ctx.set_materialize_grads(False)
                ctx.save_for_backward(x if saves == "y" else source)
                call(kernels.forward_out, source, *parameters, out=x)
                return x
            ctx.input_version = version_of(x)
            mask = call(kernels.forward_with_mask_out, x, *parameters, out=x)
            return save_mask(ctx, x, x.shape, dense_stride(x), mask)

        def backward(
            ctx: ElementwiseContext, grad_output: Tensor | None, grad_anchor: Tensor | None = None
        ) -> tuple[Tensor | None, ...]:
            grad = grad_input(self, saves, ctx, grad_output, grad_anchor)
            # Compiled autograd adds the gradients of `source` and `x` up, and cannot add None.
            adds = grad is not None and is_dynamo_compiling()
            of_x = torch.zeros_like(grad) if adds else None  # type: ignore[arg-type]
            return (grad, of_x, *[None] * (count + 1))

        return function_class(self, "InplaceFunction", saves, forward, backward, from_input, 1)

    def recordings(self, kernels: Kernels) -> Recordings:
        def recording(function: type[KernelFunction], with_mask: object, saves: str) -> Recording:
            what = "mask" if with_mask is not None else "y" if saves == "y" else "x"
            return Recording.of(
                function, what, lambda ctx, grad: (grad_input(self, saves, ctx, grad),)
            )

        return Recordings(
            recording(self.Function, kernels.forward_with_mask, self.saves),
            recording(self.InplaceFunction, kernels.forward_with_mask_out, self.saves_inplace),
        )

    def recompute_torch(self, node: Node) -> Callable[[Tensor], Tensor] | None:
        parameters = self.torch_parameters(node)
        return None if parameters is None else lambda x: self.eager.forward(x, *parameters)

    def activate_in_python(self, x: Tensor, *parameters: float, inplace: bool = False) -> Tensor:
        kernels = kernels_for(self, x, *parameters)
        if kernels is self.eager:
            return self.torch_forward(x, *parameters, inplace=inplace)
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        if torch.compiler.is_compiling():
            if inplace:  # backward needs x as it was; Inductor drops the clone
                return x.copy_(self.activate(x.clone(), *parameters))
            if needs_grad or vary(parameters):
                return self.graph_op(x, *parameters, graph_name())
            return kernels.forward(x, *parameters)
        if needs_grad:
            x = unwrap_if_dead(x)
        if not inplace:
            if needs_grad:
                return first(self.Function.apply_kernels(x, *parameters, kernels))
            return call(kernels.forward, x, *parameters)
        # Which leaf or view may be written torch knows, and it raises before it writes; likewise an
        # inference tensor outside inference mode.
        forbidden = x.is_inference() and not torch.is_inference_mode_enabled()
        if forbidden or (needs_grad and (x.is_leaf or is_view(x))):
            return self.torch_forward(x, *parameters, inplace=True)
        if not needs_grad:
            call(kernels.forward_out, x, *parameters, out=x)
            if not x.is_inference():
                increment_version(x)
            return x
        keeps_x = kernels.forward_with_mask_out is None and self.saves_inplace != "y"
        source = x.clone() if keeps_x else x
        return first(self.InplaceFunction.apply_kernels(source, x, *parameters, kernels))

    def raw_ops(self) -> dict[str, RawOp]:
        name, args = self.name, self.signature.removeprefix("Tensor x")
        x, grad_output = f"Tensor x{args}", "Tensor grad_output, Tensor"
        ops = {
            "forward": RawOp(f"{name}({x}) -> Tensor", like_x, check_x),
            "forward_out": RawOp(f"{name}.out({x}, *, Tensor(a!) out) -> ()", nothing, check_x),
        }
        if self.saves == "mask":
            schema = f"{name}_with_mask({x}) -> (Tensor, Tensor)"
            ops["forward_with_mask"] = RawOp(schema, like_x_and_mask, check_x)
            schema = f"{name}_with_mask.out({x}, *, Tensor(a!) out) -> Tensor"
            ops["forward_with_mask_out"] = RawOp(schema, mask_of, check_x)
            schema = f"{name}_backward({grad_output} mask{args}, SymInt[] stride) -> Tensor"
            ops["backward"] = RawOp(schema, like_grad_output, check_masked_backward)
        if self.saves == "x":
            schema = f"{name}_backward({grad_output} x{args}) -> Tensor"
            ops["backward"] = RawOp(schema, like_saved, check_x)
        if self.saves_inplace == "y":
            schema = f"{name}_backward_from_output({grad_output} y{args}) -> Tensor"
            ops["backward_from_output"] = RawOp(schema, like_saved, check_x)
        return ops


def grad_input(
    row: Elementwise,
    saves: str,
    ctx: ElementwiseContext,
    grad_output: Tensor | None,
    grad_anchor: Tensor | None = None,
) -> Tensor | None:
    """The gradient with respect to `x`, itself differentiable under `create_graph=True`.

    None where there is no gradient of `y`, as with torch's own ops, and none of the anchor of
    `save_mask` either.
    """
    if grad_output is None and grad_anchor is None:
        return None
    saved, *anchor = ctx.saved_tensors
    kernels, parameters = ctx.kernels, ctx.parameters
    if grad_output is None:
        return zeros_of_input(ctx, anchor[0])
    differentiable = is_backward_differentiated()
    if kernels.forward_with_mask is not None:
        if differentiable:
            passes = unpack(saved).as_strided(ctx.shape, ctx.stride)
            x = passes.to(grad_output.dtype) * 2 - 1
            return row.torch_backward(grad_output, x, *parameters) + anchor[0].sum()
        return call(kernels.backward, grad_output, saved, *parameters, ctx.stride)
    if saves == "y":
        if differentiable:  # y is in the graph, as the output of this node
            return row.torch_backward_from_output(grad_output, saved, *parameters)
        return call(kernels.backward_from_output, grad_output, saved, *parameters)
    if differentiable:
        return outside(torch_gradient, row, grad_output, saved, parameters)
    return call(kernels.backward, grad_output, saved, *parameters)


def torch_gradient(
    row: Elementwise, grad_output: Tensor, saved: Tensor, parameters: tuple[float, ...]
) -> Tensor:
    """The gradient by torch's own op, in the same graph, but without the hooks that x may have."""
    with torch.enable_grad():
        x = saved.view_as(saved)
        y = row.torch_forward(x, *parameters, inplace=False)
    return torch.autograd.grad(y, x, grad_output, create_graph=torch.is_grad_enabled())[0]
