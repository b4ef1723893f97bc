"""What every family shares: the `Row`, the rule "kernel or torch?", the Functions.

No activation and no family is named here. One eager call goes `mish(x)` -> the row -> the host path
in C++ (see `fused_act.host`) -> a kernel of the selected backend. What C++ does not take goes on in
Python: -> the Function -> a kernel, or torch's own op. Without the host extension all calls do so.
Compiled, `torch.ops.fused_act.mish` stands in the graph for the Function, see `define_graph_op`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.compiler import is_dynamo_compiling

from fused_act import dispatch
from fused_act._torch_private import (
    below_inplace_or_view,
    is_exporting,
    is_forward_ad_active,
    is_transformed,
)
from fused_act.dispatch import DTYPES, PLAIN, Kernels
from fused_act.families.compiled import define_graph_op, first, holds
from fused_act.families.raw_op import RawOp
from fused_act.families.recording import Recordings

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One activation, as the generic code sees it. A family is a subclass.

    Args:
        name: names the raw ops (`leaky_relu`, `leaky_relu_backward`), the op of a compiled graph
            and the Triton functions.
        spelling: names the public Function (`LeakyReLUFunction`) and the C++ struct (`LeakyReLU`).
        torch_node: the name of the node that torch's own op makes in the autograd graph, if
            `rematerialize` may compute its output again.

    `eager` are kernels made of torch's own ops, and `formula` those that `torch.compile` gets to
    fuse, if there are any. `Function` records a call for autograd. `graph_op` is the op that stands
    for the Function in a compiled graph.
    """

    name: str
    spelling: str
    torch_node: str | None = None
    eager: Kernels = dataclasses.field(init=False)
    # `Any` stands for None: where it is called `fuses` has said that it is there.
    formula: Kernels | Any = dataclasses.field(init=False, default=None)
    Function: type[KernelFunction] = dataclasses.field(init=False)
    graph_op: Callable[..., Tensor] = dataclasses.field(init=False)

    family: ClassVar[str]  # the name of its modules

    if TYPE_CHECKING:  # a subclass has them, as a field, a method or a property

        @property
        def torch_forward(self) -> Callable[..., Tensor]:
            """`torch_forward(x, ...) -> y`, in torch's own ops."""

        @property
        def signature(self) -> str:
            """Of the public function, out of place: "Tensor x, float negative_slope"."""

    def __post_init__(self) -> None:
        self.define("eager", self.make_eager())
        self.define("Function", self.make_function())
        self.define("graph_op", define_graph_op(self))

    def define(self, field: str, value: object) -> None:
        """Set a field that follows from the others."""
        object.__setattr__(self, field, value)

    @property
    def pair(self) -> Row:
        """The row whose Triton functions and C++ struct the kernels take."""
        return self

    def fuses(self, *parameters: float) -> bool:
        """Whether `torch.compile` gets `formula` rather than torch's own ops."""
        return False

    def recompute_torch(self, node: Node) -> Callable[[Tensor], Tensor] | None:
        """How the output of torch's own op is computed again, from the input that `node` saves.

        None where `node`, which is called `torch_node`, computed something else.
        """
        raise NotImplementedError

    def make_eager(self) -> Kernels:
        raise NotImplementedError

    def make_function(self) -> type[KernelFunction]:
        raise NotImplementedError

    def raw_ops(self) -> dict[str, RawOp]:
        """The raw ops, keyed by the field of `Kernels` that calls them."""
        raise NotImplementedError

    def recordings(self, kernels: Kernels) -> Recordings:
        """How C++ records what the Functions do with these kernels."""
        raise NotImplementedError

    def activate(self, x: Tensor, *args: Any, inplace: bool = False) -> Tensor:
        """Compute the activation of `x`, recording it for autograd where that needs a gradient.

        `args` are the weight or the parameters, and `inplace` is for rows that have such a way.
        """
        if not is_dynamo_compiling():
            path = (dispatch.forced or dispatch.settled).paths.get(self.name)
            if path is not None:
                y = path(x, inplace, args)
                if y is not NotImplemented:
                    return y  # type: ignore[no-any-return] # C++ has no types
        return self.activate_in_python(x, *args, inplace=inplace)

    def activate_in_python(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Likewise where C++ does not. Apart, because a small function is fast where it is cold."""
        raise NotImplementedError


def kernels_for(row: Row, x: Tensor, *parameters: float) -> Kernels:
    """The one rule for "kernel or torch?": the kernels that compute `row` of `x`.

    Under `auto`, plain CUDA tensors of the three dtypes go to the best backend there is and all
    else goes to torch. A forced backend refuses what it does not take, but for transforms and
    forward-mode AD, which no kernel knows. `torch.compile` gets math to fuse, unless a backend is
    forced or a transform is at work (no Function of ours has a rule for one: pytorch#129845,
    #141455, #154284, #187284), and `torch.export` torch's own op, so that ONNX shows one node.
    """
    forced = dispatch.forced
    if torch.compiler.is_compiling():
        # Each name costs compiled code a guard at each call; these two calls hide torch's own.
        if is_exporting():
            return row.eager
        if forced is None and not row.fuses(*parameters):
            return row.eager
        # Dynamo evaluates this while it traces, and guards on it.
        if is_transformed():
            return row.eager
        # Opaque ops end fusion: only who asked for a backend gets them in the graph.
        if forced is not None:
            forced.check_input(row.name, x)
            return forced.kernels[row.name] if forced.device_types else row.eager
        return row.formula if type(x) in PLAIN and x.dtype in DTYPES else row.eager
    if forced is None:
        if type(x) not in PLAIN or not x.is_cuda or x.dtype not in DTYPES:
            return row.eager
        # These too are plain tensors: sparse and nested ones, and views that negate their memory.
        if x.layout is not torch.strided or x.is_nested or x.is_neg() or is_transformed():
            return row.eager
        best = dispatch.automatic()
        return best.kernels[row.name] if best.device_types else row.eager
    if is_transformed() or isinstance(x, torch.fx.Proxy):
        return row.eager
    forced.check_input(row.name, x)
    return forced.kernels[row.name] if forced.device_types else row.eager


class NotTraced(type(torch.autograd.Function)):  # type: ignore[misc] # mypy wants a name
    """The metaclass of our Functions, which keeps Dynamo from tracing them.

    Dynamo (torch 2.11 to 2.13) takes a class for a Function if its metaclass is exactly torch's,
    and then traces `forward` and `backward` instead of calling `apply`. Of any other class, such as
    one with this metaclass, Dynamo calls `apply`.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], members: dict[str, object]):
        super().__init__(name, bases, members)
        # A user's subclass may compute something else.
        if not isinstance(members.get("row"), Row):
            # The metaclass of a class may change, which mypy does not know.
            cls.__class__ = type(torch.autograd.Function)  # type: ignore[assignment]


