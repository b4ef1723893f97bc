"""The error of a result in units of the last place, and all inputs that 16 bits have."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ulp_error(result: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """|result - exact| in units of the last place that `exact` has in `dtype`.

    Below the normal numbers the unit is the smallest step of the format. An infinity is right where
    the exact value rounds to it; elsewhere it counts as the power of two behind the largest number.
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=info.tiny))
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    beyond = 2.0 ** math.frexp(info.max)[1]
    ulps = (result.double().clamp(-beyond, beyond) - exact).abs() / unit
    return torch.where(result.isinf() & (result == exact.to(dtype)), 0.0, ulps)


def all_values(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit dtype, all 65,536 of them, NaNs included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def all_finite(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit dtype: 63,488 of fp16, 65,280 of bf16."""
    values = all_values(dtype)
    return values[values.isfinite()]
