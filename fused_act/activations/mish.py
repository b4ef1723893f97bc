"""Mish: y = x * tanh(softplus(x)).

Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019, arXiv:1908.08681.

With e = exp(x) and n = e * (e + 2), tanh(softplus(x)) = n / (n + 2): one exponential and one
reciprocal instead of an exponential, a logarithm and a hyperbolic tangent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_act.activation import Activation, activate


def exponential(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h = exp(x / 2), e = h * h and r = 1 / (n + 2).

    exp(x / 2) keeps what exp(x) flushes: multiplied in twice, at the end, it leaves the negative
    tail exact to the last bits, where torch's own is off by 1.7e7 ULP. Above 20, y = x in fp32;
    the clamp keeps n finite.
    """
    h = torch.exp(torch.clamp(x, max=20.0) * 0.5)
    e = h * h
    return h, e, 1.0 / (e * (e + 2.0) + 2.0)


def forward(x: Tensor) -> Tensor:
    h, e, r = exponential(x)
    return x * h * h * ((e + 2.0) * r)


def derivative(x: Tensor) -> Tensor:
    h, e, r = exponential(x)
    clamped = torch.clamp(x, max=20.0)
    return r * (4.0 * clamped * r * (e + 1.0) + (e + 2.0)) * h * h


MISH = Activation(
    name="mish",
    torch_forward=F.mish,
    torch_backward=torch.ops.aten.mish_backward.default,
    forward=forward,
    derivative=derivative,
    fuses=lambda: True,
)


def mish(x: Tensor, inplace: bool = False) -> Tensor:
    """Mish, y = x * tanh(softplus(x)), applied to each element (arXiv:1908.08681).

    Args:
        x: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.mish`.
        inplace: write the result into `x`.

    Returns:
        A tensor of the shape, dtype and memory format of `x`; `x` itself if `inplace`.

    Backward saves `x` (a copy of it if `inplace`) and is exact, to any order.

    Raises:
        RuntimeError: as `torch.nn.functional.mish`, for dtypes that it does not support and for
            `inplace` on a leaf that requires grad.
        TypeError, ValueError: a backend forced by `use_backend` does not take `x`.
    """
    if torch.jit.is_scripting():
        return F.mish(x, inplace)
    return activate(MISH, x, inplace)


MishFunction = MISH.Function
MishFunction.__doc__ = """`MishFunction.apply(x)`: Mish as a Function. Saves `x`."""


class Mish(torch.nn.Mish):
    """Drop-in for `torch.nn.Mish`, computed by `fused_act.mish`.

    Args:
        inplace: write the result into the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return mish(input, self.inplace)
