"""ReLU: y = max(x, 0).

Nair, Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", ICML 2010.

The derivative is 0 or 1, so the kernels save one bit an element for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting
from torch.overrides import has_torch_function_unary

from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

F_relu = own("nn.functional.relu")
torch_relu, torch_relu_ = own("relu"), own("relu_")


def torch_forward(x: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu` for subclasses. For others not, since it calls `torch.relu`, which may be ours."""
    if has_torch_function_unary(x):
        return F_relu(x, inplace)
    return torch_relu_(x) if inplace else torch_relu(x)


def torch_backward(grad_output: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.default(grad_output, x, 0)


ROW = Elementwise(
    name="relu",
    spelling="ReLU",
    torch_forward=torch_forward,
    torch_backward=torch_backward,
    saves="mask",
)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """ReLU, y = max(x, 0), applied to each element.

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.relu`.
        inplace: write the result into `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves one bit an element (the kernels) or `y` (torch). The gradient is 0 at exactly 0;
    NaN passes it on.

    Raises:
        RuntimeError: as `torch.nn.functional.relu`, for dtypes that it does not support and for
            `inplace` on a leaf that requires grad.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch_relu_(input) if inplace else torch_relu(input)
    return ROW.activate(input, inplace=inplace)


ReLUFunction = ROW.Function
ReLUFunction.__doc__ = """`ReLUFunction.apply(x)`: ReLU as a Function. Saves bits."""


class ReLU(torch.nn.ReLU):
    """Drop-in for `torch.nn.ReLU`, computed by `fused_act.relu`.

    Args:
        inplace: write the result into the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)
