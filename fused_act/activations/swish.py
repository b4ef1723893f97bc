"""Swish: y = x * sigmoid(beta * x); SiLU is Swish with beta = 1.

Ramachandran, Zoph, Le, "Searching for Activation Functions", 2017, arXiv:1710.05941; SiLU:
Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units", 2017, arXiv:1702.03118.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_scripting

from fused_act.activation import Activation, activate, as_float


def exponential(x: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """w = z / 2 clamped to where f' rounds to 1, h = exp(w), and q = h / (1 + h^2).

    Then sigmoid(z) = q * h, and a product with one after the other keeps the tail.
    """
    # Only a beta beyond 2 makes -inf of a finite x, and the derivative NaN of that.
    minimum = -120.0 if abs(beta) > 2.0 else None
    w = torch.clamp(x * (0.5 * beta), min=minimum, max=11.0)
    h = torch.exp(w)
    return w, h, h / (1.0 + h * h)


def forward(x: Tensor, beta: float) -> Tensor:
    _, h, q = exponential(x, beta)
    return x * q * h


def derivative(x: Tensor, beta: float) -> Tensor:
    w, h, q = exponential(x, beta)
    return q * (w * (2.0 * q) + h)


def torch_forward(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    """torch has no Swish: `F.silu` where beta is 1, else the definition."""
    if beta == 1.0:
        return F.silu(x, inplace=inplace)
    if isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"swish: expected x to be floating point or complex, got {x.dtype}")
    gate = torch.sigmoid(beta * x)
    return x.mul_(gate) if inplace else x * gate


def torch_backward(grad_output: Tensor, x: Tensor, beta: float) -> Tensor:
    # torch refuses to differentiate SiLU of complex numbers; called like this, it gets it wrong.
    if beta == 1.0 and not x.is_complex():
        return torch.ops.aten.silu_backward.default(grad_output, x)
    gate = torch.sigmoid(beta * x)
    # As autograd has it, bit for bit, and of complex numbers too.
    through_gate = torch.ops.aten.sigmoid_backward.default(grad_output * x.conj(), gate)
    return grad_output * gate.conj() + through_gate * beta


SWISH = Activation(
    name="swish",
    torch_forward=torch_forward,
    torch_backward=torch_backward,
    forward=forward,
    derivative=derivative,
    parameters=("beta",),
    # Inductor does torch's own SiLU as well as it can be done. Beyond 1e30, x * q underflows.
    fuses=lambda beta: beta != 1.0 and abs(beta) <= 1e30,
    torch_node=lambda node: (1.0,) if node.name() == "SiluBackward0" else None,
)


# Up to here fp32 holds beta * log2(e). Beyond, it would be infinite, and NaN for x = 0.
LARGEST_BETA = 2.3e38


def swish(x: Tensor, beta: float = 1.0, inplace: bool = False) -> Tensor:
    """Swish, y = x * sigmoid(beta * x), applied to each element (arXiv:1710.05941).

    Args:
        x: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.silu` (beta = 1) or
            `x * torch.sigmoid(beta * x)`.
        beta: a float, at most 2.3e38 in magnitude.
        inplace: write the result into `x`.

    Returns:
        A tensor of the shape, dtype and memory format of `x`; `x` itself if `inplace`.

    Backward saves `x` (a copy of it if `inplace`) and is exact, to any order.

    Raises:
        TypeError, ValueError: `beta` is not such a float, or a backend forced by `use_backend`
            does not take `x`.
        RuntimeError: as `torch.nn.functional.silu`, for dtypes that it does not support and for
            `inplace` on a leaf that requires grad.
    """
    if is_scripting():
        return torch_forward(x, beta, inplace)
    return activate(SWISH, x, inplace, as_float("swish", "beta", beta, LARGEST_BETA))


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """SiLU, y = x * sigmoid(x): `swish` with beta = 1. See there (arXiv:1702.03118)."""
    if is_scripting():
        return F.silu(x, inplace)
    return activate(SWISH, x, inplace, 1.0)


SwishFunction = SWISH.Function
SwishFunction.__doc__ = """`SwishFunction.apply(x, beta)`: Swish as a Function. Saves `x`."""


class Swish(torch.nn.Module):
    """Swish with a fixed beta, computed by `fused_act.swish`.

    Args:
        beta: a float, at most 2.3e38 in magnitude.
        inplace: write the result into the input.

    Raises:
        TypeError, ValueError: `beta` is not such a float.
    """

    def __init__(self, beta: float = 1.0, inplace: bool = False):
        super().__init__()
        self.beta = as_float("swish", "beta", beta, LARGEST_BETA)
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return swish(input, self.beta, self.inplace)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, inplace=True" if self.inplace else f"beta={self.beta}"


class SiLU(torch.nn.SiLU):
    """Drop-in for `torch.nn.SiLU`, computed by `fused_act.silu`.

    Args:
        inplace: write the result into the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)
