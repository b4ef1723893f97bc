"""What every activation shares: the `Activation` row, the rule "kernel or torch?", the Functions.

No activation is named here. One call goes `mish(x)` -> `activate(MISH, x)` -> the Function ->
the kernels of the selected backend; whatever the kernels do not take goes to torch's own op.
Compiled, `torch.ops.fused_act.mish` stands in the graph for the Function, see `define_graph_op`.
"""

from __future__ import annotations

import dataclasses
import numbers
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import Node

from fused_act import backends
from fused_act.backends import DTYPES, PLAIN, Kernels, eager
from fused_act.version import __version__

# The ops of `define_graph_op`. Kept here because ops vanish with their Library.
LIBRARY = torch.library.Library("fused_act", "DEF")


def digest(folder: Path) -> str:
    """A checksum of this version and of the Python sources in `folder`."""
    found = zlib.crc32(__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        found = zlib.crc32(path.read_bytes(), found)
    return f"{found:08x}"


SOURCES = digest(Path(__file__).parent)


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """One activation, as the generic code sees it.

    Args:
        name: names the ops (`mish`, `mish_backward`), the Triton pair and the C++ struct.
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
        torch_node: the parameters of a node of the autograd graph that computed torch's own op, or
            None of any other node.

    `eager` and `formula` are kernels made of these torch ops. `graph_op` is the op that stands for
    the Function in a compiled graph, see `define_graph_op`.
    """

    name: str
    torch_forward: Callable[..., Tensor]
    torch_backward: Callable[..., Tensor] | None = None
    torch_backward_from_output: Callable[..., Tensor] | None = None
    forward: Callable[..., Tensor] | None = None
    derivative: Callable[..., Tensor] | None = None
    fuses: Callable[..., bool] = lambda *parameters: False
    parameters: tuple[str, ...] = ()
    saves: Literal["x", "y", "mask"] = "x"
    torch_node: Callable[[Node], tuple[float, ...] | None] = lambda node: None
    eager: Kernels = dataclasses.field(init=False)
    formula: Kernels = dataclasses.field(init=False)
    Function: type[KernelFunction] = dataclasses.field(init=False)
    InplaceFunction: type[KernelFunction] = dataclasses.field(init=False)
    graph_op: OpOverload = dataclasses.field(init=False)

    @property
    def saves_inplace(self) -> str:
        """What the kernels save where `y` takes the place of `x`."""
        return self.saves if self.torch_backward_from_output is None else "y"

    def activate(self, x: Tensor, *parameters: float) -> Tensor:
        return activate(self, x, False, *parameters)

    def __post_init__(self):
        object.__setattr__(self, "eager", eager.kernels(self))
        object.__setattr__(self, "formula", eager.formula(self))
        object.__setattr__(self, "Function", make_function(self))
        object.__setattr__(self, "InplaceFunction", make_inplace_function(self))
        signature = "".join(f", float {parameter}" for parameter in self.parameters)
        object.__setattr__(self, "graph_op", define_graph_op(self, "Tensor x" + signature))


def as_float(op: str, name: str, value: float, largest: float) -> float:
    """The parameter `value` as a float, or an error unless it is at most `largest` in magnitude."""
    # The first test is what a call costs; numbers.Real takes 0.3 us.
    if type(value) is not float and (
        not isinstance(value, numbers.Real) or isinstance(value, bool)
    ):
        raise TypeError(f"{op}: expected {name} to be a float, got {type(value).__name__}")
    if not -largest <= value <= largest:
        raise ValueError(f"{op}: expected {name} between {-largest} and {largest}, got {value}")
    return float(value)


def kernels_for(activation: Activation, x: Tensor, *parameters: float) -> Kernels:
    """The one rule for "kernel or torch?": the kernels that compute `activation` of `x`.

    Under `auto`, plain CUDA tensors of the three dtypes go to the best backend there is and all
    else goes to torch. A forced backend refuses what it does not take, but for transforms and
    forward-mode AD, which no kernel knows. `torch.compile` gets math to fuse, unless a backend is
    forced or a transform is at work (no Function of ours has a rule for one: pytorch#129845,
    #141455, #154284, #187284), and `torch.export` torch's own op, so that ONNX shows one node.
    """
    forced = backends.forced
    if torch.compiler.is_compiling():
        # A name costs compiled code a guard at each call, and a module that is reached through two
        # others one in Python. Before torch 2.12, Dynamo takes `is_exporting()` to be always true.
        if torch.compiler._is_exporting_flag:
            return activation.eager
        if forced is None and not activation.fuses(*parameters):
            return activation.eager
        # Dynamo evaluates this while it traces, and guards on it.
        if is_transformed():
            return activation.eager
        # Opaque ops end fusion: only who asked for a backend gets them in the graph.
        if forced is not None:
            forced.check_input(activation.name, x)
            return forced.kernels[activation.name]
        return activation.formula if type(x) in PLAIN and x.dtype in DTYPES else activation.eager
    if forced is None:
        if type(x) not in PLAIN or not x.is_cuda or x.dtype not in DTYPES:
            return activation.eager
        # These too are plain tensors: sparse and nested ones, and views that negate their memory.
        if x.layout is not torch.strided or x.is_nested or x.is_neg() or is_transformed():
            return activation.eager
        return backends.automatic().kernels[activation.name]
    if is_transformed() or isinstance(x, torch.fx.Proxy):
        return activation.eager
    forced.check_input(activation.name, x)
    return forced.kernels[activation.name]


def is_transformed() -> bool:
    """Whether a functorch transform, forward-mode AD or `torch.jit.trace` is at work."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo would keep the call below in its graph, and keeps no call of this one. It knows the
        # type of the result and not its value, so `is None` would always be false.
        interpreter = torch._C._functorch.peek_interpreter_stack()
        return not isinstance(interpreter, type(None)) or forward_ad._current_level >= 0
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def activate(activation: Activation, x: Tensor, inplace: bool, *parameters: float) -> Tensor:
    """Compute `activation` of `x`, recording it for autograd where `x` requires grad."""
    kernels = kernels_for(activation, x, *parameters)
    if kernels is activation.eager:
        return activation.torch_forward(x, *parameters, inplace=inplace)
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling():
        if inplace:  # backward needs x as it was; Inductor drops the clone
            return x.copy_(activate(activation, x.clone(), False, *parameters))
        if needs_grad:
            return activation.graph_op(x, *parameters, graph_name())
        return kernels.forward(x, *parameters)
    if needs_grad:
        x = torch._C._functorch.unwrap_if_dead(x)  # as torch's own apply does
    if not inplace:
        if needs_grad:
            return first(activation.Function.apply_kernels(x, *parameters, kernels))
        with torch._C._AutoDispatchBelowAutograd():
            return kernels.forward(x, *parameters)
    # Which leaf or view may be written torch knows, and it raises before it writes; likewise an
    # inference tensor outside inference mode.
    forbidden = x.is_inference() and not torch.is_inference_mode_enabled()
    if forbidden or (needs_grad and (x.is_leaf or x._is_view())):
        return activation.torch_forward(x, *parameters, inplace=True)
    if not needs_grad:
        with torch._C._AutoDispatchBelowAutograd():
            kernels.forward_out(x, *parameters, out=x)
        return x
    source = x.clone() if activation.saves_inplace == "x" else x
    return first(activation.InplaceFunction.apply_kernels(source, x, *parameters, kernels))


class NotTraced(type(torch.autograd.Function)):
    """The metaclass of our Functions, which keeps Dynamo from tracing them.

    Dynamo (torch 2.11 to 2.13) takes a class for a Function if its metaclass is exactly torch's,
    and then traces `forward` and `backward` instead of calling `apply`. Of any other class, such as
    one with this metaclass, Dynamo calls `apply`.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], members: dict[str, object]):
        super().__init__(name, bases, members)
        if "activate" not in members:  # a user's subclass, which may compute something else
            cls.__class__ = type(torch.autograd.Function)


