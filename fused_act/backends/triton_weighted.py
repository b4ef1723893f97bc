"""The Triton kernels of activations with a weight: one forward, one backward; and their launch.

A dense tensor is in memory a matrix. Where a channel's elements lie side by side, or there is one
weight, a row has one weight; where the channels do (channels_last, or a batch of vectors), a column
has. A program handles one tile of it. Backward sums, in fp32, what the tile adds to the gradient of
each weight; what all tiles add is then summed by torch, always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_act import ops
from fused_act.backends import triton_activations
from fused_act.backends.triton_kernels import (
    NUM_WARPS,
    block_size,
    load,
    store,
    with_layout_of,
)

# Of a tile whose columns have weights: one cache line. Wider ones have few rows to sum over.
COLUMN_BYTES = 128

FORWARD_OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 40}
BACKWARD_OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 80}


def backward_block_size(dtype: torch.dtype) -> int:
    """Elements of a tile of backward, more than of forward, since they share the cost of a sum."""
    return 2 * block_size(dtype)


class Matrix(NamedTuple):
    """A dense tensor as its memory has it.

    Args:
        columns: the length of a row; the last row may be short.
        rows: their number.
        by_column: whether columns have the weights, or rows, in turn.
        tile_rows, tile_columns: the size of a tile.
    """

    columns: int
    rows: int
    by_column: bool
    tile_rows: int
    tile_columns: int

    @classmethod
    def of(cls, x: Tensor, weights: int, size: int) -> Matrix:
        """The matrix of a dense `x`, cut into tiles of `size` elements."""
        widest = size
        columns, by_column = size, False  # of one weight, rows are as wide as a tile
        if weights > 1:
            columns = x.stride(1)
            by_column = columns == 1
        if by_column:
            columns, widest = weights, COLUMN_BYTES // x.itemsize
        tile_columns = min(triton.next_power_of_2(columns), widest)
        rows = triton.cdiv(x.numel(), columns)
        return cls(columns, rows, by_column, size // tile_columns, tile_columns)

    @property
    def blocks(self) -> tuple[int, int]:
        """Tiles below and beside each other."""
        return triton.cdiv(self.rows, self.tile_rows), triton.cdiv(self.columns, self.tile_columns)


@triton.jit
def tile_of(columns, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's tile: its first row, row block and column block, and what it starts with."""
    column_blocks = tl.cdiv(columns, BLOCK_K).to(tl.int32)
    program = tl.program_id(0)
    row_block = program // column_blocks
    column_block = program % column_blocks
    # 64 bits, for tensors of more than 2^31 elements.
    row = row_block.to(tl.int64) * BLOCK_M
    start = row * columns + column_block.to(tl.int64) * BLOCK_K
    return row, column_block, start


