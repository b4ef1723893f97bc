"""The Triton kernels of activations with a weight: one forward, one backward; and their launch.

A dense tensor is in memory a matrix of rows of K elements. Where a channel's elements lie side by
side, or there is one weight, a row has one weight; where the channels do (channels_last, or a
batch of vectors), a column has. A program handles one tile of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_act import ops
from fused_act.backends import triton_activations
from fused_act.backends.triton_kernels import NUM_WARPS, block_size, with_layout_of

# Of a tile whose columns have weights; what it has in height keeps the partial sums few.
WIDEST_COLUMNS = 128
# Of a row where there is one weight, and rows are of our choosing.
ROW = 1024


class Matrix(NamedTuple):
    """A dense tensor as its memory has it.

    Args:
        rows, columns: its size; the last row may be short.
        channels: weights; rows have them in turn, or columns have.
        by_column: whether columns have the weights.
    """

    rows: int
    columns: int
    channels: int
    by_column: bool

    @classmethod
    def of(cls, x: Tensor, weights: int) -> Matrix:
        if weights == 1:
            return cls(triton.cdiv(x.numel(), ROW), ROW, 1, False)
        inner = x.stride(1)
        if inner == 1:
            return cls(x.numel() // weights, weights, weights, True)
        return cls(x.numel() // inner, inner, weights, False)

    def tile(self, dtype: torch.dtype) -> tuple[int, int]:
        """Rows and columns of a tile."""
        size = block_size(dtype)
        columns = min(triton.next_power_of_2(self.columns), size)
        if self.by_column:
            columns = min(columns, WIDEST_COLUMNS)
        return size // columns, columns

    def blocks(self, dtype: torch.dtype) -> tuple[int, int]:
        """Tiles below and beside each other."""
        tile_rows, tile_columns = self.tile(dtype)
        return triton.cdiv(self.rows, tile_rows), triton.cdiv(self.columns, tile_columns)


@triton.jit
def load(x_ptr, offsets, valid):
    """Load in fp32; without a mask if every offset is valid, which `valid=None` says."""
    if valid is None:
        return tl.load(x_ptr + offsets).to(tl.float32)
    else:
        return tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def weights_of(weight_ptr, rows, columns, channels, BY_COLUMN: tl.constexpr):
    """The weights of a tile, to broadcast over it. Beyond the last column any will do."""
    if BY_COLUMN:
        return tl.load(weight_ptr + tl.minimum(columns, channels - 1))[None, :]
    else:
        return tl.load(weight_ptr + rows % channels)[:, None]


@triton.jit
def forward_tile(x_ptr, y_ptr, weight, offsets, valid, FORWARD):
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    y = FORWARD(load(x_ptr, offsets, valid), weight, LOW).to(y_ptr.dtype.element_ty)
    if valid is None:
        tl.store(y_ptr + offsets, y)
    else:
        tl.store(y_ptr + offsets, y, mask=valid)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, weight_ptr, numel, row_count, column_count, channels, column_blocks,
    FORWARD: tl.constexpr, BY_COLUMN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row_block, column_block = block // column_blocks, block % column_blocks
    rows = row_block * BM + tl.arange(0, BM)
    columns = column_block.to(tl.int32) * BK + tl.arange(0, BK)
    offsets = rows[:, None] * column_count + columns[None, :]
    weight = weights_of(weight_ptr, rows, columns, channels, BY_COLUMN)
    last_row, last_column = row_block * BM + BM - 1, column_block * BK + BK - 1
    if (last_column < column_count) & (last_row * column_count + last_column < numel):
        forward_tile(x_ptr, y_ptr, weight, offsets, None, FORWARD)
    else:
        valid = (columns < column_count)[None, :] & (offsets < numel)
        forward_tile(x_ptr, y_ptr, weight, offsets, valid, FORWARD)


@triton.jit
def backward_tile(
    grad_output_ptr, x_ptr, grad_input_ptr, weight, offsets, valid, DERIVATIVE, WEIGHT_DERIVATIVE,
    BY_COLUMN: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    grad_output = load(grad_output_ptr, offsets, valid)
    x = load(x_ptr, offsets, valid)
    grad_input = (grad_output * DERIVATIVE(x, weight, LOW)).to(grad_input_ptr.dtype.element_ty)
    if valid is None:
        tl.store(grad_input_ptr + offsets, grad_input)
    else:
        tl.store(grad_input_ptr + offsets, grad_input, mask=valid)
    return tl.sum(grad_output * WEIGHT_DERIVATIVE(x, weight, LOW), axis=0 if BY_COLUMN else 1)


@triton.jit
def backward_kernel(
    grad_output_ptr, x_ptr, grad_input_ptr, weight_ptr, partial_ptr, numel, row_count,
    column_count, channels, column_blocks, DERIVATIVE: tl.constexpr,
    WEIGHT_DERIVATIVE: tl.constexpr, BY_COLUMN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row_block, column_block = block // column_blocks, block % column_blocks
    rows = row_block * BM + tl.arange(0, BM)
    columns = column_block.to(tl.int32) * BK + tl.arange(0, BK)
    offsets = rows[:, None] * column_count + columns[None, :]
    weight = weights_of(weight_ptr, rows, columns, channels, BY_COLUMN)
    last_row, last_column = row_block * BM + BM - 1, column_block * BK + BK - 1
    if (last_column < column_count) & (last_row * column_count + last_column < numel):
        partial = backward_tile(
            grad_output_ptr, x_ptr, grad_input_ptr, weight, offsets, None, DERIVATIVE,
            WEIGHT_DERIVATIVE, BY_COLUMN,
        )  # fmt: skip
    else:
        valid = (columns < column_count)[None, :] & (offsets < numel)
        partial = backward_tile(
            grad_output_ptr, x_ptr, grad_input_ptr, weight, offsets, valid, DERIVATIVE,
            WEIGHT_DERIVATIVE, BY_COLUMN,
        )  # fmt: skip
    if BY_COLUMN:
        tl.store(partial_ptr + row_block * column_count + columns, partial, columns < column_count)
    else:
        tl.store(partial_ptr + rows * column_blocks + column_block, partial, rows < row_count)


def implementations(row) -> dict:
    """The implementation of each raw op of `row`, by name."""
    FORWARD, DERIVATIVE, WEIGHT_DERIVATIVE = (
        getattr(triton_activations, f"{row.name}_{function}")
        for function in ("forward", "derivative", "weight_derivative")
    )

    def launch(kernel, matrix, x, *tensors_and_functions):
        (blocks, column_blocks), tile = matrix.blocks(x.dtype), matrix.tile(x.dtype)
        tensors = [one for one in tensors_and_functions if isinstance(one, Tensor)]
        functions = tensors_and_functions[len(tensors) :]
        sizes = x.numel(), matrix.rows, matrix.columns, matrix.channels, column_blocks
        with torch.cuda.device_of(x):
            kernel[(blocks * column_blocks,)](
                *tensors, *sizes, *functions, matrix.by_column, *tile, num_warps=NUM_WARPS
            )

    def forward(x, weight):
        ops.check_weighted(row.name, None, x, weight)
        y = torch.empty_like(x)
        if x.numel() > 0:
            x = with_layout_of(y, x)
            matrix = Matrix.of(x, weight.numel())
            launch(forward_kernel, matrix, x, x, y, weight, FORWARD)
        return y

    def backward(grad_output, x, weight):
        ops.check_weighted(f"{row.name}_backward", None, x, weight, grad_output)
        grad_input = torch.empty_like(x)
        if x.numel() == 0:
            return grad_input, torch.zeros_like(weight)
        x, grad_output = with_layout_of(grad_input, x), with_layout_of(grad_input, grad_output)
        matrix = Matrix.of(x, weight.numel())
        blocks, column_blocks = matrix.blocks(x.dtype)
        if matrix.by_column:
            partial = weight.new_empty(blocks, matrix.columns, 1)
        else:
            outer = matrix.rows // matrix.channels
            partial = weight.new_empty(outer, matrix.channels, column_blocks)
        launch(
            backward_kernel,
            matrix,
            x,
            grad_output,
            x,
            grad_input,
            weight,
            partial,
            DERIVATIVE,
            WEIGHT_DERIVATIVE,
        )
        return grad_input, partial.sum((0, 2))

    return {row.name: forward, f"{row.name}_backward": backward}
