"""SELU: y = scale * x where x > 0, else scale * alpha * (exp(x) - 1).

Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing Neural Networks", 2017,
arXiv:1706.02515. Its two constants keep mean 0 and variance 1 from layer to layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.jit import is_scripting
from torch.overrides import has_torch_function_unary

from fused_act._torch_private import saved
from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

ALPHA = 1.6732632423543772848170429916717
SCALE = 1.0507009873554804934193349852946

F_selu = own("nn.functional.selu")
torch_selu, torch_selu_ = own("selu"), own("selu_")


def torch_forward(x: Tensor, inplace: bool = False) -> Tensor:
    """`F.selu` for subclasses. For others not, since it calls `torch.selu`, which may be ours."""
    if has_torch_function_unary(x):
        return F_selu(x, inplace)
    return torch_selu_(x) if inplace else torch_selu(x)


def torch_backward(grad_output: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.elu_backward.default(grad_output, ALPHA, SCALE, 1.0, False, x)


def torch_backward_from_output(grad_output: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.elu_backward.default(grad_output, ALPHA, SCALE, 1.0, True, y)


def torch_parameters(node: Node) -> tuple[()] | None:
    """A SELU is an ELU with these constants."""
    constants = saved(node, "alpha"), saved(node, "scale"), saved(node, "input_scale")
    return () if constants == (ALPHA, SCALE, 1) else None


ROW = Elementwise(
    name="selu",
    spelling="SELU",
    torch_forward=torch_forward,
    torch_backward=torch_backward,
    torch_backward_from_output=torch_backward_from_output,
    torch_node="EluBackward0",
    torch_parameters=torch_parameters,
)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """SELU, scale * (x where x > 0, else alpha * (exp(x) - 1)), of each element (arXiv:1706.02515).

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.selu`.
        inplace: write the result into `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves `input`, or `y` if `inplace`, as torch does. Out of place it is exact; in place
    it is so for the rounded `y`, which for x far below 0 is the limit, whose derivative is 0.

    Raises:
        RuntimeError: as `torch.nn.functional.selu`, for dtypes that it does not support and for
            `inplace` on a leaf that requires grad.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch_selu_(input) if inplace else torch_selu(input)
    return ROW.activate(input, inplace=inplace)


SELUFunction = ROW.Function
SELUFunction.__doc__ = """`SELUFunction.apply(x)`: SELU as a Function. Saves `x`."""


class SELU(torch.nn.SELU):
    """Drop-in for `torch.nn.SELU`, computed by `fused_act.selu`.

    Args:
        inplace: write the result into the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return selu(input, self.inplace)
