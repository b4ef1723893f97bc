"""CReLU: y = cat([relu(x), relu(-x)], dim).

Shang, Sohn, Almeida, Lee, "Understanding and Improving Convolutional Neural Networks via
Concatenated Rectified Linear Units", 2016, arXiv:1603.05201.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting

from fused_act.activations.relu import ROW as RELU
from fused_act.activations.relu import torch_relu
from fused_act.families.mirrored import Mirrored

ROW = Mirrored(name="crelu", spelling="CReLU", derived_from=RELU)


def crelu(input: Tensor, dim: int = 1) -> Tensor:
    """CReLU, y = cat([relu(x), relu(-x)], dim) (arXiv:1603.05201).

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get torch's `cat` and `relu`.
        dim: the dimension that is twice as long in the result; 1 has the channels.

    Returns:
        A tensor of the dtype and memory format of `input`, twice as long along `dim`.

    The kernels read `input` once and write the result once. Backward saves one bit for each element
    of the result (the kernels) or both halves (torch). The gradient is 0 at exactly 0; NaN passes
    it on.

    Raises:
        IndexError, RuntimeError: as `torch.cat`, for a `dim` that does not exist and for a tensor
            without dimensions, and as `torch.relu`, for dtypes that it does not support.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch.cat([torch_relu(input), torch_relu(-input)], dim)
    return ROW.activate(input, dim)


CReLUFunction = ROW.Function
CReLUFunction.__doc__ = """`CReLUFunction.apply(x, dim)`: CReLU as a Function. Saves bits."""


class CReLU(torch.nn.Module):
    """The module of `fused_act.crelu`; torch has none.

    Args:
        dim: the dimension that is twice as long in the output; 1 has the channels.
    """

    __constants__ = ("dim",)

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return crelu(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
