"""What families need under `torch.compile`: the ops of a graph, and parameters that vary.

Dynamo runs the code of this package to make a graph. AOTAutograd then runs that graph to make the
one that is compiled, in which `define_graph_op` is gone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fused_act import dispatch, libraries
from fused_act._torch_private import OpOverload, is_transformed
from fused_act.dispatch import Kernels
from fused_act.version import __version__

Result = TypeVar("Result")


def digest(folder: Path) -> str:
    """A checksum of this version and of the Python sources in `folder`."""
    found = zlib.crc32(__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        found = zlib.crc32(path.read_bytes(), found)
    return f"{found:08x}"


SOURCES = digest(Path(__file__).parent.parent)


class GraphRow(Protocol):
    """What `define_graph_op` asks of a row."""

    @property
    def name(self) -> str: ...
    @property
    def formula(self) -> Any: ...
    @property
    def Function(self) -> Any: ...
    @property
    def torch_forward(self) -> Callable[..., Tensor]: ...
    @property
    def signature(self) -> str: ...


def graph_name() -> str:
    """The name by which the op of `define_graph_op` finds the kernels that `kernels_for` chose.

    The name changes with the sources of this package, because AOTAutograd keeps compiled code on
    disk under the text of a graph, and the text shows this name but not the formula.
    """
    kind = "formula" if dispatch.forced is None else dispatch.forced.name
    return f"{kind} {SOURCES}"


def define_graph_op(row: GraphRow) -> OpOverload:
    """Define `torch.ops.fused_act.NAME(x, ..., kernels) -> y`, the Function as an op of a graph.

    This op stands for the Function in the graphs that Dynamo makes, so that second derivatives are
    right. Dynamo would trace the backward of a Function with gradients off, and where a compiled
    program is differentiated twice, the second derivative would be 0 (pytorch#91469, #181581).
    Dynamo does not look into an op. AOTAutograd runs the op's implementation, and with it the
    Function and its backward, as eager code does. So the graph that is compiled in the end has the
    ops of the formula or of the kernels, and not this op.
    """
    # An op that another import of this package has defined stays, and runs the rows of the sources
    # that its caller names.
    rows = libraries.kept("fused_act", "rows", dict)
    rows[row.name, SOURCES] = row

    def implementation(*args: Any) -> Tensor:
        *inputs, name = args
        kind, _, sources = name.partition(" ")
        row = rows[op_name, sources]
        if is_transformed():
            return row.torch_forward(*inputs)  # type: ignore[no-any-return]
        if kind == "formula":
            kernels = row.formula
        else:
            kernels = dispatch.BACKENDS[kind].ready().kernels[op_name]
            if any(isinstance(each, torch.SymFloat) for each in inputs):
                kernels = with_tensors(kernels)
        return first(row.Function.apply_kernels(*inputs, kernels))

    op_name = row.name
    if not libraries.is_defined("fused_act", op_name):
        library = libraries.library("fused_act")
        # A symbol that is given for a float becomes a constant; one for a Scalar stays.
        signature = row.signature.replace("float ", "Scalar ")
        schema = f"{op_name}({signature}, str kernels) -> Tensor"
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op_name, implementation, "CompositeImplicitAutograd")
    return getattr(torch.ops.fused_act, op_name).default


def first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


# Parameters that vary. Dynamo takes a float that differs between two calls for a symbol, and each
# question that Python asks about it for a guard, which compiles the code again for other values.


def is_known(condition: bool) -> bool:
    """Whether `condition` holds; of a parameter that varies, whether it holds for all values."""
    if torch.compiler.is_dynamo_compiling() or isinstance(condition, torch.SymBool):
        return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)
    return condition


def holds(condition: bool) -> bool:
    """Whether `condition`, which all but absurd values fulfil, holds.

    Of a parameter that varies it becomes a guard, and it is taken to hold of one that is known only
    when the code runs, as `tensor.item()` is.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.fx.experimental.symbolic_shapes.guard_or_true(condition)
    return condition


def vary(parameters: tuple[float, ...]) -> bool:
    """Whether one of `parameters` varies in the code that is being compiled."""
    has_static_value = torch.fx.experimental.symbolic_shapes.has_static_value
    return not all(has_static_value(parameter) for parameter in parameters)


def with_tensors(kernels: Kernels) -> Kernels:
    """The raw ops out of place, with parameters that vary given as tensors.

    AOTAutograd makes a constant of each float that an op takes, and so compiles the code again for
    each value (pytorch#171320). It puts a tensor in the place of a float that is multiplied.
    """

    def overload(op: Any) -> Any:
        found: Any = None if op is None else getattr(op.overloadpacket, "Tensor", None)
        if found is None:
            return None

        def call(*args: Any) -> Any:
            one: Any = torch.ones((), dtype=torch.float64)
            return found(*(one * x if isinstance(x, torch.SymFloat) else x for x in args))

        return call

    return Kernels(*map(overload, kernels))


def outside(function: Callable[..., Result], *args: Any) -> Result:
    """Call `function` as eager code, also while Dynamo traces.

    Dynamo traces a backward for compiled autograd (pytorch#183603). It would leave a graph before
    `torch.autograd.grad` and go on behind it, and the graph between inputs and outputs is lost.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.disable(function)(*args)  # type: ignore[no-any-return]
    return function(*args)
