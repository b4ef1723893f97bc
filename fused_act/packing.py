"""What the hooks of `rematerialize` make of a tensor that is saved, in Python.

csrc/host/packing.h has the same types and functions, for less time, and takes the place of this
module where the host extension is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from fused_act._torch_private import base_of, version_of
from fused_act.dispatch import PLAIN

LOCK = threading.RLock()
RECOMPUTED = "fused_act.rematerialize"  # the key in a node's metadata, in C++ as well


class Kept:
    """A tensor that is saved as ever, and must not have been changed when it is needed.

    With hooks, torch does not look for changes. Detached, or an op that saves its own output would
    keep itself alive.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()
        self.version = version_of(tensor)

    def get(self) -> Tensor:
        version = version_of(self.tensor)
        if version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self.tensor.type()} {list(self.tensor.shape)}] is at "
                f"version {version}; expected version {self.version} instead"
            )
        return self.tensor


class Recomputed:
    """A tensor that is computed from `source` when it is needed, once for all who need it."""

    def __init__(self, compute: Callable[[Tensor], Tensor], source: Packed, version: int):
        self.compute, self.source, self.version = compute, source, version
        self.users = self.waiting = 0
        self.value: Tensor | None = None
        add_user(source)

    def get(self) -> Tensor:
        with LOCK:
            if self.value is None:
                self.value = self.compute(self.source.get())
                self.waiting = self.users
            value = self.value
            self.waiting -= 1
            if self.waiting <= 0:
                self.value = None
            return value


class View:
    """A view of a tensor that is computed again."""

    def __init__(self, base: Recomputed, view: Tensor):
        self.base = base
        self.layout = view.size(), view.stride(), view.storage_offset()

    def get(self) -> Tensor:
        return self.base.get().as_strided(*self.layout)


Packed = Kept | Recomputed | View
How = tuple[Callable[[Tensor], Tensor], Packed]  # a tensor is `compute(source)`


def add_user(packed: Packed) -> None:
    """One more will need what is computed again."""
    if isinstance(packed, View):
        packed = packed.base
    if isinstance(packed, Recomputed):
        packed.users += 1


class Pack:
    """The hook that packs.

    Args:
        may_recompute: `may_recompute(node, norm)`, whether outputs of nodes of the type of `node`
            may be computed again.
        recompute: `recompute(node, y, norm) -> compute, source`, how the output `y` of `node` is,
            or None if it is not.
        check_bits: whether an output has the same bits the second time. `recompute` calls it; C++
            has rules of its own for norms, which call it, too.
        norm: passed on to both.
    """

    def __init__(
        self,
        may_recompute: Callable[[Node, bool], bool],
        recompute: Callable[[Node, Tensor, bool], How | None],
        check_bits: Callable[[str, Tensor, Tensor], bool],
        norm: bool,
    ):
        self.may_recompute, self.recompute, self.norm = may_recompute, recompute, norm

    def __call__(self, tensor: Tensor) -> Packed:
        base = base_of(tensor)
        found = None
        if base.grad_fn is not None and base.output_nr == 0 and is_layout_of(base, tensor):
            found = self.recomputed(base.grad_fn, base)
        if found is None:
            return Kept(tensor)
        packed = found if base is tensor else View(found, tensor)
        add_user(packed)
        return packed

    def recomputed(self, node: Any, y: Tensor) -> Recomputed | None:
        """`y`, computed again, if there is a way, and the same for all who save it."""
        if not self.may_recompute(node, self.norm):
            return None
        known: Recomputed | None = node.metadata.get(RECOMPUTED, lambda: None)()
        if known is not None:  # but for a y that was written since
            return known if known.version == version_of(y) else None
        how = self.recompute(node, y, self.norm)
        if how is None:
            return None
        found = Recomputed(*how, version_of(y))
        node.metadata[RECOMPUTED] = weakref.ref(found)
        return found


def is_layout_of(base: Tensor, view: Tensor) -> bool:
    """Whether size, stride and offset are enough to make `view` out of `base`.

    They are not for a view that negates or conjugates what it reads, such as `z.conj().imag`, whose
    gradient then has the wrong sign (pytorch#184379), that reads another dtype, or that belongs to
    a subclass.
    """
    return (
        type(view) in PLAIN
        and type(base) in PLAIN
        and view.dtype is base.dtype
        and not (view.is_neg() or view.is_conj())
    )


def unpack(packed: Packed) -> Tensor:
    """The hook that unpacks."""
    return packed.get()
