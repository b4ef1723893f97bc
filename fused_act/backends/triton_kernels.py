"""The Triton kernels: one forward, one backward, for every activation; and their launch.

A program handles one tile of BLOCK_SIZE consecutive elements, in memory order. The full tiles run
without a mask, for with `offsets < numel` every access would shrink to one element.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_act import ops
from fused_act.backends import triton_activations

# 32 bytes a thread: two 16-byte accesses for each input.
NUM_WARPS = 4
BYTES_PER_BLOCK = 32 * 32 * NUM_WARPS
# A ceiling of registers, for warps enough in an SM: 3 % for 16-bit Mish on an H200. Of itself ptxas
# takes up to 63, most of them for the last tile.
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 40}


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
    bits = (mask.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    grad_input = GRADIENT(grad_output, tl.reshape(bits, (BLOCK_SIZE,)) != 0, *parameters)
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


def block_size(dtype: torch.dtype) -> int:
    """Elements that a program handles."""
    return BYTES_PER_BLOCK // dtype.itemsize


def launch(kernel, x: Tensor, *arguments) -> None:
    """Launch `kernel`, whose last argument is the block size, over the elements of `x`."""
    numel = x.numel()
    if numel > 0:
        size = block_size(x.dtype)
        with torch.cuda.device_of(x):
            kernel[(triton.cdiv(numel, size),)](*arguments, size, **OPTIONS)


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


def implementations(activation) -> dict:
    """The implementation of each raw op of `activation`, by name."""
    name = activation.name
    math = {
        function: getattr(triton_activations, f"{name}_{function}", None)
        for function in ("forward", "derivative", "derivative_from_output", "passes", "gradient")
    }
    masked = activation.saves == "mask"

    def run(x, y, mask, parameters):
        x = with_layout_of(y, x)
        launch(
            forward_kernel,
            x,
            x,
            y,
            mask,
            x.numel(),
            parameters,
            math["forward"],
            math["passes"],
        )

    def run_out(x, out, mask, parameters):
        ops.check(name, x, out)
        # empty_like keeps the strides of a dense tensor and of no other.
        y = out if out.is_contiguous() else torch.empty_like(out)
        dense = y.stride() == out.stride()
        if 0 < abs(x.data_ptr() - out.data_ptr()) < out.numel() * out.itemsize:
            x = x.clone()  # the same memory, but not the same elements: a tile may read a result
        run(x, out if dense else y, mask, parameters)
        if not dense:
            out.copy_(y)

    def new_mask(x):
        return torch.empty(ops.mask_numel(x), dtype=torch.uint8, device=x.device)

    def forward(x, *parameters):
        ops.check(name, x)
        y = torch.empty_like(x)
        run(x, y, None, parameters)
        return y

    def forward_out(x, *parameters, out):
        run_out(x, out, None, parameters)

    def forward_with_mask(x, *parameters):
        ops.check(name, x)
        y, mask = torch.empty_like(x), new_mask(x)
        run(x, y, mask, parameters)
        return y, mask

    def forward_with_mask_out(x, *parameters, out):
        mask = new_mask(x)
        run_out(x, out, mask, parameters)
        return mask

    def run_backward(grad_output, saved, grad_input, parameters, function):
        grad_output = with_layout_of(grad_input, grad_output)
        launch(
            backward_kernel,
            grad_output,
            grad_output,
            saved,
            grad_input,
            grad_output.numel(),
            parameters,
            math[function],
            masked_backward_tile if masked else backward_tile,
        )
        return grad_input

    def unmasked_backward(op, function, grad_output, saved, *parameters):
        ops.check(op, grad_output, saved)
        grad_input = torch.empty_like(saved)
        saved = with_layout_of(grad_input, saved)
        return run_backward(grad_output, saved, grad_input, parameters, function)

    def masked_backward(grad_output, mask, *parameters_and_stride):
        *parameters, stride = parameters_and_stride
        ops.check(f"{name}_backward", grad_output, mask=mask, stride=stride)
        grad_input = torch.empty_strided(
            grad_output.shape, stride, dtype=grad_output.dtype, device=grad_output.device
        )
        return run_backward(grad_output, mask, grad_input, tuple(parameters), "gradient")

    backward = masked_backward
    if not masked:
        backward = functools.partial(unmasked_backward, f"{name}_backward", "derivative")
    by_field = {
        "forward": forward,
        "forward_out": forward_out,
        "forward_with_mask": forward_with_mask,
        "forward_with_mask_out": forward_with_mask_out,
        "backward": backward,
        "backward_from_output": functools.partial(
            unmasked_backward, f"{name}_backward_from_output", "derivative_from_output"
        ),
    }
    return {op.name: by_field[field] for field, op in ops.raw_ops(activation).items()}
