"""PReLU: y = x where x > 0, else weight * x, with a learnable weight.

He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015, arXiv:1502.01852.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting

from fused_act.families.weighted import Weighted
from fused_act.libraries import own

torch_prelu = own("nn.functional.prelu")

ROW = Weighted(name="prelu", spelling="PReLU", torch_forward=torch_prelu, autocasts=True)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """PReLU, y = x where x > 0, else weight * x, applied to each element (arXiv:1502.01852).

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.prelu`.
        weight: of the dtype and device of `input`; one element, or one for each channel, which is
            dimension 1 of `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`.

    Backward saves `input` and `weight`. In one pass it makes the gradient of `input`, which at
    exactly 0 is that of negative numbers, and that of `weight`: partial sums in fp32, then their
    sum, in an order that is always the same.

    Raises:
        RuntimeError: as `torch.nn.functional.prelu`, for a weight of another dtype or length.
        TypeError, ValueError: a backend forced by `use_backend` does not take `input`.
    """
    if is_scripting():
        return torch_prelu(input, weight)
    return ROW.activate(input, weight)


PReLUFunction = ROW.Function
PReLUFunction.__doc__ = """`PReLUFunction.apply(x, weight)`: PReLU as a Function. Saves both."""


class PReLU(torch.nn.PReLU):
    """Drop-in for `torch.nn.PReLU`, computed by `fused_act.prelu`.

    Args:
        num_parameters: 1, or the number of channels.
        init: the weights to begin with.
        device, dtype: those of the weights.
    """

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)
