"""The oracle, in float64, is right to far more bits than what it judges: mpmath has 60 digits."""

import mpmath
import pytest
import torch

from tests.shared.accuracy import as_fp32
from tests.shared.cases import ACCURACY_CASES, all_accuracy_cases
from tests.shared.ulp import ulp_error

mpmath.mp.dps = 60

# From end to end of fp32, around what the formulas clamp, and around the derivatives' zeros.
INPUTS = [
    *(sign * 2.0**exponent for sign in (-1, 1) for exponent in range(-149, 128, 4)),
    *(value / 8 for value in range(-8 * 110, 8 * 110, 5)),
    *(-1.19242 + value / 2**20 for value in range(-20, 20)),
    *(-1.27846 + value / 2**20 for value in range(-20, 20)),
    0.0,
]
SMALLEST = mpmath.mpf(2) ** -149  # the step of fp32, below which nothing is judged


def assert_right(case, kind, definition):
    parameters = as_fp32(case)
    x = torch.tensor(INPUTS, dtype=torch.float64)
    tensors = [torch.tensor(each).double() for each in parameters]
    values = getattr(case.facts, kind)(x, *(tensors if case.facts.weights else parameters))
    for at, value in zip(INPUTS, values.tolist()):
        expected = definition(mpmath.mp, mpmath.mpf(at), *map(mpmath.mpf, parameters))
        # fp32 has 24 bits. Where the terms of a derivative cancel, they are about 1.
        cancels = kind == "derivative" and abs(expected) < 0.01
        scale = 1 if cancels and abs(at) < 2 else abs(expected)
        assert abs(value - expected) <= max(scale * mpmath.mpf(2) ** -45, SMALLEST / 2**20)


@all_accuracy_cases
def test_forward_is_its_definition(case):
    assert_right(case, "forward", case.facts.definition)


@pytest.mark.parametrize("kind", ["derivative", "derivative_from_output", "weight_derivative"])
@all_accuracy_cases
def test_derivatives_are_their_definitions(case, kind):
    facts = case.facts
    definition = {
        "derivative": facts.derivative_definition,
        "derivative_from_output": facts.derivative_definition_from_output,
        "weight_derivative": facts.weight_derivative_definition,
    }[kind]
    assert (definition is None) == (getattr(facts, kind) is None)
    if definition is not None:
        assert_right(case, kind, definition)


@all_accuracy_cases
def test_a_root_is_the_zero_of_the_derivative(case):
    if case.facts.root is not None:
        scale = float(case.facts.exponent(torch.ones(()), *as_fp32(case)))
        if abs(scale) > 1e-3:
            at = mpmath.mpf(case.facts.root) / mpmath.mpf(scale)
            parameters = map(mpmath.mpf, as_fp32(case))
            assert abs(case.facts.derivative_definition(mpmath.mp, at, *parameters)) < 1e-5


def test_every_row_has_its_case():
    from fused_act.activations import ROWS

    assert {case.name for case in ACCURACY_CASES} == ROWS.keys()


def test_an_infinity_beside_the_largest_number_is_an_ulp_off():
    """And right where the exact value rounds to it, as wrong as it is where it is far away."""
    largest = torch.finfo(torch.float32).max
    step = 2.0**104
    exact = torch.tensor([largest, largest + step, 2.0**120, -largest], dtype=torch.float64)
    result = torch.tensor([float("inf")] * 3 + [float("-inf")])
    assert ulp_error(result, exact, torch.float32).tolist() == [
        1.0,
        0.0,
        (2.0**128 - 2.0**120) / 2.0**97,
        1.0,
    ]
