"""The raw ops: schema, arguments that a kernel may get, and outputs. No family is named here.

The outputs that `RawOp.allocate` makes have the strides that kernels write in. So the fakes of the
ops and the drivers of kernels in Python share it: on fake tensors it is the fake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_act.dispatch import DTYPES


class RawOp(NamedTuple):
    """One raw op.

    Args:
        schema: its schema, without the namespace. It has no defaults, since the dispatcher drops
            trailing arguments that equal theirs.
        allocate: what the op returns, allocated and not yet computed: `allocate(*args, **kwargs)`.
        check: raises for arguments that no kernel may get: `check(name, device_types, *args,
            **kwargs)`, where `device_types` are the devices that the op takes, or None for any.
    """

    schema: str
    allocate: Callable[..., Any]
    check: Callable[..., None]

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def floats(self) -> tuple[int, ...]:
        """The places of the arguments that are floats."""
        arguments = self.schema.partition("(")[2].split(", ")
        return tuple(i for i, each in enumerate(arguments) if each.startswith("float "))


def check(
    op: str, device_types: tuple[str, ...] | None, x: Tensor, other: Tensor | None = None
) -> None:
    """Raise `TypeError` or `ValueError` unless a kernel can safely run on these tensors.

    Args:
        op: the name for the message.
        device_types: the devices that the op takes, or None for any.
        x: the tensor that fixes dtype, device and shape: the input, or `grad_output`.
        other: `out` or the saved input or output, which must match `x`.
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
    """Raise unless `stride` is that of a dense tensor of `shape`."""
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


def dense_stride(x: Tensor) -> tuple[int, ...]:
    """The stride of `x`, or of its dense copy: a mask is in that order."""
    return (x if x.is_contiguous() else torch.empty_like(x, device="meta")).stride()


def like_x(x: Tensor, *args: object) -> Tensor:
    """An output for each element of `x`. It is dense, and keeps the strides of a dense `x`."""
    return torch.empty_like(x)


def empty_strided(like: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A tensor of this shape and stride, of the dtype and device of `like`."""
    return torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)


def empty_mask(x: Tensor, *shape: int) -> Tensor:
    """The bytes of a mask of this shape, on the device of `x`."""
    return torch.empty(shape, dtype=torch.uint8, device=x.device)
