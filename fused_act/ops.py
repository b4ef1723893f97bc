"""Schemas and fakes of the raw ops: two namespaces, one per kernel backend, with the same ops.

`torch.ops.fused_act_cuda.*` gets its kernels from csrc/ops.cu, `torch.ops.fused_act_triton.*` from
backends/triton.py. The raw ops are what the Functions call and what a graph shows; they have no
derivative, so they refuse an input that requires grad. (`torch.ops.fused_act.*` are other ops, see
`activation.define_graph_op`.) For mish (saves its input), tanh (its
output) and relu6 (one bit an element) they are

    mish(x) -> y                        relu6(x) -> y
    mish.out(x, *, out)                 relu6.out(x, *, out)
    mish_backward(grad_output, x)       relu6_with_mask(x) -> y, mask
                                        relu6_with_mask.out(x, *, out) -> mask
    tanh_backward_from_output(          relu6_backward(grad_output, mask, stride)
        grad_output, y)

`mask` is uint8, ceil(numel / 8) long: bit i % 8 of byte i // 8 tells whether the gradient passes
element i in memory order. `stride` is that of `y`, which fixes this order. For crelu, which mirrors
relu, they are

    crelu(x, dim) -> y
    crelu_with_mask(x, dim) -> y, mask
    crelu_backward(grad_output, mask, dim, stride)

where `stride` is that of `x`, and the mask has two rows of bits, which begin with a byte, for each
row that `fused_act.mirrored.Layout` tells of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.checkpoint import SAC_IGNORED_OPS

from fused_act.activation import Activation, dense_stride
from fused_act.activations import ACTIVATIONS, MIRRORED, WEIGHTED
from fused_act.backends import DTYPES, Kernels
from fused_act.mirrored import Layout, MirroredActivation
from fused_act.weighted import WeightedActivation, channels

# The layout contract is in the fakes: Inductor must not pass or expect other strides.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

ROWS = (*ACTIVATIONS, *WEIGHTED, *MIRRORED)


class RawOp(NamedTuple):
    """One raw op.

    Args:
        schema: its schema, without the namespace.
        fake: what it returns, without data: `fake(*args, **kwargs)`.
        check: raises for arguments that no kernel may get: `check(name, device_types, *args,
            **kwargs)`.
    """

    schema: str
    fake: Callable
    check: Callable[..., None]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


@functools.singledispatch
def raw_ops(row) -> dict[str, RawOp]:
    """The raw ops of a row, keyed by the field of `Kernels` that calls them."""
    raise NotImplementedError(type(row))


@raw_ops.register
def elementwise_ops(activation: Activation) -> dict[str, RawOp]:
    # No defaults: the dispatcher drops trailing arguments that equal theirs.
    parameters = "".join(f", float {parameter}" for parameter in activation.parameters)
    name = activation.name

    # An output is dense, and keeps the strides if `x` is.
    def forward(x, *parameters):
        return torch.empty_like(x)

    def forward_with_mask(x, *parameters):
        return torch.empty_like(x), forward_with_mask_out(x)

    def forward_with_mask_out(x, *parameters, out=None):
        return x.new_empty((mask_numel(x),), dtype=torch.uint8)

    def backward(grad_output, saved, *parameters):
        return torch.empty_like(saved)

    def masked_backward(grad_output, mask, *parameters_and_stride):
        *_, stride = parameters_and_stride
        return torch.empty_strided(
            grad_output.shape, stride, dtype=grad_output.dtype, device=grad_output.device
        )

    def check_tensors(op, device_types, x, *args, out=None):
        other = next((arg for arg in (out, *args) if isinstance(arg, Tensor)), None)
        check(op, x, other, device_types=device_types)

    def check_masked_backward(op, device_types, grad_output, mask, *parameters_and_stride):
        *_, stride = parameters_and_stride
        check(op, grad_output, mask=mask, stride=stride, device_types=device_types)

    ops = {
        "forward": RawOp(f"{name}(Tensor x{parameters}) -> Tensor", forward, check_tensors),
        "forward_out": RawOp(
            f"{name}.out(Tensor x{parameters}, *, Tensor(a!) out) -> ()",
            lambda x, *parameters, out: None,
            check_tensors,
        ),
    }
    if activation.saves == "mask":
        ops |= {
            "forward_with_mask": RawOp(
                f"{name}_with_mask(Tensor x{parameters}) -> (Tensor, Tensor)",
                forward_with_mask,
                check_tensors,
            ),
            "forward_with_mask_out": RawOp(
                f"{name}_with_mask.out(Tensor x{parameters}, *, Tensor(a!) out) -> Tensor",
                forward_with_mask_out,
                check_tensors,
            ),
            "backward": RawOp(
                f"{name}_backward(Tensor grad_output, Tensor mask{parameters}, SymInt[] stride)"
                " -> Tensor",
                masked_backward,
                check_masked_backward,
            ),
        }
    if activation.saves == "x":
        ops["backward"] = RawOp(
            f"{name}_backward(Tensor grad_output, Tensor x{parameters}) -> Tensor",
            backward,
            check_tensors,
        )
    if activation.saves_inplace == "y":
        ops["backward_from_output"] = RawOp(
            f"{name}_backward_from_output(Tensor grad_output, Tensor y{parameters}) -> Tensor",
            backward,
            check_tensors,
        )
    return ops


@raw_ops.register
def weighted_ops(row: WeightedActivation) -> dict[str, RawOp]:
    def forward(x, weight):
        return torch.empty_like(x)

    def backward(grad_output, x, weight):
        return torch.empty_like(x), torch.empty_like(weight)

    def check_backward(op, device_types, grad_output, x, weight):
        check_weighted(op, device_types, x, weight, grad_output)

    return {
        "forward": RawOp(f"{row.name}(Tensor x, Tensor weight) -> Tensor", forward, check_weighted),
        "backward": RawOp(
            f"{row.name}_backward(Tensor grad_output, Tensor x, Tensor weight) -> (Tensor, Tensor)",
            backward,
            check_backward,
        ),
    }


def check_weighted(
    op: str,
    device_types: tuple[str, ...] | None,
    x: Tensor,
    weight: Tensor,
    grad_output: Tensor | None = None,
) -> None:
    """As `check`; the weight is fp32, a vector of one element or one for each channel of `x`."""
    check(op, x, grad_output, device_types=device_types)
    if weight.dtype is not torch.float32:
        raise TypeError(f"{op}: expected weight to be float32, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{op}: expected weight on {x.device}, got {weight.device}")
    if weight.dim() != 1 or not weight.is_contiguous() or weight.numel() not in (1, channels(x)):
        raise ValueError(
            f"{op}: expected a contiguous weight of shape (1,) or ({channels(x)},) for x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)} with stride {weight.stride()}"
        )


@raw_ops.register
def mirrored_ops(row: MirroredActivation) -> dict[str, RawOp]:
    name = row.name

    def layout_of(x, dim):
        return Layout.of(x.shape, dense_stride(x), dim)

    def forward(x, dim):
        layout = layout_of(x, dim)
        return torch.empty_strided(layout.shape, layout.stride, dtype=x.dtype, device=x.device)

    def forward_with_mask(x, dim):
        return forward(x, dim), x.new_empty(layout_of(x, dim).mask_shape, dtype=torch.uint8)

    def backward(grad_output, mask, dim, stride):
        shape = unmirrored(grad_output.shape, dim)
        return torch.empty_strided(
            shape, stride, dtype=grad_output.dtype, device=grad_output.device
        )

    return {
        "forward": RawOp(f"{name}(Tensor x, int dim) -> Tensor", forward, check_mirrored),
        "forward_with_mask": RawOp(
            f"{name}_with_mask(Tensor x, int dim) -> (Tensor, Tensor)",
            forward_with_mask,
            check_mirrored,
        ),
        "backward": RawOp(
            f"{name}_backward(Tensor grad_output, Tensor mask, int dim, SymInt[] stride) -> Tensor",
            backward,
            check_mirrored_backward,
        ),
    }


def unmirrored(shape: Sequence[int], dim: int) -> list[int]:
    """The shape of `x`, where that of `y` is `shape`."""
    halved = list(shape)
    halved[dim] //= 2
    return halved


def check_mirrored(op: str, device_types: tuple[str, ...] | None, x: Tensor, dim: int) -> None:
    """Raise unless a kernel can safely mirror `x` along `dim`."""
    check(op, x, device_types=device_types)
    if not -x.dim() <= dim < x.dim():
        expected = f"between {-x.dim()} and {x.dim() - 1}" if x.dim() > 0 else "x with dimensions"
        raise IndexError(f"{op}: expected dim {expected}, got {dim} for shape {tuple(x.shape)}")


def check_mirrored_backward(
    op: str,
    device_types: tuple[str, ...] | None,
    grad_output: Tensor,
    mask: Tensor,
    dim: int,
    stride: Sequence[int],
) -> None:
    """Likewise for the arguments of backward, `stride` being that of `x`."""
    check_mirrored(op, device_types, grad_output, dim)
    if grad_output.size(dim) % 2 != 0:
        raise ValueError(
            f"{op}: expected grad_output of even size along dim {dim}, got {grad_output.size(dim)}"
        )
    shape = unmirrored(grad_output.shape, dim)
    check_stride(op, shape, stride)
    check_mask(op, grad_output, mask, Layout.of(shape, stride, dim).mask_shape)


def check(
    op: str,
    x: Tensor,
    other: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    stride: Sequence[int] = (),
    device_types: tuple[str, ...] | None = None,
) -> None:
    """Raise `TypeError` or `ValueError` unless a kernel can safely run on these arguments.

    Args:
        x: the tensor that fixes dtype, device and shape: the input, or `grad_output`.
        other: `out` or the saved input or output, which must match `x`.
        mask, stride: as `relu6_backward` takes them.
        device_types: the devices that the op takes, besides meta.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: expected float16, bfloat16 or float32, got {x.dtype}")
    if device_types is not None and x.device.type not in device_types:
        raise ValueError(f"{op}: expected a tensor on {' or '.join(device_types)}, got {x.device}")
    if other is not None:
        if other.dtype != x.dtype:
            raise TypeError(f"{op}: expected tensors of one dtype, got {x.dtype} and {other.dtype}")
        if other.device != x.device:
            raise ValueError(
                f"{op}: expected tensors on one device, got {x.device} and {other.device}"
            )
        if other.shape != x.shape:
            raise ValueError(
                f"{op}: expected tensors of one shape, got {tuple(x.shape)} and "
                f"{tuple(other.shape)}"
            )
    if mask is not None:
        check_mask(op, x, mask, (mask_numel(x),))
        check_stride(op, x.shape, stride)


