"""`rematerialize`: what can be computed again from what is saved anyway is not saved for backward.

An activation's output is the next layer's input, which that layer saves. Mish and Swish save their
own input too, so the output can be computed from it again: the same kernel on the same input gives
the same bits. ReLU6 saves bits, but where its input is the output of a norm, which saves its own
input, both are computed again. Everything rests on `torch.autograd.graph.saved_tensors_hooks` and
on what a node of the graph tells of itself.

With the host extension, the rules here are for nodes of Python and for torch's own activations, and
csrc/host/recomputing.h has the same rules for its own nodes and for norms.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from fused_act import host, packing
from fused_act._torch_private import (
    forward_class,
    is_transformed,
    raw_saved,
    saved,
    version_of,
)
from fused_act.activations import ROWS
from fused_act.families.base import KernelFunction, is_ours
from fused_act.packing import How, Packed

ROWS_BY_NODE = {row.torch_node: row for row in ROWS.values() if row.torch_node is not None}
# By the name of the node: the op, and what the node calls its epsilon.
NORMS: dict[str, tuple[Callable[..., tuple[Tensor, ...]], str]] = {
    "NativeBatchNormBackward0": (torch.native_batch_norm, "eps"),
    "CudnnBatchNormBackward0": (torch.cudnn_batch_norm, "epsilon"),
}
# Whether the output of a norm, or of a function after it, has the same bits when it is computed
# again, by what could make a difference.
SAME_BITS: dict[tuple[object, ...], bool] = {}


def way() -> Any:
    """The module whose types and hooks run: the host extension, where it is, or `packing`."""
    extension = host.extension()
    return packing if isinstance(extension, str) else extension


@functools.cache
def pack_hook(norm: bool) -> Callable[[Tensor], Packed]:
    return way().Pack(may_recompute, recompute, check_bits, norm)  # type: ignore[no-any-return] # may be C++


def peek(node: Node, field: str = "") -> Packed:
    """What `Pack` made of the tensor that `node` saves as `field`; computes none again.

    Without a field it is the first that a Function saves. What was saved without hooks is kept now.

    Raises:
        RuntimeError: the hooks of others hold it, which may run anything to give it back, or the
            node has let go of it.
    """
    packed = raw_saved(node, field) if field else raw_saved(node)[0]
    if packed.unpack_hook is None:
        # Of a node of a Function.
        tensor = saved(node, field) if field else node.saved_tensors[0]  # type: ignore[attr-defined]
        return way().Kept(tensor)  # type: ignore[no-any-return] # may be C++
    if packed.unpack_hook is not way().unpack or packed.data is None:
        raise RuntimeError(f"{node.name()} does not hold {field or 'its tensor'}")
    return packed.data  # type: ignore[no-any-return] # `Pack` made it


def may_recompute(node: Node, norm: bool) -> bool:
    """Whether outputs of nodes of the type of `node` may be computed again."""
    function = forward_class(node)
    if function is not None:
        return is_ours(function) and function.recompute is not None
    name = node.name()
    return name in ROWS_BY_NODE or (norm and name in NORMS)


def recompute(node: Node, y: Tensor, norm: bool) -> How | None:
    """How the output `y` of `node` is computed again, or None if there is no way."""
    function = forward_class(node)
    try:
        if function is not None:
            return of_function(node, function, y, norm)
        if version_of(y) != 0:
            return None
        return of_norm(node, y) if norm and node.name() in NORMS else of_torch(node)
    except RuntimeError:  # the node does not hold what it saved: its backward has run, say
        return None


def of_torch(node: Node) -> How | None:
    forward = ROWS_BY_NODE[node.name()].recompute_torch(node)
    return None if forward is None else (forward, peek(node, "self"))


def of_function(node: Any, function: Any, y: Tensor, norm: bool) -> How | None:
    """An activation of ours, from what its node saves, or a norm and an activation together."""
    # A write bumps the version; those that autograd sees also change grad_fn.
    if version_of(y) != function.writes:
        return None
    forward = function.recompute(node)
    if node.kernels.forward_with_mask is None:
        return forward, peek(node)
    # The node saves a mask. Its input is not at hand, but may be the output of a norm, as it was.
    before, _ = node.next_functions[0]
    if not norm or before is None or before.name() not in NORMS or node.input_version != 0:
        return None
    return of_norm(before, y, function, forward)


def of_norm(
    node: Node,
    y: Tensor,
    function: type[KernelFunction] | None = None,
    forward: Callable[[Tensor], Tensor] = lambda x: x,
) -> How | None:
    """The output `y` of a batch normalization, or of `forward` of `function` after it.

    It is computed from the input of the norm, while training with the statistics.
    """
    op, epsilon_name = NORMS[node.name()]
    training, epsilon = saved(node, "training"), saved(node, epsilon_name)
    x = peek(node, "input")
    weight, mean, variance = (
        None if raw_saved(node, field).data is None else peek(node, field)
        for field in ("weight", "running_mean", "running_var")
    )
    bias = getattr(node.next_functions[2][0], "variable", None)
    # A bias that is frozen or computed the node does not know.
    if (bias is None) != (weight is None):
        return None
    bias = bias if bias is None else way().Kept(bias)
    dtypes = tuple(kept and kept.get().dtype for kept in (weight, mean, variance))
    if training:
        mean = variance = None
    elif mean is None or variance is None:
        return None
    else:  # a norm that trains meanwhile writes its statistics unseen
        mean, variance = (way().Kept(kept.get().clone()) for kept in (mean, variance))

    def compute(x: Tensor) -> Tensor:
        arguments = (kept and kept.get() for kept in (weight, bias, mean, variance))
        return forward(op(x, *arguments, training, 0.0, epsilon)[0])

    layout = y.device, y.dtype, y.shape, y.stride()
    configuration = (node.name(), training, layout, dtypes, function)
    same = None if weight is None else SAME_BITS.get(configuration)
    if same is None:
        same = check_bits(node.name(), compute(x.get()), y, x.get())
        # Without a weight nothing tells whether there was a bias.
        if same is not None and weight is not None:
            SAME_BITS[configuration] = same
    return (compute, x) if same else None


def check_bits(op: str, again: Tensor, y: Tensor, x: Tensor) -> bool | None:
    """Whether `y`, the output of the node `op` for `x`, has the same bits `again`.

    Warns if it has not. Returns None where the values do not tell, since all of them are one.
    """
    if is_constant(x) or is_constant(y):
        return None
    same = same_bits(again, y)
    if not same:
        warnings.warn(
            f"rematerialize: {op} for {y.dtype} {list(y.shape)} on {y.device} gives other bits the "
            "second time, so its output is kept",
            stacklevel=2,
        )
    return same


def is_constant(x: Tensor) -> bool:
    return x.numel() == 0 or bool((x == x.flatten()[0]).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.stride() == b.stride() and torch.equal(a.view(bits), b.view(bits))


@contextlib.contextmanager
def rematerialize(*, norm: bool = False) -> Iterator[None]:
    """Save less for backward: in this block, or in a function decorated with `@rematerialize()`.

    An output of Mish, Swish or ReLU6 that a later operation saves for backward, such as the input
    of a convolution or a linear layer, is not kept but computed again from the input of the
    activation, where that is saved anyway. So it is for the fused kernels of Mish and Swish, in
    place too, and for torch's own Mish, SiLU and ReLU6. Gradients are the same, bit for bit.

    What is kept all the same: what torch's own activation has written in place, the output of a
    ReLU, ReLU6 or LeakyReLU kernel (which saves bits, not its input) but for `norm`, of a Swish
    with another `beta` than 1 where no kernel runs, of an activation with a learnable weight, of a
    user's subclass of a Function, of one whose output was changed afterwards or cast by autocast,
    and a view of an output that negates it, such as `z.conj().imag` of a complex view z
    (pytorch#184379).

    Args:
        norm: also compute the outputs of batch normalization again, from its input, and with them
            those of the kernels that save bits, in place or not, where they follow one. Where torch
            does not give the same bits twice, which the first call of each shape tries, one warning
            says so and they are kept. It takes a norm whose bias is a parameter that requires grad,
            or one without weight and bias, which is tried at each call.

    PyTorch runs only the innermost of nested saved-tensor hooks: within `torch.utils.checkpoint` or
    `save_on_cpu` in the block theirs apply, and within this block theirs do not. Under
    `torch.compile`, whose partitioner weighs what to compute again, it does nothing, nor under a
    transform of `torch.func`, which takes no such hooks: `torch.func.grad` of a function that has
    the block in it works, and within the block it raises, as within any block of hooks.

    Three writes are not seen: one through `.data`, after which the output is computed again as it
    was before; one under `no_grad` to a norm's bias, between the norm and what saves its output;
    and one to a tensor that a user's Function has saved, by the backward of that Function.

    Raises:
        RuntimeError: in backward, as torch does, where a tensor that is needed was changed.
        RecursionError: in backward, where more activations and norms than Python's recursion limit
            follow each other with no other layer between them.
    """
    if torch.compiler.is_compiling() or is_transformed():
        yield
        return
    with saved_tensors_hooks(pack_hook(norm), way().unpack):
        yield