class KernelFunction(torch.autograd.Function):
    """A Function that may be given the kernels last, and whose outputs but the first are its own.

    Transforms and forward-mode AD, which it does not know, get torch's own op, and compiled code
    gets what the public function gives it. `apply_kernels` is `apply` without what torch adds for
    functorch, which `kernels_for` has ruled out: 1.3 of 4.4 us.
    """

    apply_kernels: ClassVar[Callable[..., Tensor | tuple[Tensor, ...]]]
    activate: ClassVar[Callable[..., Tensor]]
    torch_forward: ClassVar[Callable[..., Tensor]]
    saves: ClassVar[str]  # as in `Activation`

    def __init_subclass__(cls) -> None:
        cls.apply_kernels = super(torch.autograd.Function, cls).apply

    @classmethod
    def apply(cls, *args: object) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return cls.activate(*args)
        if is_transformed() and isinstance(cls, NotTraced):
            return cls.torch_forward(*args)
        return first(super().apply(*args))


def graph_name() -> str:
    """The name by which the op of `define_graph_op` finds the kernels that `kernels_for` chose.

    The name changes with the sources of this package, because AOTAutograd keeps compiled code on
    disk under the text of a graph, and the text shows this name but not the formula.
    """
    kind = "formula" if backends.forced is None else backends.forced.name
    return f"{kind} {SOURCES}"


