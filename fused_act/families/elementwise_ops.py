"""The raw ops of elementwise activations: what they return, and which arguments they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_act.families.raw_op import (
    check,
    check_mask,
    check_stride,
    empty_mask,
    empty_strided,
)


def nothing(x: Tensor, *parameters: float, out: Tensor) -> None:
    return None


def mask_of(x: Tensor, *parameters: float, out: Tensor) -> Tensor:
    return empty_mask(x, mask_numel(x))


def like_x_and_mask(x: Tensor, *parameters: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_mask(x, mask_numel(x))


def like_saved(grad_output: Tensor, saved: Tensor, *parameters: float) -> Tensor:
    return torch.empty_like(saved)


def like_grad_output(grad_output: Tensor, mask: Tensor, *parameters_and_stride: Any) -> Tensor:
    return empty_strided(grad_output, grad_output.shape, parameters_and_stride[-1])


def check_x(
    op: str,
    device_types: tuple[str, ...] | None,
    x: Tensor,
    *args: Tensor | float,
    out: Tensor | None = None,
) -> None:
    """The arguments of forward, or those of backward: `grad_output`, then what is saved."""
    check(op, device_types, x, args[0] if args and isinstance(args[0], Tensor) else out)


def check_masked_backward(
    op: str,
    device_types: tuple[str, ...] | None,
    grad_output: Tensor,
    mask: Tensor,
    *parameters_and_stride: Any,
) -> None:
    check(op, device_types, grad_output)
    check_mask(op, grad_output, mask, (mask_numel(grad_output),))
    check_stride(op, grad_output.shape, parameters_and_stride[-1])


def mask_numel(x: Tensor) -> int:
    """Bytes of a mask for `x`: one bit an element."""
    return (x.numel() + 7) // 8
