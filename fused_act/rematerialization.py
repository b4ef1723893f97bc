"""`rematerialize`: what can be computed again from what is saved anyway is not saved for backward.

An activation's output is the next layer's input, which that layer saves. Mish and Swish save their
own input too, so the output can be computed from it again: the same kernel on the same input gives
the same bits. Everything rests on `torch.autograd.graph.saved_tensors_hooks` and on what a node of
the graph tells of itself.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from fused_act._torch_private import (
    base_of,
    forward_class,
    is_transformed,
    raw_saved,
    saved,
    version_of,
)
from fused_act.activations import ROWS
from fused_act.dispatch import PLAIN
from fused_act.families.base import is_ours

LOCK = threading.RLock()
RECOMPUTED = "fused_act.rematerialize"  # the key in a node's metadata
ROWS_BY_NODE = {row.torch_node: row for row in ROWS.values() if row.torch_node is not None}
# Whether a norm's output, computed again, has the same bits, by what could make a difference.
SAME_BITS: dict[tuple[object, ...], bool] = {}


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
    """A tensor that is computed when it is needed, out of `sources`, once for all who need it."""

    def __init__(self, compute: Callable[..., Tensor], sources: list[Packed]):
        self.compute, self.sources = compute, sources
        self.users = self.waiting = 0
        self.value: Tensor | None = None
        for source in sources:
            if isinstance(source, Recomputed):
                source.users += 1

    def get(self) -> Tensor:
        with LOCK:
            if self.value is None:
                self.value = self.compute(*(source.get() for source in self.sources))
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


def pack(tensor: Tensor, norm: bool) -> Packed:
    base = base_of(tensor)
    recomputed = None
    # A write bumps the version; those that autograd sees also change grad_fn.
    if is_layout_of(base, tensor) and version_of(base) == 0 and base.grad_fn is not None:
        recomputed = recompute(base, norm)
    if recomputed is None:
        return Kept(tensor)
    recomputed.users += 1
    return recomputed if base is tensor else View(recomputed, tensor)


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
    return packed.get()


def peek(node: Node, field: str = "") -> Packed:
    """What `pack` made of the tensor that `node` saves as `field`; computes none again.

    Without a field it is the one tensor that a Function saves.

    Raises:
        RuntimeError: the hooks of others hold it, which may run anything to give it back, or the
            node has let go of it.
    """
    packed = raw_saved(node, field)
    if not field:
        (packed,) = packed
    if packed.unpack_hook is None:
        if field:
            return Kept(saved(node, field))
        return Kept(node.saved_tensors[0])  # type: ignore[attr-defined] # a node of a Function
    if packed.unpack_hook is not unpack or packed.data is None:
        raise RuntimeError(f"{node.name()} does not hold {field or 'its tensor'}")
    return packed.data  # type: ignore[no-any-return] # `pack` made it


def recompute(tensor: Tensor, norm: bool) -> Recomputed | None:
    """How to compute `tensor`, or None if there is no way."""
    node: Any = tensor.grad_fn  # torch takes `metadata` for a method
    known: Recomputed | None = node.metadata.get(RECOMPUTED, lambda: None)()
    if known is not None:
        return known
    try:
        found = of_activation(node) or (norm and of_norm(node, tensor)) or None
    except RuntimeError:  # the node does not hold what it saved: its backward has run, say
        return None
    if found is not None:
        node.metadata[RECOMPUTED] = weakref.ref(found)
    return found


def of_activation(node: Node) -> Recomputed | None:
    function = forward_class(node)
    if function is not None:
        forward = function.recompute(node) if is_ours(function) else None
        return None if forward is None else Recomputed(forward, [peek(node)])
    row = ROWS_BY_NODE.get(node.name())
    forward = None if row is None else row.recompute_torch(node)
    return None if forward is None else Recomputed(forward, [peek(node, "self")])


# By the name of the node: the op, and what the node calls its epsilon.
NORMS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], str]] = {
    "NativeBatchNormBackward0": (torch.native_batch_norm, "eps"),
    "CudnnBatchNormBackward0": (torch.cudnn_batch_norm, "epsilon"),
}


def of_norm(node: Node, y: Tensor) -> Recomputed | None:
    """Batch normalization, from its input, with its statistics computed again while training."""
    if node.name() not in NORMS:
        return None
    function, epsilon_name = NORMS[node.name()]
    weight = bias = None
    if raw_saved(node, "weight").data is not None:
        weight = peek(node, "weight")
        bias = getattr(node.next_functions[2][0], "variable", None)
        if bias is None:  # frozen or computed: the node does not know it
            return None
        bias = Kept(bias)
    training = saved(node, "training")
    mean = variance = None
    if not training:
        mean = peek(node, "running_mean")
        variance = peek(node, "running_var")
    epsilon = saved(node, epsilon_name)

    def compute(x: Tensor) -> Tensor:
        arguments = (kept and kept.get() for kept in (weight, bias, mean, variance))
        return function(x, *arguments, training, 0.0, epsilon)[0]

    x = peek(node, "input")
    configuration = (node.name(), training, y.device, y.dtype, y.shape, y.stride())
    if configuration not in SAME_BITS:
        SAME_BITS[configuration] = same_bits(compute(x.get()), y)
        if not SAME_BITS[configuration]:
            warnings.warn(
                f"rematerialize: {node.name()} for {y.dtype} {list(y.shape)} on {y.device} gives "
                "other bits the second time, so its output is kept",
                stacklevel=2,
            )
    return Recomputed(compute, [x]) if SAME_BITS[configuration] else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.stride() == b.stride() and torch.equal(a.view(bits), b.view(bits))


@contextlib.contextmanager
def rematerialize(*, norm: bool = False) -> Iterator[None]:
    """Save less for backward: in this block, or in a function decorated with `@rematerialize()`.

    An output of Mish, Swish or ReLU6 that a later operation saves for backward, such as the input
    of a convolution or a linear layer, is not kept but computed again from the input of the
    activation, where that is saved anyway. So it is for the fused kernels of Mish and Swish, and
    for torch's own Mish, SiLU and ReLU6. Gradients are the same, bit for bit.

    What is kept all the same: what an activation has written in place, the output of a ReLU6 kernel
    (which saves bits, not its input), of a Swish with another `beta` than 1 where no kernel runs,
    of an activation with a learnable weight, of a user's subclass of a Function, of one whose
    output was changed afterwards or cast by autocast, and a view of an output that negates it, such
    as `z.conj().imag` of a complex view z (pytorch#184379). A change through `.data` is one that
    nobody sees: the output is computed again as it was before.

    Args:
        norm: also compute the outputs of batch normalization again, from its input. Where torch
            does not give the same bits twice, which the first call of each shape tries, one warning
            says so and they are kept. It takes a norm whose weight and bias are parameters that
            require grad, or that has none.

    PyTorch runs only the innermost of nested saved-tensor hooks: within `torch.utils.checkpoint` or
    `save_on_cpu` in the block theirs apply, and within this block theirs do not. Under
    `torch.compile`, whose partitioner weighs what to compute again, it does nothing, nor under a
    transform of `torch.func`, which takes no such hooks: `torch.func.grad` of a function that has
    the block in it works, and within the block it raises, as within any block of hooks.

    Raises:
        RuntimeError: in backward, as torch does, where a tensor that is needed was changed.
    """
    if torch.compiler.is_compiling() or is_transformed():
        yield
        return
    with saved_tensors_hooks(partial(pack, norm=norm), unpack):
        yield