def is_ours(function: type[torch.autograd.Function]) -> TypeGuard[type[KernelFunction]]:
    """Whether `function` is one of the Functions of this package, and no subclass of a user's."""
    return isinstance(function, NotTraced)


class Context(Protocol):
    """What the `forward` and the `backward` of a Function get first. In torch it has no type."""

    kernels: Kernels
    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_dirty(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class KernelFunction(torch.autograd.Function):
    """A Function that may be given the kernels last, and whose outputs but the first are its own.

    Transforms and forward-mode AD, which it does not know, get torch's own op, and compiled code
    gets what the public function gives it. `apply_kernels` is `apply` without what torch adds for
    functorch, which `kernels_for` has ruled out: 1.3 of 4.4 us.

    Attributes:
        row: the row that it computes.
        saves: what the kernels save for backward: "x", "y" or a "mask".
        writes: how often a call writes what it returns: once in place, else not at all.
        recompute: how the output is computed again from the input that a node of this Function had,
            `recompute(node) -> (x -> y)`. Such a node saves the input, or a mask and the input's
            version. None where the output is not computed again.
    """

    apply_kernels: ClassVar[Callable[..., Tensor | tuple[Tensor, ...]]]
    row: ClassVar[Row]
    saves: ClassVar[str]
    writes: ClassVar[int] = 0
    recompute: ClassVar[Callable[[Any], Callable[[Tensor], Tensor]] | None] = None

    def __init_subclass__(cls) -> None:
        # That of C++, which torch's stubs leave out.
        cls.apply_kernels = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return cls.row.activate(*args)
        if is_transformed() and is_ours(cls):
            return cls.row.torch_forward(*args)
        return first(super().apply(*args))  # type: ignore[no-untyped-call]


def function_class(
    row: Row,
    kind: str,
    saves: str,
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    recompute: Callable[..., Callable[[Tensor], Tensor]] | None = None,
    writes: int = 0,
) -> type[KernelFunction]:
    """The Function of `row`, called by its spelling and `kind`; the others are as in the class."""
    functions: dict[str, Callable[..., Any]] = {"forward": forward, "backward": backward}
    if recompute is not None and saves != "y":
        functions["recompute"] = recompute
    members: dict[str, Any] = {name: staticmethod(function) for name, function in functions.items()}
    # Where users find the public ones, and pickle does.
    members |= {"__module__": "fused_act", "row": row, "saves": saves, "writes": writes}
    return NotTraced(row.spelling + kind, (KernelFunction,), members)


def from_input(node: Any) -> Callable[[Tensor], Tensor]:
    """`recompute` of a Function whose kernels take the input and the float parameters."""
    forward, parameters = node.kernels.forward, node.parameters
    return lambda x: forward(x, *parameters)


def call(op: Callable[..., Result] | None, *args: Any, **kwargs: Any) -> Result:
    """Call an op from within a Function, below Autograd, where raw ops refuse to be differentiated.

    Below ADInplaceOrView too: the Function itself tells autograd what it has written. The guard
    saves 2 us; Dynamo neither knows nor needs it. A kernel that a row does not need is not called,
    so `op` is None in its type alone.
    """
    if torch.compiler.is_dynamo_compiling():
        return op(*args, **kwargs)  # type: ignore[misc]
    with below_inplace_or_view():
        return op(*args, **kwargs)  # type: ignore[misc]


def is_backward_differentiated() -> bool:
    """Whether the backward that runs is itself to be differentiated."""
    return torch.is_grad_enabled() or is_forward_ad_active()


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, but no op where there is nothing to convert.

    Before torch 2.12, Dynamo loses the gradient of a Function whose forward has such a no-op.
    """
    return x if x.dtype is dtype else x.to(dtype)


def as_float(op: str, name: str, value: float, largest: float) -> float:
    """The parameter `value` as a float, or an error unless it is at most `largest` in magnitude."""
    # The first test is what a call costs; numbers.Real takes 0.3 us.
    if type(value) is not float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{op}: expected {name} to be a float, got {type(value).__name__}")
        if not isinstance(value, int):
            value = float(value)  # the bound has no place in NumPy's float16
    if not holds(abs(value) <= largest):
        raise ValueError(f"{op}: expected {name} between {-largest} and {largest}, got {value}")
    return float(value)
