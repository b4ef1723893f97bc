"""Mish: y = x * tanh(softplus(x)).

Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019, arXiv:1908.08681.

With e = exp(x) and n = e * (e + 2), tanh(softplus(x)) = n / (n + 2): one exponential and one
reciprocal instead of an exponential, a logarithm and a hyperbolic tangent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting

from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

torch_mish = own("nn.functional.mish")

# Below, e^x is subnormal and results take e^(x/2) twice. torch's own is off by 1.7e7 ULP there.
TAIL = -87.0


def exponential(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x clamped to where n is finite (y = x in fp32 above 20), whether it is in the tail, and e."""
    clamped = torch.clamp(x, max=20.0)
    tail = clamped < TAIL
    return clamped, tail, torch.exp(torch.where(tail, 0.5 * clamped, clamped))


def forward(x: Tensor) -> Tensor:
    _, tail, e = exponential(x)
    n = e * (e + 2.0)
    return torch.where(tail, x * e * e, x * (n / (n + 2.0)))


def derivative(x: Tensor) -> Tensor:
    clamped, tail, e = exponential(x)
    n = e * (e + 2.0)
    r = 1.0 / (n + 2.0)
    bulk = r * (4.0 * clamped * r * (e * e + e) + n)
    return torch.where(tail, (1.0 + clamped) * e * e, bulk)


ROW = Elementwise(
    name="mish",
    spelling="Mish",
    torch_forward=torch_mish,
    torch_backward=torch.ops.aten.mish_backward.default,
    forward=forward,
    derivative=derivative,
    fuses=lambda: True,
    torch_node="MishBackward0",
)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Mish, y = x * tanh(softplus(x)), applied to each element (arXiv:1908.08681).

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.mish`.
        inplace: write the result into `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves `input` (a copy of it if `inplace`) and is exact, to any order.

    Raises:
        RuntimeError: as `torch.nn.functional.mish`, for dtypes that it does not support and for
            `inplace` on a leaf that requires grad.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch_mish(input, inplace)
    return ROW.activate(input, inplace=inplace)


MishFunction = ROW.Function
MishFunction.__doc__ = """`MishFunction.apply(x)`: Mish as a Function. Saves `x`."""


class Mish(torch.nn.Mish):
    """Drop-in for `torch.nn.Mish`, computed by `fused_act.mish`.

    Args:
        inplace: write the result into the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return mish(input, self.inplace)
