"""Swish: y = x * sigmoid(beta * x); SiLU is Swish with beta = 1.

Ramachandran, Zoph, Le, "Searching for Activation Functions", 2017, arXiv:1710.05941; SiLU:
Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units", 2017, arXiv:1702.03118.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting

from fused_act.families.base import as_float
from fused_act.families.compiled import holds, is_known
from fused_act.families.elementwise import Elementwise
from fused_act.families.weighted import Weighted, channels
from fused_act.libraries import own

torch_sigmoid, torch_silu = own("sigmoid"), own("nn.functional.silu")


def exponential(x: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """w = z / 2 clamped to where f' rounds to 1, h = exp(w), and q = h / (1 + h^2).

    Then sigmoid(z) = q * h, and a product with one after the other keeps the tail.
    """
    # Only a beta beyond 2 makes -inf of a finite x, and the derivative NaN of that.
    minimum = None if is_known(abs(beta) <= 2.0) else -120.0
    # A product of x and a symbol becomes one of tensors; one of a number and a symbol may not.
    z = x * 0.5 * beta if isinstance(beta, torch.SymFloat) else x * (0.5 * beta)
    w = torch.clamp(z, min=minimum, max=11.0)
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
    if is_known(beta == 1.0):
        return torch_silu(x, inplace=inplace)
    if isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"swish: expected input to be floating point or complex, got {x.dtype}")
    return definition(x, beta, inplace)


def sigmoid(z: Tensor) -> Tensor:
    """`torch.sigmoid`; in compiled code as a method.

    Dynamo does not know a function that users replaced before the first compilation.
    """
    if is_scripting():
        return torch_sigmoid(z)
    return z.sigmoid() if torch.compiler.is_dynamo_compiling() else torch_sigmoid(z)


def definition(x: Tensor, beta: float, inplace: bool) -> Tensor:
    gate = sigmoid(beta * x)
    return x.mul_(gate) if inplace else x * gate


def torch_backward(grad_output: Tensor, x: Tensor, beta: float) -> Tensor:
    # torch refuses to differentiate SiLU of complex numbers; called like this, it gets it wrong.
    if beta == 1.0 and not x.is_complex():
        return torch.ops.aten.silu_backward.default(grad_output, x)
    gate = sigmoid(beta * x)
    # As autograd has it, bit for bit, and of complex numbers too.
    through_gate = torch.ops.aten.sigmoid_backward.default(grad_output * x.conj(), gate)
    return grad_output * gate.conj() + through_gate * beta


ROW = Elementwise(
    name="swish",
    spelling="Swish",
    torch_forward=torch_forward,
    torch_backward=torch_backward,
    forward=forward,
    derivative=derivative,
    parameters=("beta",),
    # Inductor does torch's own SiLU as well as it can be done. Beyond 1e30, x * q underflows.
    fuses=lambda beta: not is_known(beta == 1.0) and holds(abs(beta) <= 1e30),
    torch_node="SiluBackward0",
    torch_parameters=lambda node: (1.0,),
)


def torch_learnable(x: Tensor, beta: Tensor) -> Tensor:
    """The definition, with one beta or with one for each channel, which is dimension 1."""
    if x.dim() > 1:
        beta = beta.reshape([1, -1] + [1] * (x.dim() - 2))
    else:
        beta = beta.reshape([1] * x.dim())
    return (x * sigmoid(beta * x)).to(x.dtype)


torch.fx.wrap("torch_learnable")  # a node of the graph: a symbolic x has no number of dimensions


def checked_learnable(x: Tensor, beta: Tensor) -> Tensor:
    """`torch_learnable`, or an error for a beta that does not fit."""
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"swish: expected input to be floating point or complex, got {x.dtype}")
    if beta.dtype not in (x.dtype, torch.float32):
        expected = " or ".join(dict.fromkeys(map(str, (x.dtype, torch.float32))))
        raise TypeError(f"swish: expected beta to be {expected}, got {beta.dtype}")
    if torch.jit.is_tracing():  # where sizes are tensors
        return torch_learnable(x, beta)
    if beta.dim() > 1 or beta.numel() not in (1, channels(x)):
        raise ValueError(
            f"swish: expected beta of shape (1,) or ({channels(x)},) for input of shape "
            f"{tuple(x.shape)}, got {tuple(beta.shape)}"
        )
    return torch_learnable(x, beta)


LEARNABLE_ROW = Weighted(
    name="learnable_swish",
    spelling="LearnableSwish",
    torch_forward=checked_learnable,
    derived_from=ROW,
    takes_fp32=True,
)


# Up to here fp32 holds beta * log2(e). Beyond, it would be infinite, and NaN for x = 0.
LARGEST_BETA = 2.3e38


def swish(input: Tensor, beta: float | Tensor = 1.0, inplace: bool = False) -> Tensor:
    """Swish, y = x * sigmoid(beta * x), applied to each element (arXiv:1710.05941).

    Args:
        input: any shape and strides. On a GPU float16, bfloat16 and float32 run fused kernels; all
            other tensors, and all other devices, get `torch.nn.functional.silu` (beta = 1) or
            `x * torch.sigmoid(beta * x)`.
        beta: a float, at most 2.3e38 in magnitude; or a tensor, to be learnt, of shape (), (1,) or
            (input.size(1),), in the dtype of `input` or in float32: one for each channel, or one
            for all.
        inplace: write the result into `input`; not with a tensor `beta`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`; `input` itself if `inplace`.

    Backward saves `input` (a copy of it if `inplace`) and is exact, to any order. That of a tensor
    `beta` is summed in fp32, in the same pass and in an order that is always the same.

    Raises:
        TypeError, ValueError: `beta` is not such a float or tensor, or a backend forced by
            `use_backend` does not take `input`.
        RuntimeError: as `torch.nn.functional.silu`, for dtypes that it does not support and for
            `inplace` on a leaf that requires grad.
    """
    if is_scripting():
        if isinstance(beta, Tensor):
            return torch_learnable(input, beta)
        return torch_silu(input, inplace) if beta == 1.0 else definition(input, beta, inplace)
    if not isinstance(beta, (Tensor, torch.fx.Proxy)):
        return ROW.activate(input, as_float("swish", "beta", beta, LARGEST_BETA), inplace=inplace)
    if inplace:
        raise ValueError("swish: expected inplace=False with a tensor beta, got True")
    if isinstance(input, torch.fx.Proxy):
        return torch_learnable(input, beta)
    return LEARNABLE_ROW.activate(input, beta)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """SiLU, y = x * sigmoid(x): `swish` with beta = 1. See there (arXiv:1702.03118)."""
    if is_scripting():
        return torch_silu(input, inplace)
    return ROW.activate(input, 1.0, inplace=inplace)


SwishFunction = ROW.Function
SwishFunction.__doc__ = """`SwishFunction.apply(x, beta)`: Swish as a Function. Saves `x`."""
LearnableSwishFunction = LEARNABLE_ROW.Function
LearnableSwishFunction.__doc__ = """`LearnableSwishFunction.apply(x, beta)`, for a tensor `beta`."""


class Swish(torch.nn.Module):
    """Swish with a fixed or a learnable beta, computed by `fused_act.swish`.

    Args:
        beta: a float, at most 2.3e38 in magnitude; a learnable one begins with it.
        inplace: write the result into the input; not with a learnable beta.
        learnable: `beta` is a parameter, as in arXiv:1710.05941.
        num_parameters: of a learnable beta: 1, or the number of channels.
        device, dtype: those of a learnable beta.

    Attributes:
        init: what a learnable beta begins with, and `reset_parameters` gives it again.

    Raises:
        TypeError, ValueError: `beta` is not such a float, or the others do not go together.
    """

    def __init__(
        self,
        beta: float = 1.0,
        inplace: bool = False,
        *,
        learnable: bool = False,
        num_parameters: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        beta = as_float("swish", "beta", beta, LARGEST_BETA)
        if learnable and inplace:
            raise ValueError("Swish: expected inplace=False with learnable=True, got True")
        if not learnable and num_parameters != 1:
            raise ValueError(
                f"Swish: expected num_parameters=1 without learnable=True, got {num_parameters}"
            )
        self.init = beta
        self.beta: float | torch.nn.Parameter = beta
        if learnable:
            self.beta = torch.nn.Parameter(
                torch.full((num_parameters,), beta, device=device, dtype=dtype)
            )
        self.inplace = inplace

    def reset_parameters(self) -> None:
        """Give a learnable beta the value that it began with."""
        if isinstance(self.beta, Tensor):
            torch.nn.init.constant_(self.beta, self.init)

    def forward(self, input: Tensor) -> Tensor:
        return swish(input, self.beta, self.inplace)

    def extra_repr(self) -> str:
        if isinstance(self.beta, Tensor):
            return f"learnable=True, num_parameters={self.beta.numel()}"
        return f"beta={self.beta}, inplace=True" if self.inplace else f"beta={self.beta}"


class SiLU(torch.nn.SiLU):
    """Drop-in for `torch.nn.SiLU`, computed by `fused_act.silu`.

    Args:
        inplace: write the result into the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)
