"""The oracle, in float64, is right to far more bits than what it judges: mpmath has 60 digits."""

import mpmath
import pytest
import torch

from benchmarks import oracle
from tests.cases import ACCURACY_CASES

mpmath.mp.dps = 60

# From end to end of fp32, around what the formulas clamp, and around the derivatives' zeros.
INPUTS = [
    *(sign * 2.0**exponent for sign in (-1, 1) for exponent in range(-149, 128, 4)),
    *(value / 8 for value in range(-8 * 110, 8 * 110, 5)),
    *(-1.19242 + value / 2**20 for value in range(-20, 20)),
    *(-1.27846 + value / 2**20 for value in range(-20, 20)),
    0.0,
]


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def mish_forward(x):
    return x * mpmath.tanh(mpmath.log1p(mpmath.exp(x)))


def mish_derivative(x):
    tanh = mpmath.tanh(mpmath.log1p(mpmath.exp(x)))
    return tanh + x * (1 - tanh**2) * sigmoid(x)


def swish_forward(x, beta):
    return x * sigmoid(beta * x)


def swish_derivative(x, beta):
    return sigmoid(beta * x) + beta * x * sigmoid(beta * x) * (1 - sigmoid(beta * x))


def relu6_forward(x):
    return min(max(x, 0), 6)


def relu6_derivative(x):
    return mpmath.mpf(0 < x < 6)


def sigmoid_forward(x):
    return sigmoid(x)


def sigmoid_derivative_from_output(y):
    return y * (1 - y)


def tanh_forward(x):
    return mpmath.tanh(x)


def tanh_derivative_from_output(y):
    return 1 - y**2


def relu_forward(x):
    return max(x, mpmath.mpf(0))


def relu_derivative(x):
    return mpmath.mpf(x > 0)


def leaky_relu_forward(x, negative_slope):
    return x if x > 0 else negative_slope * x


def leaky_relu_derivative(x, negative_slope):
    return mpmath.mpf(1) if x > 0 else negative_slope


def selu_constants():
    """For the fixed point of mean 0 and variance 1: Klambauer et al., arXiv:1706.02515."""
    root_e = mpmath.sqrt(mpmath.e)
    erfc1, erfc2 = mpmath.erfc(1 / mpmath.sqrt(2)), mpmath.erfc(mpmath.sqrt(2))
    alpha = -mpmath.sqrt(2 / mpmath.pi) / (erfc1 * root_e - 1)
    scale = (1 - erfc1 * root_e) * mpmath.sqrt(2 * mpmath.pi)
    scale /= mpmath.sqrt(
        2 * erfc2 * mpmath.e**2
        + mpmath.pi * erfc1**2 * mpmath.e
        - 2 * (2 + mpmath.pi) * erfc1 * root_e
        + mpmath.pi
        + 2
    )
    return alpha, scale


ALPHA, SCALE = selu_constants()


def selu_forward(x):
    return SCALE * (x if x > 0 else ALPHA * mpmath.expm1(x))


def selu_derivative(x):
    return SCALE * (1 if x > 0 else ALPHA * mpmath.exp(x))


def selu_derivative_from_output(y):
    return SCALE if y > 0 else y + SCALE * ALPHA


CASES_AND_KINDS = [
    (case, kind)
    for case in ACCURACY_CASES
    for kind in ("forward", "derivative", "derivative_from_output")
    if f"{case.name}_{kind}" in globals()
]


@pytest.mark.parametrize(("case", "kind"), CASES_AND_KINDS, ids=str)
def test_oracle_is_right(case, kind):
    parameters = torch.tensor(case.parameters).double().tolist()
    x = torch.tensor(INPUTS, dtype=torch.float64)
    values = getattr(oracle, kind)(case.name, x, *parameters).tolist()
    definition = globals()[f"{case.name}_{kind}"]
    smallest = mpmath.mpf(2) ** -149  # the step of fp32, below which nothing is judged
    for at, value in zip(INPUTS, values):
        expected = definition(mpmath.mpf(at), *map(mpmath.mpf, parameters))
        # fp32 has 24 bits. Where the terms of a derivative cancel, they are about 1.
        cancels = kind == "derivative" and abs(expected) < 0.01
        scale = 1 if cancels and abs(at) < 2 else abs(expected)
        assert abs(value - expected) <= max(scale * mpmath.mpf(2) ** -45, smallest / 2**20)


def test_an_infinity_beside_the_largest_number_is_an_ulp_off():
    """And right where the exact value rounds to it, as wrong as it is where it is far away."""
    largest = torch.finfo(torch.float32).max
    step = 2.0**104
    exact = torch.tensor([largest, largest + step, 2.0**120, -largest], dtype=torch.float64)
    result = torch.tensor([float("inf")] * 3 + [float("-inf")])
    assert oracle.ulp_error(result, exact, torch.float32).tolist() == [
        1.0,
        0.0,
        (2.0**128 - 2.0**120) / 2.0**97,
        1.0,
    ]
