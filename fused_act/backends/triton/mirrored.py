"""The Triton kernels of y = cat([f(x), f(-x)], dim): one forward, one backward; and their launch.

In memory a dense x is a matrix, and y has two rows for each of its rows, side by side. A program
handles one tile of x, BLOCK_M rows and BLOCK_N columns. The full tiles run without a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    has_layout,
    load,
    mask_offsets,
    next_power_of_2,
    pack,
    store,
    tile_of,
)
from fused_act.families.mirrored import Layout, Mirrored
from fused_act.families.raw_op import empty_strided, is_dense

# With 40 registers, as many as elsewhere, tiles of 16 columns spill.
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 48}


@triton.jit
def bytes_of(columns):
    """The bytes of a row of the mask. `columns + 7` may not fit in the 32 bits that columns do."""
    return (columns - 1) // 8 + 1


@triton.jit
def left_of(size, start, BLOCK: tl.constexpr):
    return tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def valid_in(rows_left, columns_left, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile exist."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, COLUMNS)
    return (rows < rows_left)[:, None] & (columns < columns_left)[None, :]


@triton.jit
def store_bits(
    mask_ptr, offsets, passes, valid, byte_valid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    if valid is not None:
        passes = passes & valid
    mask = tl.reshape(pack(tl.reshape(passes, (BLOCK_M * BLOCK_N,))), (BLOCK_M, BLOCK_N // 8))
    tl.store(mask_ptr + offsets, mask, mask=byte_valid)


@triton.jit
def forward_tile(
    x_ptr, y_ptr, mask_ptr, columns, rows_left, columns_left, FORWARD, PASSES,
    FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    rows = tl.arange(0, BLOCK_M)[:, None]
    offsets = rows * columns + tl.arange(0, BLOCK_N)[None, :]
    valid = None if FULL else valid_in(rows_left, columns_left, BLOCK_M, BLOCK_N)
    x = load(x_ptr, offsets, valid)
    offsets += rows * columns
    store(y_ptr, offsets, FORWARD(x, LOW), valid)
    store(y_ptr + columns, offsets, FORWARD(-x, LOW), valid)
    if mask_ptr is not None:
        bytes_ = bytes_of(columns)
        offsets = rows * (2 * bytes_) + mask_offsets(BLOCK_N)[None, :]
        byte_valid = (
            None if FULL else valid_in(rows_left, bytes_of(columns_left), BLOCK_M, BLOCK_N // 8)
        )
        store_bits(mask_ptr, offsets, PASSES(x), valid, byte_valid, BLOCK_M, BLOCK_N)
        store_bits(mask_ptr + bytes_, offsets, PASSES(-x), valid, byte_valid, BLOCK_M, BLOCK_N)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, mask_ptr, row_count, columns, column_blocks, FORWARD: tl.constexpr,
    PASSES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, column_block = tile_of(column_blocks, BLOCK_M)
    column = column_block.to(tl.int64) * BLOCK_N
    x_ptr += row * columns + column
    y_ptr += 2 * row * columns + column
    if mask_ptr is not None:
        mask_ptr += 2 * row * bytes_of(columns) + column // 8
    if (row + BLOCK_M <= row_count) & (column + BLOCK_N <= columns):
        forward_tile(
            x_ptr, y_ptr, mask_ptr, columns, BLOCK_M, BLOCK_N, FORWARD, PASSES, True, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
    else:
        rows_left = left_of(row_count, row, BLOCK_M)
        columns_left = left_of(columns, column, BLOCK_N)
        forward_tile(
            x_ptr, y_ptr, mask_ptr, columns, rows_left, columns_left, FORWARD, PASSES, False,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def load_bits(mask_ptr, offsets, byte_valid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    mask = tl.load(mask_ptr + offsets, mask=byte_valid)
    bits = (mask.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def backward_tile(
    grad_output_ptr, mask_ptr, grad_input_ptr, columns, rows_left, columns_left, GRADIENT,
    FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)[:, None]
    input_offsets = rows * columns + tl.arange(0, BLOCK_N)[None, :]
    offsets = input_offsets + rows * columns
    valid = None if FULL else valid_in(rows_left, columns_left, BLOCK_M, BLOCK_N)
    grad = load(grad_output_ptr, offsets, valid)
    mirrored_grad = load(grad_output_ptr + columns, offsets, valid)
    bytes_ = bytes_of(columns)
    offsets = rows * (2 * bytes_) + mask_offsets(BLOCK_N)[None, :]
    byte_valid = (
        None if FULL else valid_in(rows_left, bytes_of(columns_left), BLOCK_M, BLOCK_N // 8)
    )
    passes = load_bits(mask_ptr, offsets, byte_valid, BLOCK_M, BLOCK_N)
    mirrored_passes = load_bits(mask_ptr + bytes_, offsets, byte_valid, BLOCK_M, BLOCK_N)
    grad_input = GRADIENT(grad, passes) - GRADIENT(mirrored_grad, mirrored_passes)
    store(grad_input_ptr, input_offsets, grad_input, valid)


@triton.jit
def backward_kernel(
    grad_output_ptr, mask_ptr, grad_input_ptr, row_count, columns, column_blocks,
    GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, column_block = tile_of(column_blocks, BLOCK_M)
    column = column_block.to(tl.int64) * BLOCK_N
    grad_output_ptr += 2 * row * columns + column
    grad_input_ptr += row * columns + column
    mask_ptr += 2 * row * bytes_of(columns) + column // 8
    if (row + BLOCK_M <= row_count) & (column + BLOCK_N <= columns):
        backward_tile(
            grad_output_ptr, mask_ptr, grad_input_ptr, columns, BLOCK_M, BLOCK_N, GRADIENT, True,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        rows_left = left_of(row_count, row, BLOCK_M)
        columns_left = left_of(columns, column, BLOCK_N)
        backward_tile(
            grad_output_ptr, mask_ptr, grad_input_ptr, columns, rows_left, columns_left, GRADIENT,
            False, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def tile(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the tile of a program; a mask byte holds eight columns."""
    size = block_size(dtype)
    wide = min(max(8, next_power_of_2(columns)), size)
    return size // wide, wide


