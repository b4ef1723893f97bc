"""What all imports of this package in a process share: op libraries and torch's own functions.

The package may be imported again: notebooks, hot reload and test runners take it out of
`sys.modules`. torch allows one library for a namespace, and code of the first import may still call
its ops. So `torch.ops` keeps what the first import has made, and the next one takes that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def kept(namespace: str, name: str, make: Callable[[], Any]) -> Any:
    """What is kept with the ops of `namespace` under `name`; the first import makes it."""
    ops = getattr(torch.ops, namespace)
    if name not in vars(ops):
        setattr(ops, name, make())
    return vars(ops)[name]


def library(namespace: str) -> torch.library.Library:
    """The library that defines the ops of `namespace`."""
    found: torch.library.Library = kept(
        namespace, "library", lambda: torch.library.Library(namespace, "DEF")
    )
    return found


def is_defined(namespace: str, name: str) -> bool:
    """Whether `namespace` has the op `name` ("mish", "mish.out")."""
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    return found is not None and (overload or "default") in found.overloads()


def own(name: str) -> Callable[..., Tensor]:
    """torch's own function ("nn.functional.mish"), as the first import found it.

    Users put ours in its place (`F.mish = fused_act.mish`), which must still find torch's own.
    """
    functions = kept("fused_act", "torch_functions", dict)
    if name not in functions:
        functions[name] = operator.attrgetter(name)(torch)
    return functions[name]  # type: ignore[no-any-return]
