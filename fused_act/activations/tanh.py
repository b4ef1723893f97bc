"""Tanh: y = (exp(x) - exp(-x)) / (exp(x) + exp(-x)).

Why a symmetric sigmoid: LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting

from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

torch_tanh, torch_tanh_ = own("tanh"), own("tanh_")


def torch_forward(x: Tensor, inplace: bool = False) -> Tensor:
    return torch_tanh_(x) if inplace else torch_tanh(x)


ROW = Elementwise(
    name="tanh",
    spelling="Tanh",
    torch_forward=torch_forward,
    torch_backward_from_output=torch.ops.aten.tanh_backward.default,
    saves="y",
)


def tanh(input: Tensor, inplace: bool = False) -> Tensor:
    """Tanh, the hyperbolic tangent, applied to each element.

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.tanh`.
        inplace: write the result into `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves `y`, as torch does, and is exact for this rounded `y`, to any order.

    Raises:
        RuntimeError: as `torch.tanh`, for dtypes that it does not support and for `inplace` on a
            leaf that requires grad.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch_forward(input, inplace)
    return ROW.activate(input, inplace=inplace)


TanhFunction = ROW.Function
TanhFunction.__doc__ = """`TanhFunction.apply(x)`: Tanh as a Function. Saves `y`."""


class Tanh(torch.nn.Tanh):
    """Drop-in for `torch.nn.Tanh`, computed by `fused_act.tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input)
