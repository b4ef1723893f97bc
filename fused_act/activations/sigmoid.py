"""Sigmoid: y = 1 / (1 + exp(-x)), the logistic function.

Its use in networks: Rumelhart, Hinton, Williams, "Learning Representations by Back-Propagating
Errors", Nature 323, 1986.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting

from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

torch_sigmoid, torch_sigmoid_ = own("sigmoid"), own("sigmoid_")


def torch_forward(x: Tensor, inplace: bool = False) -> Tensor:
    return torch_sigmoid_(x) if inplace else torch_sigmoid(x)


ROW = Elementwise(
    name="sigmoid",
    spelling="Sigmoid",
    torch_forward=torch_forward,
    torch_backward_from_output=torch.ops.aten.sigmoid_backward.default,
    saves="y",
)


def sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Sigmoid, y = 1 / (1 + exp(-x)), applied to each element.

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.sigmoid`.
        inplace: write the result into `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves `y`, as torch does, and is exact for this rounded `y`, to any order.

    Raises:
        RuntimeError: as `torch.sigmoid`, for dtypes that it does not support and for `inplace` on a
            leaf that requires grad.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch_forward(input, inplace)
    return ROW.activate(input, inplace=inplace)


SigmoidFunction = ROW.Function
SigmoidFunction.__doc__ = """`SigmoidFunction.apply(x)`: Sigmoid as a Function. Saves `y`."""


class Sigmoid(torch.nn.Sigmoid):
    """Drop-in for `torch.nn.Sigmoid`, computed by `fused_act.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input)
