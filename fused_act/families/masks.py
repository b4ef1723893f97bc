"""What Functions share that save a mask: one bit an element, which tells whether it passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fused_act.families.base import Context


class MaskContext(Context, Protocol):
    shape: Sequence[int]
    stride: Sequence[int]


def save_mask(
    ctx: MaskContext, y: Tensor, shape: Sequence[int], stride: Sequence[int], mask: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Save all that backward needs of `y = f(x)` but for a second derivative, which is 0.

    `shape` and (dense) `stride` are those of `x`.

    torch returns that 0, where a graph without `x` would say that `x` is not in it. So the node has
    a second output, empty, that leads a second backward to this node and on to `x`.
    """
    ctx.shape, ctx.stride = shape, stride
    if torch.compiler.is_dynamo_compiling():
        ctx.save_for_backward(mask)
        return y
    anchor = y.new_empty(0)
    ctx.save_for_backward(mask, anchor)
    ctx.set_materialize_grads(False)
    return y, anchor


def zeros_of_input(ctx: MaskContext, anchor: Tensor) -> Tensor:
    """The gradient where a second backward came in through the anchor of `save_mask` alone."""
    return torch.zeros(ctx.shape, dtype=anchor.dtype, device=anchor.device)


def unpack(mask: Tensor) -> Tensor:
    """The bits of `mask` as bools, eight times as many along its last dimension."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten(-2).bool()
