"""The true values: each activation and its derivative in float64; inputs; the error of a result.

The formulas are those of the files in fused_act/activations, arranged so that nothing overflows and
nothing cancels but at the zero of a derivative; float64 has 29 bits more than what is judged by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mish_forward(x: Tensor) -> Tensor:
    e = torch.exp(x.clamp(max=40.0))  # above, tanh(softplus(x)) is 1 in float64
    n = e * (e + 2)
    return x * (n / (n + 2))


def mish_derivative(x: Tensor) -> Tensor:
    clamped = x.clamp(max=40.0)
    e = torch.exp(clamped)
    n = e * (e + 2)
    return (n + 4 * clamped * (e * (e + 1)) / (n + 2)) / (n + 2)


def swish_forward(x: Tensor, beta: float) -> Tensor:
    return x * torch.sigmoid(beta * x)


def swish_derivative(x: Tensor, beta: float) -> Tensor:
    z = (beta * x).clamp(-700.0, 700.0)
    return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))


def relu6_forward(x: Tensor) -> Tensor:
    return x.clamp(0.0, 6.0)


def relu6_derivative(x: Tensor) -> Tensor:
    return ((x > 0) & (x < 6)).double()


def sigmoid_forward(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def sigmoid_derivative_from_output(y: Tensor) -> Tensor:
    return y * (1 - y)


def tanh_forward(x: Tensor) -> Tensor:
    return torch.tanh(x)


def tanh_derivative_from_output(y: Tensor) -> Tensor:
    return (1 - y) * (1 + y)


def relu_forward(x: Tensor) -> Tensor:
    return x.clamp(min=0.0)


def relu_derivative(x: Tensor) -> Tensor:
    return (x > 0).double()


def leaky_relu_forward(x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, x, x * negative_slope)


def leaky_relu_derivative(x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, 1.0, negative_slope)


# Klambauer et al., arXiv:1706.02515. Where y + SCALE_ALPHA cancels, its second part counts.
SCALE = 1.0507009873554804934193349852946
SCALE_ALPHA = 1.7580993408473768599402175208123
SCALE_ALPHA_LOW = 1.4153519380084498e-17


def selu_forward(x: Tensor) -> Tensor:
    return torch.where(x > 0, SCALE * x, SCALE_ALPHA * torch.expm1(x))


def selu_derivative(x: Tensor) -> Tensor:
    return torch.where(x > 0, SCALE, SCALE_ALPHA * torch.exp(x))


def selu_derivative_from_output(y: Tensor) -> Tensor:
    return torch.where(y > 0, SCALE, (y + SCALE_ALPHA) + SCALE_ALPHA_LOW)


def forward(name: str, x: Tensor, *parameters: float) -> Tensor:
    """The activation `name` of float64 `x`."""
    return globals()[f"{name}_forward"](x, *parameters)


def derivative(name: str, x: Tensor, *parameters: float) -> Tensor:
    """The derivative of the activation `name` at float64 `x`."""
    return globals()[f"{name}_derivative"](x, *parameters)


def derivative_from_output(name: str, y: Tensor, *parameters: float) -> Tensor:
    """The derivative of the activation `name` where its output, rounded, is float64 `y`."""
    return globals()[f"{name}_derivative_from_output"](y, *parameters)


def ulp_error(result: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """|result - exact| in units of the last place that `exact` has in `dtype`.

    Below the normal numbers the unit is the smallest step of the format. An infinity is right where
    the exact value rounds to it; elsewhere it counts as the power of two behind the largest number.
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=info.tiny))
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    beyond = 2.0 ** math.frexp(info.max)[1]
    ulps = (result.double().clamp(-beyond, beyond) - exact).abs() / unit
    return torch.where(result.isinf() & (result == exact.to(dtype)), 0.0, ulps)


def all_values(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit dtype, all 65,536 of them, NaNs included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def all_finite(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit dtype: 63,488 of fp16, 65,280 of bf16."""
    values = all_values(dtype)
    return values[values.isfinite()]
