"""How a program reads and writes a tile; and its size. No family is named here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 bytes a thread: two 16-byte accesses for each input.
NUM_WARPS = 4
BYTES_PER_BLOCK = 32 * 32 * NUM_WARPS


@triton.jit
def load(x_ptr, offsets, valid):
    """Load in fp32; without a mask if every offset is valid, which `valid=None` says."""
    if valid is None:
        return tl.load(x_ptr + offsets).to(tl.float32)
    else:
        return tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def store(y_ptr, offsets, y, valid):
    if valid is None:
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty))
    else:
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def mask_offsets(BLOCK_SIZE: tl.constexpr):
    """Offsets of the bytes of a tile's mask.

    They are consecutive. Triton is told otherwise, or it makes 16-bit accesses of them, for which
    the bytes must change threads, through shared memory and a barrier.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK_SIZE // 8), 1)


@triton.jit
def pack(passes):
    """The bytes of a mask: a bit for each of a vector of so many times eight elements."""
    SIZE: tl.constexpr = passes.shape[0]
    bits = passes.to(tl.int32) << (tl.arange(0, SIZE) % 8)
    return tl.sum(tl.reshape(bits, (SIZE // 8, 8)), axis=1).to(tl.uint8)


@triton.jit
def unpack(mask):
    """The bits of the bytes of a mask, eight times as many."""
    bits = (mask.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, (mask.shape[0] * 8,)) != 0


@triton.jit
def tile_of(column_blocks, BLOCK_M: tl.constexpr):
    """This program's tile of a matrix: its first row, and its column block.

    The row has 64 bits, for tensors of more than 2^31 elements; within a tile 32 bits do. The
    division is one of 32 bits: for each element that of 64 would cost more than all the rest.
    """
    program = tl.program_id(0)
    return (program // column_blocks).to(tl.int64) * BLOCK_M, program % column_blocks


def block_size(dtype: torch.dtype) -> int:
    """Elements that a program handles."""
    return BYTES_PER_BLOCK // dtype.itemsize


# triton.cdiv and triton.next_power_of_2 take 5 us a call on the host.
def ceil_div(size: int, step: int) -> int:
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def has_layout(x: Tensor, stride: Sequence[int]) -> bool:
    """Whether the elements of `x` lie in memory as `stride` says.

    The stride of a dimension of size 1 is of no account: channels_last 1 x 1 images are contiguous.
    """
    if x.stride() == stride:
        return True
    strides = zip(x.shape, x.stride(), stride)
    return all(size == 1 or step == expected for size, step, expected in strides)


def with_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """`x` in the strides of the dense tensor `like`: itself or a copy."""
    return x if has_layout(x, like.stride()) else torch.empty_like(like).copy_(x)