def launch(launcher: Launcher, rows: int, columns: int, x: Tensor, *tensors: Tensor | None) -> None:
    """Launch a kernel over the rows and columns of the input. `x` and `tensors` are its tensors."""
    if rows * columns == 0:
        return
    tile_rows, tile_columns = tile(columns, x.dtype)
    column_blocks = ceil_div(columns, tile_columns)
    blocks = ceil_div(rows, tile_rows) * column_blocks
    launcher(blocks, (x, *tensors, rows, columns, column_blocks), (tile_rows, tile_columns))


def launches(row: Mirrored) -> dict[str, Callable[..., None]]:
    """What computes the outputs of each raw op of `row`: `launch(outputs, *args)`, by its field."""
    forward_launcher = Launcher(forward_kernel, functions_of(row, "forward", "passes"), OPTIONS)
    backward_launcher = Launcher(backward_kernel, functions_of(row, "gradient"), OPTIONS)

    def run(x: Tensor, dim: int, y: Tensor, mask: Tensor | None) -> None:
        if not (x.is_contiguous() or is_dense(x.shape, x.stride())):
            x = torch.empty_like(x).copy_(x)
        columns = x.size(dim) * y.stride(dim)  # y tells how many elements a step along dim takes
        rows = x.numel() // columns if columns else 0
        launch(forward_launcher, rows, columns, x, y, mask)

    def backward(
        grad_input: Tensor, grad_output: Tensor, mask: Tensor, dim: int, stride: Sequence[int]
    ) -> None:
        layout = Layout.of(grad_input.shape, stride, dim)
        if not has_layout(grad_output, layout.stride):
            copy = empty_strided(grad_output, layout.shape, layout.stride)
            grad_output = copy.copy_(grad_output)
        launch(backward_launcher, layout.rows, layout.columns, grad_output, mask, grad_input)

    return {
        "forward": lambda y, x, dim: run(x, dim, y, None),
        "forward_with_mask": lambda outputs, x, dim: run(x, dim, *outputs),
        "backward": backward,
    }
