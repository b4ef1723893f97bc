"""The Triton kernels of y = cat([f(x), f(-x)], dim): one forward, one backward; and their launch.

In memory a dense x is a matrix, of K columns, and y has two rows for each of its rows, side by
side. A program handles one tile of x, BM rows and BK columns. The full tiles run without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fused_act import ops
from fused_act.activation import dense_stride
from fused_act.backends import triton_activations
from fused_act.backends.triton_kernels import (
    NUM_WARPS,
    block_size,
    has_layout,
    load,
    mask_offsets,
    pack,
    store,
)
from fused_act.mirrored import Layout

# With 40 registers, as many as elsewhere, tiles of 16 columns spill.
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 48}


@triton.jit
def tile_of(block, column_blocks, BM: tl.constexpr, BK: tl.constexpr):
    """The first row and column of a program's tile.

    64 bits, for tensors of more than 2^31 elements; within a tile 32 bits do. The division is one
    of 32 bits: for each element that of 64 would cost more than all the rest.
    """
    row_block = block // column_blocks
    column_block = block % column_blocks
    return row_block.to(tl.int64) * BM, column_block.to(tl.int64) * BK


@triton.jit
def bytes_of(columns):
    """The bytes of a row of the mask. `columns + 7` may not fit in the 32 bits that columns do."""
    return (columns - 1) // 8 + 1


@triton.jit
def left_of(size, start, BLOCK: tl.constexpr):
    return tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def valid_in(rows_left, columns_left, BM: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile exist."""
    rows, columns = tl.arange(0, BM), tl.arange(0, COLUMNS)
    return (rows < rows_left)[:, None] & (columns < columns_left)[None, :]


