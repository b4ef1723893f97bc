"""ReLU6: y = min(max(x, 0), 6).

Krizhevsky, "Convolutional Deep Belief Networks on CIFAR-10", 2010; Howard et al., "MobileNets",
2017, arXiv:1704.04861.

The derivative is 0 or 1, so the kernels save one bit an element for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.jit import is_scripting

from fused_act._torch_private import saved
from fused_act.families.elementwise import Elementwise
from fused_act.libraries import own

torch_relu6 = own("nn.functional.relu6")


def torch_backward(grad_output: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.hardtanh_backward.default(grad_output, x, 0.0, 6.0)


def torch_parameters(node: Node) -> tuple[()] | None:
    """A ReLU6 is a Hardtanh with these bounds."""
    return () if (saved(node, "min_val"), saved(node, "max_val")) == (0, 6) else None


ROW = Elementwise(
    name="relu6",
    spelling="ReLU6",
    torch_forward=torch_relu6,
    torch_backward=torch_backward,
    saves="mask",
    torch_node="HardtanhBackward0",
    torch_parameters=torch_parameters,
)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """ReLU6, y = min(max(x, 0), 6), applied to each element (arXiv:1704.04861).

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.relu6`.
        inplace: write the result into `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves one bit an element (the kernels, in place too) or `input` (torch). The gradient
    is 0 at exactly 0 and 6; NaN passes it on.

    Raises:
        RuntimeError: as `torch.nn.functional.relu6`, for dtypes that it does not support and for
            `inplace` on a leaf that requires grad.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch_relu6(input, inplace)
    return ROW.activate(input, inplace=inplace)


ReLU6Function = ROW.Function
ReLU6Function.__doc__ = """`ReLU6Function.apply(x)`: ReLU6 as a Function. Saves bits."""


class ReLU6(torch.nn.ReLU6):
    """Drop-in for `torch.nn.ReLU6`, computed by `fused_act.relu6`.

    Args:
        inplace: write the result into the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return relu6(input, self.inplace)
