"""The Triton kernels of activations with a weight: one forward, one backward; and their launch.

A dense tensor is in memory a matrix. Where a channel's elements lie side by side, or there is one
weight, a row has one weight; where the channels do (channels_last, or a batch of vectors), a column
has. A program handles one tile of it. Backward sums, in fp32, what the tile adds to the gradient of
each weight; what all tiles add is then summed by torch, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_act.backends.triton.activations import functions_of
from fused_act.backends.triton.launcher import Launcher
from fused_act.backends.triton.tiles import (
    NUM_WARPS,
    block_size,
    ceil_div,
    load,
    next_power_of_2,
    store,
    tile_of,
    with_layout_of,
)
from fused_act.families.weighted import Weighted

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
        tile_columns = min(next_power_of_2(columns), widest)
        rows = ceil_div(x.numel(), columns)
        return cls(columns, rows, by_column, size // tile_columns, tile_columns)

    @property
    def blocks(self) -> tuple[int, int]:
        """Tiles below and beside each other."""
        return ceil_div(self.rows, self.tile_rows), ceil_div(self.columns, self.tile_columns)


@triton.jit
def offsets_of(columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a tile's elements, relative to its first. Rows may lie far from each other."""
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    return rows[:, None] * columns + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def load_weight(
    weight_ptr, row, column_block, columns, weights, BY_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The weights of a tile, as a column or a row that broadcasts."""
    if not BY_COLUMN:
        channel = ((row % weights).to(tl.int32) + tl.arange(0, BLOCK_M)) % weights
        return tl.load(weight_ptr + channel)[:, None]
    else:
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        return tl.load(weight_ptr + column, mask=column < columns, other=0.0)[None, :]


# A tile loads its weights itself, with `weights_at` as load_weight takes it: before the branch that
# chooses the tile, what is computed of a weight alone would wait for it, and x with that.
@triton.jit
def forward_tile(
    x_ptr, y_ptr, weights_at, offsets, valid, FORWARD: tl.constexpr, LOW: tl.constexpr,
    BY_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    x = load(x_ptr, offsets, valid)
    weight = load_weight(*weights_at, BY_COLUMN, BLOCK_M, BLOCK_N)
    store(y_ptr, offsets, FORWARD(x, weight, LOW), valid)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, weight_ptr, numel, columns, weights, FORWARD: tl.constexpr,
    BY_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    row, column_block = tile_of(tl.cdiv(columns, BLOCK_N).to(tl.int32), BLOCK_M)
    start = row * columns + column_block.to(tl.int64) * BLOCK_N
    weights_at = (weight_ptr, row, column_block, columns, weights)
    offsets = offsets_of(columns, BLOCK_M, BLOCK_N)
    left, columns_left = numel - start, columns - column_block.to(tl.int64) * BLOCK_N
    x_ptr += start
    y_ptr += start
    if columns_left >= BLOCK_N and left >= (BLOCK_M - 1) * columns + BLOCK_N:
        forward_tile(
            x_ptr, y_ptr, weights_at, offsets, None, FORWARD, LOW, BY_COLUMN, BLOCK_M, BLOCK_N
        )
    else:
        valid = (offsets < left) & (tl.arange(0, BLOCK_N)[None, :] < columns_left)
        forward_tile(
            x_ptr, y_ptr, weights_at, offsets, valid, FORWARD, LOW, BY_COLUMN, BLOCK_M, BLOCK_N
        )


@triton.jit
def backward_tile(
    grad_output_ptr, x_ptr, weights_at, grad_input_ptr, offsets, valid, DERIVATIVE: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, LOW: tl.constexpr, BY_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x; return the sums for the weights of the tile."""
    grad_output = load(grad_output_ptr, offsets, valid)
    x = load(x_ptr, offsets, valid)
    weight = load_weight(*weights_at, BY_COLUMN, BLOCK_M, BLOCK_N)
    store(grad_input_ptr, offsets, grad_output * DERIVATIVE(x, weight, LOW), valid)
    # What is not valid was loaded as 0, and a gradient of 0 adds nothing.
    return tl.sum(WEIGHT_GRADIENT(grad_output, x, weight, LOW), axis=0 if BY_COLUMN else 1)


@triton.jit
def backward_kernel(
    grad_output_ptr, x_ptr, grad_input_ptr, partials_ptr, weight_ptr, numel, columns, weights,
    DERIVATIVE: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BY_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    row, column_block = tile_of(tl.cdiv(columns, BLOCK_N).to(tl.int32), BLOCK_M)
    start = row * columns + column_block.to(tl.int64) * BLOCK_N
    weights_at = (weight_ptr, row, column_block, columns, weights)
    offsets = offsets_of(columns, BLOCK_M, BLOCK_N)
    left, columns_left = numel - start, columns - column_block.to(tl.int64) * BLOCK_N
    grad_output_ptr += start
    x_ptr += start
    grad_input_ptr += start
    if columns_left >= BLOCK_N and left >= (BLOCK_M - 1) * columns + BLOCK_N:
        sums = backward_tile(
            grad_output_ptr, x_ptr, weights_at, grad_input_ptr, offsets, None, DERIVATIVE,
            WEIGHT_GRADIENT, LOW, BY_COLUMN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        valid = (offsets < left) & (tl.arange(0, BLOCK_N)[None, :] < columns_left)
        sums = backward_tile(
            grad_output_ptr, x_ptr, weights_at, grad_input_ptr, offsets, valid, DERIVATIVE,
            WEIGHT_GRADIENT, LOW, BY_COLUMN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if not BY_COLUMN:
        # One sum for each row and column block.
        column_blocks = tl.cdiv(columns, BLOCK_N)
        rows = tl.arange(0, BLOCK_M)
        partials_ptr += row * column_blocks + column_block
        inside = rows.to(tl.int64) * columns < left
        tl.store(partials_ptr + rows.to(tl.int64) * column_blocks, sums, mask=inside)
    else:
        # One sum for each row block and column.
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        partials_ptr += row // BLOCK_M * columns
        tl.store(partials_ptr + column, sums, mask=column < columns)


def launches(row: Weighted) -> dict[str, Callable[..., None]]:
    """What computes the outputs of each raw op of `row`: `launch(outputs, *args)`, by its field."""
    forward_launcher = Launcher(forward_kernel, functions_of(row, "forward"), FORWARD_OPTIONS)
    backward_functions = functions_of(row, "derivative", "weight_gradient")
    backward_launcher = Launcher(backward_kernel, backward_functions, BACKWARD_OPTIONS)

    def launch(
        launcher: Launcher, matrix: Matrix, tensors: tuple[Tensor, ...], x: Tensor, weight: Tensor
    ) -> None:
        row_blocks, column_blocks = matrix.blocks
        launcher(
            row_blocks * column_blocks,
            (*tensors, weight, x.numel(), matrix.columns, weight.numel()),
            (matrix.by_column, matrix.tile_rows, matrix.tile_columns),
        )

    def forward(y: Tensor, x: Tensor, weight: Tensor) -> None:
        if x.numel() == 0:
            return
        x = with_layout_of(y, x)
        matrix = Matrix.of(x, weight.numel(), block_size(x.dtype))
        launch(forward_launcher, matrix, (x, y), x, weight)

    def backward(
        gradients: tuple[Tensor, Tensor], grad_output: Tensor, x: Tensor, weight: Tensor
    ) -> None:
        grad_input, grad_weight = gradients
        if x.numel() == 0:
            grad_weight.zero_()
            return
        x, grad_output = with_layout_of(grad_input, x), with_layout_of(grad_input, grad_output)
        matrix = Matrix.of(x, weight.numel(), backward_block_size(x.dtype))
        row_blocks, column_blocks = matrix.blocks
        if matrix.by_column:
            partials = weight.new_empty(row_blocks, matrix.columns, 1)
        else:
            partials = weight.new_empty(
                matrix.rows // weight.numel(), weight.numel(), column_blocks
            )
        tensors = grad_output, x, grad_input, partials
        launch(backward_launcher, matrix, tensors, x, weight)
        torch.sum(partials, (0, 2), out=grad_weight)

    return {"forward": forward, "backward": backward}