@triton.jit
def store_bits(mask_ptr, offsets, passes, valid, byte_valid, BM: tl.constexpr, BK: tl.constexpr):
    if valid is not None:
        passes = passes & valid
    mask = tl.reshape(pack(tl.reshape(passes, (BM * BK,))), (BM, BK // 8))
    tl.store(mask_ptr + offsets, mask, mask=byte_valid)


@triton.jit
def forward_tile(
    x_ptr, y_ptr, mask_ptr, columns, rows_left, columns_left, FORWARD, PASSES,
    FULL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    rows = tl.arange(0, BM)[:, None]
    offsets = rows * columns + tl.arange(0, BK)[None, :]
    valid = None if FULL else valid_in(rows_left, columns_left, BM, BK)
    x = load(x_ptr, offsets, valid)
    offsets += rows * columns
    store(y_ptr, offsets, FORWARD(x, LOW), valid)
    store(y_ptr + columns, offsets, FORWARD(-x, LOW), valid)
    if mask_ptr is not None:
        bytes_ = bytes_of(columns)
        offsets = rows * (2 * bytes_) + mask_offsets(BK)[None, :]
        byte_valid = None if FULL else valid_in(rows_left, bytes_of(columns_left), BM, BK // 8)
        store_bits(mask_ptr, offsets, PASSES(x), valid, byte_valid, BM, BK)
        store_bits(mask_ptr + bytes_, offsets, PASSES(-x), valid, byte_valid, BM, BK)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, mask_ptr, row_count, columns, column_blocks, FORWARD: tl.constexpr,
    PASSES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(tl.program_id(0), column_blocks, BM, BK)
    x_ptr += row * columns + column
    y_ptr += 2 * row * columns + column
    if mask_ptr is not None:
        mask_ptr += 2 * row * bytes_of(columns) + column // 8
    if (row + BM <= row_count) & (column + BK <= columns):
        forward_tile(x_ptr, y_ptr, mask_ptr, columns, BM, BK, FORWARD, PASSES, True, BM, BK)
    else:
        rows_left, columns_left = left_of(row_count, row, BM), left_of(columns, column, BK)
        forward_tile(
            x_ptr, y_ptr, mask_ptr, columns, rows_left, columns_left, FORWARD, PASSES, False, BM,
            BK,
        )  # fmt: skip


@triton.jit
def load_bits(mask_ptr, offsets, byte_valid, BM: tl.constexpr, BK: tl.constexpr):
    mask = tl.load(mask_ptr + offsets, mask=byte_valid)
    bits = (mask.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BM, BK)) != 0


@triton.jit
def backward_tile(
    grad_output_ptr, mask_ptr, grad_input_ptr, columns, rows_left, columns_left, GRADIENT,
    FULL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BM)[:, None]
    input_offsets = rows * columns + tl.arange(0, BK)[None, :]
    offsets = input_offsets + rows * columns
    valid = None if FULL else valid_in(rows_left, columns_left, BM, BK)
    grad = load(grad_output_ptr, offsets, valid)
    mirrored_grad = load(grad_output_ptr + columns, offsets, valid)
    bytes_ = bytes_of(columns)
    offsets = rows * (2 * bytes_) + mask_offsets(BK)[None, :]
    byte_valid = None if FULL else valid_in(rows_left, bytes_of(columns_left), BM, BK // 8)
    passes = load_bits(mask_ptr, offsets, byte_valid, BM, BK)
    mirrored_passes = load_bits(mask_ptr + bytes_, offsets, byte_valid, BM, BK)
    grad_input = GRADIENT(grad, passes) - GRADIENT(mirrored_grad, mirrored_passes)
    store(grad_input_ptr, input_offsets, grad_input, valid)


@triton.jit
def backward_kernel(
    grad_output_ptr, mask_ptr, grad_input_ptr, row_count, columns, column_blocks,
    GRADIENT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(tl.program_id(0), column_blocks, BM, BK)
    grad_output_ptr += 2 * row * columns + column
    grad_input_ptr += row * columns + column
    mask_ptr += 2 * row * bytes_of(columns) + column // 8
    if (row + BM <= row_count) & (column + BK <= columns):
        backward_tile(
            grad_output_ptr, mask_ptr, grad_input_ptr, columns, BM, BK, GRADIENT, True, BM, BK
        )
    else:
        rows_left, columns_left = left_of(row_count, row, BM), left_of(columns, column, BK)
        backward_tile(
            grad_output_ptr, mask_ptr, grad_input_ptr, columns, rows_left, columns_left, GRADIENT,
            False, BM, BK,
        )  # fmt: skip


def tile(columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the tile of a program; a mask byte holds eight columns."""
    size = block_size(dtype)
    wide = min(max(8, triton.next_power_of_2(columns)), size)
    return size // wide, wide


def launch(kernel, layout: Layout, tensors, *functions) -> None:
    """Launch `kernel` over the rows and columns of `layout`."""
    rows, columns = layout.rows, layout.columns
    if rows * columns == 0:
        return
    tile_rows, tile_columns = tile(columns, tensors[0].dtype)
    column_blocks = triton.cdiv(columns, tile_columns)
    grid = (triton.cdiv(rows, tile_rows) * column_blocks,)
    sizes = rows, columns, column_blocks
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, *sizes, *functions, tile_rows, tile_columns, **OPTIONS)


def implementations(row) -> dict:
    """The implementation of each raw op of `row`, by name."""
    FORWARD, PASSES, GRADIENT = (
        getattr(triton_activations, f"{row.activation.name}_{function}")
        for function in ("forward", "passes", "gradient")
    )

    def run(op, x, dim, masked):
        ops.check_mirrored(op, None, x, dim)
        stride = dense_stride(x)
        if not has_layout(x, stride):
            x = torch.empty_like(x).copy_(x)
        layout = Layout.of(x.shape, stride, dim)
        y = torch.empty_strided(layout.shape, layout.stride, dtype=x.dtype, device=x.device)
        mask = None
        if masked:
            mask = torch.empty(layout.mask_shape, dtype=torch.uint8, device=x.device)
        launch(forward_kernel, layout, (x, y, mask), FORWARD, PASSES)
        return y, mask

    def forward(x, dim):
        return run(row.name, x, dim, False)[0]

    def forward_with_mask(x, dim):
        return run(f"{row.name}_with_mask", x, dim, True)

    def backward(grad_output, mask, dim, stride):
        ops.check_mirrored_backward(f"{row.name}_backward", None, grad_output, mask, dim, stride)
        shape = ops.unmirrored(grad_output.shape, dim)
        layout = Layout.of(shape, stride, dim)
        options = {"dtype": grad_output.dtype, "device": grad_output.device}
        if not has_layout(grad_output, layout.stride):
            copy = torch.empty_strided(layout.shape, layout.stride, **options)
            grad_output = copy.copy_(grad_output)
        grad_input = torch.empty_strided(shape, stride, **options)
        launch(backward_kernel, layout, (grad_output, mask, grad_input), GRADIENT)
        return grad_input

    by_field = {
        "forward": forward,
        "forward_with_mask": forward_with_mask,
        "backward": backward,
    }
    return {op.name: by_field[field] for field, op in ops.raw_ops(row).items()}