def define_graph_op(row, signature: str) -> OpOverload:
    """Define `torch.ops.fused_act.NAME(x, ..., kernels) -> y`, the Function as an op of a graph.

    This op stands for the Function in the graphs that Dynamo makes, so that second derivatives are
    right. Dynamo would trace the backward of a Function with gradients off, and where a compiled
    program is differentiated twice, the second derivative would be 0 (pytorch#91469, #181581).
    Dynamo does not look into an op. AOTAutograd runs the op's implementation, and with it the
    Function and its backward, as eager code does. So the graph that is compiled in the end has the
    ops of the formula or of the kernels, and not this op.
    """

    def implementation(*args):
        *inputs, name = args
        if is_transformed():
            return row.torch_forward(*inputs)
        kind = name.partition(" ")[0]
        table = None if kind == "formula" else backends.get(kind).ready().kernels
        kernels = row.formula if table is None else table[row.name]
        return first(row.Function.apply_kernels(*inputs, kernels))

    schema = f"{row.name}({signature}, str kernels) -> Tensor"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(row.name, implementation, "CompositeImplicitAutograd")
    return getattr(torch.ops.fused_act, row.name).default


def first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def make_function(activation: Activation) -> type[KernelFunction]:
    """The `torch.autograd.Function` of `activation`: `apply(x, *parameters) -> y`."""
    count = len(activation.parameters)

    def forward(ctx, x, *args):
        parameters = args[:count]
        # CUDA's backward runs on engine threads and maybe after `use_backend` has ended.
        kernels = args[count] if len(args) > count else kernels_for(activation, x, *parameters)
        ctx.kernels, ctx.parameters = kernels, parameters
        if kernels.forward_with_mask is None:
            y = call(kernels.forward, x, *parameters)
            ctx.save_for_backward(y if activation.saves == "y" else x)
            return y
        y, mask = call(kernels.forward_with_mask, x, *parameters)
        return save_mask(ctx, y, y.shape, y.stride(), mask)

    def backward(ctx, grad_output, grad_anchor=None):
        grad = grad_input(activation, activation.saves, ctx, grad_output)
        return (grad, *[None] * (count + 1))

    return function_class(activation, "Function", activation.saves, forward, backward)


def make_inplace_function(activation: Activation) -> type[KernelFunction]:
    """The in-place Function: `apply(source, x, *parameters)` writes `x`, which is then returned.

    `source` has the values of `x`. It is `x` itself where that is not saved, else a clone that
    keeps its place in the graph, so that a second derivative finds its way.
    """
    count, saves = len(activation.parameters), activation.saves_inplace

    def forward(ctx, source, x, *args):
        parameters, kernels = args[:count], args[count]
        ctx.kernels, ctx.parameters = kernels, parameters
        ctx.mark_dirty(x)
        if kernels.forward_with_mask_out is None:
            ctx.save_for_backward(x if saves == "y" else source)
            call(kernels.forward_out, source, *parameters, out=x)
            return x
        mask = call(kernels.forward_with_mask_out, x, *parameters, out=x)
        return save_mask(ctx, x, x.shape, dense_stride(x), mask)

    def backward(ctx, grad_output, grad_anchor=None):
        grad = grad_input(activation, saves, ctx, grad_output)
        return (grad, None, *[None] * (count + 1))

    return function_class(activation, "InplaceFunction", saves, forward, backward)


