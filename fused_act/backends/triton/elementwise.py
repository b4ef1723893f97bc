"""The Triton kernels of elementwise activations: one forward, one backward; and their launch.

A program handles one tile of BLOCK_SIZE consecutive elements, in memory order. The full tiles run
without a mask, for with `offsets < numel` every access would shrink to one element.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    mask_offsets,
    pack,
    store,
    unpack,
    with_layout_of,
)
from fused_act.families.elementwise import Elementwise

# A ceiling of registers, for warps enough in an SM: 3 % for 16-bit Mish on an H200. Of itself ptxas
# takes up to 63, most of them for the last tile.
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 40}


# A tile has two halves, an access a thread each. Both are loaded before the math; then one goes
# through it after the other, which takes half the registers. `start` is added where a pointer is
# used: earlier, the address of the result would be held meanwhile.
@triton.jit
def forward_tile(
    x_ptr, y_ptr, mask_ptr, start, numel, parameters, FORWARD, PASSES, FULL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    first = tl.arange(0, BLOCK_SIZE // 2)
    second = first + BLOCK_SIZE // 2
    first_valid = None if FULL else first < numel
    second_valid = None if FULL else second < numel
    x_first = load(x_ptr + start, first, first_valid)
    x_second = load(x_ptr + start, second, second_valid)
    store(y_ptr + start, first, FORWARD(x_first, *parameters, LOW), first_valid)
    if mask_ptr is not None:
        mask_first = pack(PASSES(x_first) if FULL else PASSES(x_first) & first_valid)
    store(y_ptr + start, second, FORWARD(x_second, *parameters, LOW), second_valid)
    if mask_ptr is not None:
        mask_second = pack(PASSES(x_second) if FULL else PASSES(x_second) & second_valid)
        mask = tl.reshape(tl.trans(tl.join(mask_first, mask_second)), (BLOCK_SIZE // 8,))
        bytes_ = mask_offsets(BLOCK_SIZE)
        if FULL:
            tl.store(mask_ptr + start // 8 + bytes_, mask)
        else:
            tl.store(mask_ptr + start // 8 + bytes_, mask, mask=bytes_ * 8 < numel)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, mask_ptr, numel, parameters, FORWARD: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    # 64 bits, for tensors of more than 2^31 elements; within a tile 32 bits do.
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    left = numel - start
    if left >= BLOCK_SIZE:
        forward_tile(
            x_ptr, y_ptr, mask_ptr, start, left, parameters, FORWARD, PASSES, True, BLOCK_SIZE
        )
    else:
        # 32 bits, or every offset would be compared in 64, for some 20 registers.
        forward_tile(
            x_ptr, y_ptr, mask_ptr, start, left.to(tl.int32), parameters, FORWARD, PASSES, False,
            BLOCK_SIZE,
        )  # fmt: skip


@triton.jit
def backward_tile(
    grad_output_ptr, saved_ptr, grad_input_ptr, start, numel, parameters, DERIVATIVE,
    FULL: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = saved_ptr.dtype.element_ty != tl.float32
    first = tl.arange(0, BLOCK_SIZE // 2)
    second = first + BLOCK_SIZE // 2
    first_valid = None if FULL else first < numel
    second_valid = None if FULL else second < numel
    grad_first = load(grad_output_ptr + start, first, first_valid)
    saved_first = load(saved_ptr + start, first, first_valid)
    grad_second = load(grad_output_ptr + start, second, second_valid)
    saved_second = load(saved_ptr + start, second, second_valid)
    grad_first *= DERIVATIVE(saved_first, *parameters, LOW)
    store(grad_input_ptr + start, first, grad_first, first_valid)
    grad_second *= DERIVATIVE(saved_second, *parameters, LOW)
    store(grad_input_ptr + start, second, grad_second, second_valid)


@triton.jit
def masked_backward_tile(
    grad_output_ptr, mask_ptr, grad_input_ptr, start, numel, parameters, GRADIENT,
    FULL: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_SIZE)
    valid = None if FULL else offsets < numel
    grad_output = load(grad_output_ptr + start, offsets, valid)
    bytes_ = mask_offsets(BLOCK_SIZE)
    if FULL:
        mask = tl.load(mask_ptr + start // 8 + bytes_)
    else:
        mask = tl.load(mask_ptr + start // 8 + bytes_, mask=bytes_ * 8 < numel, other=0)
    grad_input = GRADIENT(grad_output, unpack(mask), *parameters)
    store(grad_input_ptr + start, offsets, grad_input, valid)


@triton.jit
def backward_kernel(
    grad_output_ptr, saved_ptr, grad_input_ptr, numel, parameters, BACKWARD: tl.constexpr,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    # BACKWARD is the derivative, of x or of y, or what a mask makes of the gradient.
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    left = numel - start
    if left >= BLOCK_SIZE:
        TILE(
            grad_output_ptr, saved_ptr, grad_input_ptr, start, left, parameters, BACKWARD, True,
            BLOCK_SIZE,
        )  # fmt: skip
    else:
        TILE(
            grad_output_ptr, saved_ptr, grad_input_ptr, start, left.to(tl.int32), parameters,
            BACKWARD, False, BLOCK_SIZE,
        )  # fmt: skip


def launch(
    launcher: Launcher, parameters: tuple[float, ...], x: Tensor, *tensors: Tensor | None
) -> None:
    """Launch a kernel, whose tensors are `x` and `tensors`, over the elements of `x`."""
    numel = x.numel()
    if numel > 0:
        size = block_size(x.dtype)
        launcher(ceil_div(numel, size), (x, *tensors, numel, parameters), (size,))


def launches(row: Elementwise) -> dict[str, Callable[..., None]]:
    """What computes the outputs of each raw op of `row`: `launch(outputs, *args)`, by its field."""
    masked = row.saves == "mask"
    functions = functions_of(row, "forward", "passes" if masked else None)
    forward_launcher = Launcher(forward_kernel, functions, OPTIONS)

    def backward_launcher(name: str, tile: triton.JITFunction = backward_tile) -> Launcher:
        return Launcher(backward_kernel, (*functions_of(row, name), tile), OPTIONS)

    def forward(y: Tensor, x: Tensor, *parameters: float, mask: Tensor | None = None) -> None:
        x = with_layout_of(y, x)
        launch(forward_launcher, parameters, x, y, mask)

    def run_out(x: Tensor, out: Tensor, mask: Tensor | None, parameters: tuple[float, ...]) -> None:
        # empty_like keeps the strides of a dense tensor and of no other.
        y = out if out.is_contiguous() else torch.empty_like(out)
        dense = y.stride() == out.stride()
        if 0 < abs(x.data_ptr() - out.data_ptr()) < out.numel() * out.itemsize:
            x = x.clone()  # the same memory, but not the same elements: a tile may read a result
        forward(out if dense else y, x, *parameters, mask=mask)
        if not dense:
            out.copy_(y)

    def run_backward(
        launcher: Launcher,
        grad_output: Tensor,
        saved: Tensor,
        grad_input: Tensor,
        parameters: tuple[float, ...],
    ) -> None:
        grad = with_layout_of(grad_input, grad_output)
        launch(launcher, parameters, grad, saved, grad_input)

    def backward(
        launcher: Launcher,
        grad_input: Tensor,
        grad_output: Tensor,
        saved: Tensor,
        *parameters: float,
    ) -> None:
        saved = with_layout_of(grad_input, saved)
        run_backward(launcher, grad_output, saved, grad_input, parameters)

    def masked_backward(
        launcher: Launcher,
        grad_input: Tensor,
        grad_output: Tensor,
        mask: Tensor,
        *parameters_and_stride: Any,
    ) -> None:
        run_backward(launcher, grad_output, mask, grad_input, parameters_and_stride[:-1])

    def forward_with_mask(outputs: tuple[Tensor, Tensor], x: Tensor, *parameters: float) -> None:
        y, mask = outputs
        forward(y, x, *parameters, mask=mask)

    found: dict[str, Callable[..., None]] = {
        "forward": forward,
        "forward_out": lambda _, x, *parameters, out: run_out(x, out, None, parameters),
    }
    if masked:
        found |= {
            "forward_with_mask": forward_with_mask,
            "forward_with_mask_out": lambda mask, x, *parameters, out: run_out(
                x, out, mask, parameters
            ),
            "backward": partial(
                masked_backward, backward_launcher("gradient", masked_backward_tile)
            ),
        }
    if row.saves == "x":
        found["backward"] = partial(backward, backward_launcher("derivative"))
    if row.saves_inplace == "y":
        from_output = backward_launcher("derivative_from_output")
        found["backward_from_output"] = partial(backward, from_output)
    return found