def check_mask(op: str, x: Tensor, mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless `mask` has this shape and lies where `x` does."""
    if mask.dtype != torch.uint8:
        raise TypeError(f"{op}: expected mask to be uint8, got {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(f"{op}: expected mask on {x.device}, got {mask.device}")
    if mask.shape != shape or not mask.is_contiguous():
        raise ValueError(
            f"{op}: expected a contiguous mask of shape {shape} for {x.numel()} elements, "
            f"got {tuple(mask.shape)} with stride {mask.stride()}"
        )


def check_stride(op: str, shape: Sequence[int], stride: Sequence[int]) -> None:
    if len(stride) != len(shape) or not is_dense(shape, stride):
        raise ValueError(
            f"{op}: expected the stride of a dense tensor of shape {tuple(shape)}, "
            f"got {tuple(stride)}"
        )


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor of `shape` and `stride` fills its memory without gap or overlap."""
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def mask_numel(x: Tensor) -> int:
    """Bytes of a mask for `x`: one bit an element."""
    return (x.numel() + 7) // 8


def is_differentiated(x: Tensor) -> bool:
    """Whether reverse-mode or forward-mode AD follows `x`."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    return torch.is_grad_enabled() and x.requires_grad


def refuse_autograd(op, raw_op: RawOp, public: str, device_types: tuple[str, ...]):
    """The Autograd kernel of a raw op: check what users pass in; never lose a gradient silently."""
    name = op.name()

    def autograd(*args, **kwargs):
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if any(is_differentiated(tensor) for tensor in tensors):
            raise RuntimeError(
                f"{name} has no derivative; call fused_act.{public}, which is differentiable, or "
                "wrap the call in torch.no_grad()"
            )
        raw_op.check(name, (*device_types, "meta"), *args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return autograd


def bump_version(op, *args, out, **kwargs):
    """The ADInplaceOrView kernel of an out op: autograd must learn that `out` has changed.

    Without it a later backward through `out` gets a wrong gradient in silence.
    """
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{op.name()}: out is an inference tensor, outside inference mode")
    increment_version(out)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op(*args, out=out, **kwargs)


def define(namespace: str, device_types: tuple[str, ...]) -> torch.library.Library:
    """Define every op in `namespace`, with its fake and what guards it."""
    library = torch.library.Library(namespace, "DEF")
    for row in ROWS:
        for field, raw_op in raw_ops(row).items():
            library.define(raw_op.schema, tags=TAGS)
            op = overload(namespace, raw_op.name)
            torch.library.register_fake(f"{namespace}::{raw_op.name}", raw_op.fake, lib=library)
            autograd = refuse_autograd(op, raw_op, row.name, device_types)
            library.impl(raw_op.name, autograd, "Autograd")
            if field.endswith("_out"):
                library.impl(raw_op.name, functools.partial(bump_version, op), "ADInplaceOrView")
                # Selective checkpointing keeps what an op returns and then skips the op: it would
                # leave `out` as it was, and gradients wrong. This one is always computed again.
                SAC_IGNORED_OPS.add(op)
    return library


def overload(namespace: str, name: str):
    """The op `name` ("mish", "mish.out") of `namespace`."""
    packet, _, overload_name = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload_name or "default")


def kernels(namespace: str) -> dict[str, Kernels]:
    """The ops of `namespace` as `Kernels`, by activation name."""
    return {
        row.name: Kernels(
            **{field: overload(namespace, op.name) for field, op in raw_ops(row).items()}
        )
        for row in ROWS
    }


# Kept here because ops vanish with their Library.
CUDA_LIBRARY = define("fused_act_cuda", ("cuda",))
TRITON_LIBRARY = define("fused_act_triton", ("cuda", "cpu"))