def function_class(
    activation: Activation, kind: str, saves: str, forward, backward
) -> type[KernelFunction]:
    functions = {
        "forward": forward,
        "backward": backward,
        "activate": activation.activate,
        "torch_forward": activation.torch_forward,
    }
    members = {name: staticmethod(function) for name, function in functions.items()}
    members |= {"__module__": __name__, "saves": saves}
    name = activation.name.title().replace("_", "")
    return NotTraced(f"{name}{kind}", (KernelFunction,), members)


def dense_stride(x: Tensor) -> tuple[int, ...]:
    """The stride of `x`, or of its dense copy: a mask is in that order."""
    return (x if x.is_contiguous() else torch.empty_like(x, device="meta")).stride()


def save_mask(
    ctx, y: Tensor, shape: Sequence[int], stride: Sequence[int], mask: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Save all that backward needs of `y = f(x)` but for a second derivative, which is 0.

    `shape` and (dense) `stride` are those of `x`.

    torch returns that 0, where a graph without `x` would say that `x` is not in it. So the node has
    a second output, empty, that leads a second backward to this node and on to `x`.
    """
    ctx.shape, ctx.stride = shape, stride
    if torch.compiler.is_dynamo_compiling():
        ctx.save_for_backward(mask)
        return y
    anchor = y.new_empty(0)
    ctx.save_for_backward(mask, anchor)
    ctx.set_materialize_grads(False)
    return y, anchor


def call(op, *args, **kwargs):
    """Call an op from within a Function, below Autograd, where raw ops refuse to be differentiated.

    The guard saves 2 us; Dynamo neither knows nor needs it.
    """
    if torch.compiler.is_dynamo_compiling():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def grad_input(activation: Activation, saves: str, ctx, grad_output: Tensor | None) -> Tensor:
    """The gradient with respect to `x`, itself differentiable under `create_graph=True`."""
    saved, *anchor = ctx.saved_tensors
    kernels, parameters = ctx.kernels, ctx.parameters
    if grad_output is None:
        return zeros_of_input(ctx, anchor[0])
    differentiable = is_backward_differentiated()
    if kernels.forward_with_mask is not None:
        if differentiable:
            passes = unpack(saved).as_strided(ctx.shape, ctx.stride)
            x = passes.to(grad_output.dtype) * 2 - 1
            return activation.torch_backward(grad_output, x, *parameters) + anchor[0].sum()
        return call(kernels.backward, grad_output, saved, *parameters, ctx.stride)
    if saves == "y":
        if differentiable:  # y is in the graph, as the output of this node
            return activation.torch_backward_from_output(grad_output, saved, *parameters)
        return call(kernels.backward_from_output, grad_output, saved, *parameters)
    if differentiable:
        with torch.enable_grad():
            x = saved.view_as(saved)  # in the same graph, but without the hooks that x may have
            y = activation.torch_forward(x, *parameters, inplace=False)
        create_graph = torch.is_grad_enabled()
        return torch.autograd.grad(y, x, grad_output, create_graph=create_graph)[0]
    return call(kernels.backward, grad_output, saved, *parameters)


def is_backward_differentiated() -> bool:
    """Whether the backward that runs is itself to be differentiated."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def zeros_of_input(ctx, anchor: Tensor) -> Tensor:
    """The gradient where a second backward came in through the anchor of `save_mask` alone."""
    return torch.zeros(ctx.shape, dtype=anchor.dtype, device=anchor.device)


def unpack(mask: Tensor) -> Tensor:
    """The bits of `mask` as bools, eight times as many along its last dimension."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten(-2).bool()
