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


@pytest.mark.parametrize("case", ACCURACY_CASES, ids=str)
@pytest.mark.parametrize("kind", ["forward", "derivative"])
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