@triton.jit
def offsets_of(columns, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the elements of a tile from its first. Rows may lie far from each other."""
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    return rows[:, None] * columns + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def load_weight(
    weight_ptr, row, column_block, columns, weights, BY_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights of a tile, as a column or a row that broadcasts."""
    if not BY_COLUMN:
        channel = ((row % weights).to(tl.int32) + tl.arange(0, BLOCK_M)) % weights
        return tl.load(weight_ptr + channel)[:, None]
    else:
        column = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
        return tl.load(weight_ptr + column, mask=column < columns, other=0.0)[None, :]


# A tile loads its weights itself, with `weights_at` as load_weight takes it: before the branch that
# chooses the tile, what is computed of a weight alone would wait for it, and x with that.
@triton.jit
def forward_tile(
    x_ptr, y_ptr, weights_at, offsets, valid, FORWARD: tl.constexpr, LOW: tl.constexpr,
    BY_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    x = load(x_ptr, offsets, valid)
    weight = load_weight(*weights_at, BY_COLUMN, BLOCK_M, BLOCK_K)
    store(y_ptr, offsets, FORWARD(x, weight, LOW), valid)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, weight_ptr, numel, columns, weights, FORWARD: tl.constexpr,
    BY_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    row, column_block, start = tile_of(columns, BLOCK_M, BLOCK_K)
    weights_at = (weight_ptr, row, column_block, columns, weights)
    offsets = offsets_of(columns, BLOCK_M, BLOCK_K)
    left, columns_left = numel - start, columns - column_block.to(tl.int64) * BLOCK_K
    x_ptr += start
    y_ptr += start
    if columns_left >= BLOCK_K and left >= (BLOCK_M - 1) * columns + BLOCK_K:
        forward_tile(
            x_ptr, y_ptr, weights_at, offsets, None, FORWARD, LOW, BY_COLUMN, BLOCK_M, BLOCK_K
        )
    else:
        valid = (offsets < left) & (tl.arange(0, BLOCK_K)[None, :] < columns_left)
        forward_tile(
            x_ptr, y_ptr, weights_at, offsets, valid, FORWARD, LOW, BY_COLUMN, BLOCK_M, BLOCK_K
        )


@triton.jit
def backward_tile(
    grad_output_ptr, x_ptr, weights_at, grad_input_ptr, offsets, valid, DERIVATIVE: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, LOW: tl.constexpr, BY_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x; return the sums for the weights of the tile."""
    grad_output = load(grad_output_ptr, offsets, valid)
    x = load(x_ptr, offsets, valid)
    weight = load_weight(*weights_at, BY_COLUMN, BLOCK_M, BLOCK_K)
    store(grad_input_ptr, offsets, grad_output * DERIVATIVE(x, weight, LOW), valid)
    # What is not valid was loaded as 0, and a gradient of 0 adds nothing.
    return tl.sum(WEIGHT_GRADIENT(grad_output, x, weight, LOW), axis=0 if BY_COLUMN else 1)


@triton.jit
def backward_kernel(
    grad_output_ptr, x_ptr, grad_input_ptr, partials_ptr, weight_ptr, numel, columns, weights,
    DERIVATIVE: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BY_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    row, column_block, start = tile_of(columns, BLOCK_M, BLOCK_K)
    weights_at = (weight_ptr, row, column_block, columns, weights)
    offsets = offsets_of(columns, BLOCK_M, BLOCK_K)
    left, columns_left = numel - start, columns - column_block.to(tl.int64) * BLOCK_K
    grad_output_ptr += start
    x_ptr += start
    grad_input_ptr += start
    if columns_left >= BLOCK_K and left >= (BLOCK_M - 1) * columns + BLOCK_K:
        sums = backward_tile(
            grad_output_ptr, x_ptr, weights_at, grad_input_ptr, offsets, None, DERIVATIVE,
            WEIGHT_GRADIENT, LOW, BY_COLUMN, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        valid = (offsets < left) & (tl.arange(0, BLOCK_K)[None, :] < columns_left)
        sums = backward_tile(
            grad_output_ptr, x_ptr, weights_at, grad_input_ptr, offsets, valid, DERIVATIVE,
            WEIGHT_GRADIENT, LOW, BY_COLUMN, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if not BY_COLUMN:
        # One sum for each row and column block.
        column_blocks = tl.cdiv(columns, BLOCK_K)
        rows = tl.arange(0, BLOCK_M)
        partials_ptr += row * column_blocks + column_block
        inside = rows.to(tl.int64) * columns < left
        tl.store(partials_ptr + rows.to(tl.int64) * column_blocks, sums, mask=inside)
    else:
        # One sum for each row block and column.
        column = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
        partials_ptr += row // BLOCK_M * columns
        tl.store(partials_ptr + column, sums, mask=column < columns)


def implementations(row) -> dict:
    """The implementation of each raw op of `row`, by name."""
    forward_function, derivative, weight_gradient = (
        getattr(triton_activations, f"{row.name}_{function}")
        for function in ("forward", "derivative", "weight_gradient")
    )

    def launch(kernel, options, matrix, x, weight, *arguments):
        *tensors, functions = arguments
        row_blocks, column_blocks = matrix.blocks
        with torch.cuda.device_of(x):
            kernel[(row_blocks * column_blocks,)](
                *tensors,
                weight,
                x.numel(),
                matrix.columns,
                weight.numel(),
                *functions,
                matrix.by_column,
                matrix.tile_rows,
                matrix.tile_columns,
                **options,
            )

    def forward(x, weight):
        ops.check_weighted(row.name, None, x, weight)
        y = torch.empty_like(x)
        if x.numel() > 0:
            x = with_layout_of(y, x)
            matrix = Matrix.of(x, weight.numel(), block_size(x.dtype))
            launch(forward_kernel, FORWARD_OPTIONS, matrix, x, weight, x, y, (forward_function,))
        return y

    def backward(grad_output, x, weight):
        ops.check_weighted(f"{row.name}_backward", None, x, weight, grad_output)
        grad_input = torch.empty_like(x)
        if x.numel() == 0:
            return grad_input, torch.zeros_like(weight)
        x, grad_output = with_layout_of(grad_input, x), with_layout_of(grad_input, grad_output)
        matrix = Matrix.of(x, weight.numel(), backward_block_size(x.dtype))
        row_blocks, column_blocks = matrix.blocks
        if matrix.by_column:
            partials = weight.new_empty(row_blocks, matrix.columns, 1)
        else:
            partials = weight.new_empty(
                matrix.rows // weight.numel(), weight.numel(), column_blocks
            )
        tensors, functions = (grad_output, x, grad_input, partials), (derivative, weight_gradient)
        launch(backward_kernel, BACKWARD_OPTIONS, matrix, x, weight, *tensors, functions)
        return grad_input, partials.sum((0, 2))

    return {row.name: forward, f"{row.name}_backward": backward}
