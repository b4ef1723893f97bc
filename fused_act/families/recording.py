"""What the host path in C++ has to know of a row, see `fused_act.host`. No family is named here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Recording(NamedTuple):
    """How C++ records a call for autograd: the node does what that of a Function does.

    Args:
        node: the name of the node.
        saves: what it saves for backward: "x", "y" or a "mask"; and the weight, if there is one.
        function: the Function in whose place it is.
        formula: `formula(grad_output, **context)`, the gradients of the tensors that are passed in,
            for a backward that is differentiated; `context` has the attributes of the Function's
            context.
    """

    node: str
    saves: str
    function: type[torch.autograd.Function]
    formula: Callable[..., tuple[Tensor | None, ...]]

    @classmethod
    def of(
        cls,
        function: type[torch.autograd.Function],
        saves: str,
        gradients: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
    ) -> Recording:
        """That in whose place `gradients(ctx, grad_output)` is what backward returns."""

        def formula(grad_output: Tensor, **context: Any) -> tuple[Tensor | None, ...]:
            return gradients(SimpleNamespace(**context), grad_output)

        return cls(f"{function.__name__}Backward", saves, function, formula)


class Recordings(NamedTuple):
    """How C++ records the calls of a row, and what it has to know of a weight.

    Args:
        out_of_place, in_place: None where the row has no such way.
        takes_fp32, autocasts: as in `Weighted`.
    """

    out_of_place: Recording
    in_place: Recording | None = None
    takes_fp32: bool = False
    autocasts: bool = False
