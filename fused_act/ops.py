"""Defines the raw ops: two namespaces, one per kernel backend, with the same ops.

`torch.ops.fused_act_cuda.*` gets its kernels from csrc/register.cu, `torch.ops.fused_act_triton.*`
from backends/triton. Each family says which raw ops its rows have. The raw ops are what the
Functions call and what a graph shows; they have no derivative, so they refuse an input that
requires grad. (`torch.ops.fused_act.*` are other ops, see `families.base.define_graph_op`.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_act import libraries
from fused_act._torch_private import (
    OpOverload,
    always_recomputed_ops,
    below_autograd,
    below_inplace_or_view,
    is_forward_ad_active,
)
from fused_act.activations import ROWS
from fused_act.dispatch import Kernels
from fused_act.families.compiled import SOURCES
from fused_act.families.raw_op import RawOp

# The layout contract is in the fakes: Inductor must not pass or expect other strides.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def is_differentiated(x: Tensor) -> bool:
    """Whether reverse-mode or forward-mode AD follows `x`."""
    if is_forward_ad_active() and forward_ad.unpack_dual(x).tangent is not None:
        return True
    return torch.is_grad_enabled() and x.requires_grad


def refuse_autograd(
    op: OpOverload, public: str, check: Callable[..., None] = lambda *args: None
) -> Callable[..., Any]:
    """The Autograd kernel of a raw op: check what users pass in; never lose a gradient silently."""
    name = op.name()

    def autograd(*args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if any(is_differentiated(tensor) for tensor in tensors):
            raise RuntimeError(
                f"{name} has no derivative; call fused_act.{public}, which is differentiable, or "
                "wrap the call in torch.no_grad()"
            )
        check(*args, **kwargs)
        with below_autograd():
            return op(*args, **kwargs)

    return autograd


def bump_version(op: OpOverload, *args: Any, out: Tensor, **kwargs: Any) -> Any:
    """The ADInplaceOrView kernel of an out op: autograd must learn that `out` has changed.

    Without it a later backward through `out` gets a wrong gradient in silence.
    """
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{op.name()}: out is an inference tensor, outside inference mode")
    increment_version(out)
    with below_inplace_or_view():
        return op(*args, out=out, **kwargs)


def define(namespace: str, device_types: tuple[str, ...]) -> None:
    """Define every op in `namespace`, with its fake and what guards it."""
    library = libraries.library(namespace)
    for row in ROWS.values():
        for field, raw_op in row.raw_ops().items():
            if libraries.is_defined(namespace, raw_op.name):
                continue  # this package is imported again
            library.define(raw_op.schema, tags=TAGS)
            op = overload(namespace, raw_op.name)
            torch.library.register_fake(f"{namespace}::{raw_op.name}", raw_op.allocate, lib=library)
            check = functools.partial(raw_op.check, op.name(), (*device_types, "meta"))
            library.impl(raw_op.name, refuse_autograd(op, row.name, check), "Autograd")
            if field.endswith("_out"):
                library.impl(raw_op.name, functools.partial(bump_version, op), "ADInplaceOrView")
                # Selective checkpointing keeps what an op returns and then skips the op: it would
                # leave `out` as it was, and gradients wrong. This one is always computed again.
                always_recomputed_ops.add(op)
            elif raw_op.floats:
                define_with_tensors(library, row.name, raw_op)


def define_with_tensors(library: torch.library.Library, public: str, raw_op: RawOp) -> None:
    """The overload that takes its floats as fp64 tensors, see `families.compiled.with_tensors`."""
    name, floats = f"{raw_op.name}.Tensor", raw_op.floats
    op = overload(library.ns, raw_op.name)

    def implementation(*args: Any) -> Any:
        return op(*(arg.item() if i in floats else arg for i, arg in enumerate(args)))

    library.define(
        raw_op.schema.replace("(", ".Tensor(", 1).replace("float ", "Tensor "), tags=TAGS
    )
    torch.library.register_fake(f"{library.ns}::{name}", raw_op.allocate, lib=library)
    library.impl(name, refuse_autograd(overload(library.ns, name), public), "Autograd")
    library.impl(name, implementation, "CompositeExplicitAutograd")


def implement(namespace: str, device_type: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Give the raw ops, by name, their kernels for `device_type`.

    Those of another import of this package stay, unless the sources have changed.
    """
    implemented = libraries.kept(namespace, "implemented", dict)
    for name, kernel in kernels.items():
        if implemented.get((name, device_type)) != SOURCES:
            library = libraries.library(namespace)
            library.impl(name, kernel, device_type.upper(), allow_override=True)
            implemented[name, device_type] = SOURCES


def overload(namespace: str, name: str) -> OpOverload:
    """The op `name` ("mish", "mish.out") of `namespace`."""
    packet, _, overload_name = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload_name or "default")


def kernels(namespace: str) -> dict[str, Kernels]:
    """The ops of `namespace` as `Kernels`, by the name of a row."""
    return {
        name: Kernels(
            **{field: overload(namespace, op.name) for field, op in row.raw_ops().items()}
        )
        for name, row in ROWS.items()
    }


define("fused_act_cuda", ("cuda",))
define("fused_act_triton", ("cuda", "cpu"))
