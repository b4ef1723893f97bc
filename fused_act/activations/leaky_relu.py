"""LeakyReLU: y = x where x > 0, else negative_slope * x.

Maas, Hannun, Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models", ICML 2013.

The derivative is one of two numbers, so the kernels save one bit an element for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.jit import is_scripting

from fused_act import dispatch
from fused_act._torch_private import saved
from fused_act.families.base import as_float
from fused_act.families.compiled import vary
from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

torch_leaky_relu = own("nn.functional.leaky_relu")

LARGEST_SLOPE = torch.finfo(torch.float32).max


def torch_forward(x: Tensor, negative_slope: float, inplace: bool = False) -> Tensor:
    """torch's own op, or its formula where the slope varies in compiled code.

    The op makes a constant of the slope, unless Inductor decomposes it.
    """
    if torch.compiler.is_dynamo_compiling() and vary((negative_slope,)):
        y = torch.where(x > 0, x, x * negative_slope)
        return x.copy_(y) if inplace else y
    return torch_leaky_relu(x, negative_slope, inplace)


def torch_backward(grad_output: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    return torch.ops.aten.leaky_relu_backward.default(grad_output, x, negative_slope, False)


def torch_parameters(node: Node) -> tuple[float]:
    return (saved(node, "negative_slope"),)


ROW = Elementwise(
    name="leaky_relu",
    spelling="LeakyReLU",
    torch_forward=torch_forward,
    torch_backward=torch_backward,
    parameters=("negative_slope",),
    saves="mask",
    torch_node="LeakyReluBackward0",
    torch_parameters=torch_parameters,
)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """LeakyReLU, y = x where x > 0, else negative_slope * x, applied to each element.

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.leaky_relu`.
        negative_slope: a finite float. Less than 0 is right for the kernels in place too, where
            torch refuses it in backward. A bool, as of the slip `LeakyReLU(True)`, is 0 or 1, as in
            torch. A tensor of one element goes to torch's own op; a forced kernel backend refuses
            it.
        inplace: write the result into `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves one bit an element (the kernels, in place too) or `input` (torch). The gradient
    at exactly 0 and at NaN is that of negative numbers.

    Raises:
        TypeError, ValueError: `negative_slope` is not such a float, or a backend forced by
            `use_backend` does not take `input`.
        RuntimeError: as `torch.nn.functional.leaky_relu`, for dtypes that it does not support and
            for `inplace` on a leaf that requires grad.
    """
    if is_scripting():
        return torch_leaky_relu(input, negative_slope, inplace)
    if isinstance(negative_slope, bool):
        negative_slope = float(negative_slope)
    if isinstance(negative_slope, Tensor) and not dispatch.is_kernel_forced():
        return torch_leaky_relu(input, negative_slope, inplace)
    slope = as_float("leaky_relu", "negative_slope", negative_slope, LARGEST_SLOPE)
    return ROW.activate(input, slope, inplace=inplace)


LeakyReLUFunction = ROW.Function
LeakyReLUFunction.__doc__ = """`LeakyReLUFunction.apply(x, negative_slope)`. Saves bits."""


class LeakyReLU(torch.nn.LeakyReLU):
    """Drop-in for `torch.nn.LeakyReLU`, computed by `fused_act.leaky_relu`.

    Args:
        negative_slope: a finite float, or what `fused_act.leaky_relu` leaves to torch.
        inplace: write the result into the input.

    Raises:
        TypeError, ValueError: `negative_slope` is not such a float.
    """

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False):
        if not isinstance(negative_slope, (bool, Tensor)):
            as_float("leaky_relu", "negative_slope", negative_slope, LARGEST_SLOPE)
        super().__init__(negative_slope, inplace)

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)
