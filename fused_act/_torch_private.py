"""Every private name of torch that this package uses, and what happens where torch lacks it.

None of these names has a public counterpart that does the same. A torch without one of the names
that `required` looks up cannot import this package, and the error says which name it is. What a
node of the autograd graph keeps is read by name when it is asked for: `saved`, `raw_saved` and
`forward_class` say what they do where a node has no such name.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import Node


def required(path: str) -> Any:
    """What `path` names in torch.

    Raises:
        ImportError: this torch has no such name.
    """
    try:
        return operator.attrgetter(path)(torch)
    except AttributeError:
        raise ImportError(
            f"fused_act needs torch.{path}, which torch {torch.__version__} does not have; "
            "fused_act is tested with torch 2.11 and 2.13"
        ) from None


# The type of an op of `torch.ops` with its overload, for annotations.
OpOverload = required("_ops.OpOverload")
# Context managers: ops that are called within one skip the keys down to Autograd, or down to
# ADInplaceOrView, which is the next one.
below_autograd = required("_C._AutoDispatchBelowAutograd")
below_inplace_or_view = required("_C._AutoDispatchBelowADInplaceOrView")
# Takes the wrapper off a tensor whose functorch transform is over, as torch's own `apply` does.
unwrap_if_dead = required("_C._functorch.unwrap_if_dead")
# Ops that selective checkpointing always computes again.
always_recomputed_ops = required("utils.checkpoint.SAC_IGNORED_OPS")

# For the functions below.
peek_interpreter_stack = required("_C._functorch.peek_interpreter_stack")
are_transforms_active = required("_C._are_functorch_transforms_active")
tracing_state = required("_C._get_tracing_state")
required("autograd.forward_ad._current_level")  # read anew at each call
required("compiler._is_exporting_flag")  # likewise


def is_exporting() -> bool:
    """Whether `torch.export` is at work.

    Before torch 2.12, Dynamo takes the public `torch.compiler.is_exporting()` to be always true.
    """
    return torch.compiler._is_exporting_flag


def is_transformed() -> bool:
    """Whether a functorch transform, forward-mode AD or `torch.jit.trace` is at work."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo would keep a call of `are_transforms_active` in its graph, and keeps no call of
        # this one. Dynamo knows the type of the result and not its value, so `is None` would always
        # be false.
        interpreter = peek_interpreter_stack()
        return not isinstance(interpreter, type(None)) or forward_ad._current_level >= 0
    return are_transforms_active() or forward_ad._current_level >= 0 or tracing_state() is not None


def is_forward_ad_active() -> bool:
    """Whether the code runs within `torch.autograd.forward_ad.dual_level()`."""
    return forward_ad._current_level >= 0


def is_view(x: Tensor) -> bool:
    """Whether autograd takes `x` for a view of another tensor."""
    return x._is_view()


def base_of(x: Tensor) -> Tensor:
    """The tensor that `x` is a view of, or `x` itself."""
    return x._base if x._is_view() else x  # type: ignore[return-value] # a view has a base


def version_of(x: Tensor) -> int:
    """How many times autograd has seen `x` being written; -1 of an inference tensor."""
    return -1 if x.is_inference() else x._version


def forward_class(node: Node) -> type[torch.autograd.Function] | None:
    """The `torch.autograd.Function` whose `apply` made `node`, or None for a node of torch's own.

    Without the name in torch, every node would look like one of torch's own, and `rematerialize`
    would compute nothing of ours again.
    """
    return getattr(node, "_forward_cls", None)


def saved(node: Node, name: str) -> Any:
    """What a node of torch's own op saves under `name`.

    Raises:
        AttributeError: the node saves nothing of that name.
        RuntimeError: the node has let go of it.
    """
    return getattr(node, f"_saved_{name}")


def raw_saved(node: Node, name: str = "") -> Any:
    """Likewise as a `SavedTensor`, whose hooks do not run.

    Without a name it is what a Function of Python passed to `save_for_backward`, a tuple.
    """
    return getattr(node, f"_raw_saved_{name}" if name else "_raw_saved_tensors")
