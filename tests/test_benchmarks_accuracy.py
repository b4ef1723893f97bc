"""What `python -m benchmarks accuracy` judges."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import accuracy, providers
from fused_act.activations import ROWS
from tests.shared import ulp
from tests.shared.benchmarks import provider, provider_called, raise_value_error


def measured(name, dtype="fp16", **functions):
    """The rows of what computes an activation, or of torch's own, by provider, kind and region."""
    compared = [provider(each, function) for each, function in functions.items()]
    found = accuracy.measure(compared or [provider_called("aten")], ROWS[name], dtype, mantissas=64)
    rows = {(row["provider"], row.get("kind"), row.get("region")): row for row in found}
    assert [row["error"] for row in rows.values() if row["error"]] == []
    return rows


def largest(rows) -> dict[tuple[str, str], float]:
    """The largest error of each provider and kind, over all regions."""
    found = {}
    for (who, kind, _), row in rows.items():
        found[who, kind] = max(found.get((who, kind), 0.0), row["max_ulp"])
    return found


GRADIENTS = ("derivative", "weight_derivative")


@pytest.mark.parametrize("dtype", providers.DTYPES)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [("prelu", ("forward", *GRADIENTS)), ("crelu", ("forward", "derivative"))],
)
def test_what_is_exact_is_correctly_rounded(name, kinds, dtype):
    """So no gradient of a weight is a sum, which would be far off what one element adds."""
    rows = measured(name, dtype)
    assert list(largest(rows)) == [("aten", kind) for kind in kinds]
    assert not any(row["not_correctly_rounded"] for row in rows.values())
    numbers = dict.fromkeys(kinds, 0)
    for (_, kind, region), row in rows.items():
        numbers[kind] += row["inputs"]
        assert "zero" not in region  # they have no derivative that passes through it
    inputs = sum(part.numel() for part in accuracy.inputs(providers.DTYPES[dtype], 64))
    halves = 2 if name == "crelu" else 1
    assert numbers == {kind: inputs * (halves if kind == "forward" else 1) for kind in kinds}


def test_the_learnable_swish_has_the_regions_of_swish():
    learnable, swish = (measured(name, "fp32") for name in ("learnable_swish", "swish"))
    regions = {key for key in learnable if key[1] != "weight_derivative"}
    assert regions == set(swish)
    for key in regions:
        assert learnable[key]["inputs"] == swish[key]["inputs"]
        if key[2] == "x >= -87":
            assert learnable[key]["max_ulp"] < 16
    weight = {region for _, kind, region in learnable if kind == "weight_derivative"}
    assert weight == {region for _, kind, region in learnable if kind == "forward"}


def test_the_gradient_of_a_weight_is_judged():
    """Forward and the derivative of x are right, and what the weight gets is not."""

    def twice(x, weight):
        return F.prelu(x, 2 * weight - weight.detach())

    def negated(x, weight):
        return F.prelu(x, 2 * weight.detach() - weight)

    def summed(x, weight):
        """As if all had one weight."""
        total = weight.sum()
        return F.prelu(x, weight.detach() + (total - total.detach()))

    rows = measured("prelu", right=F.prelu, twice=twice, negated=negated, summed=summed)
    errors = largest(rows)
    wrong = {key for key, error in errors.items() if error > 0.5}
    assert wrong == {(who, "weight_derivative") for who in ("twice", "negated", "summed")}
    assert all(errors[key] > 1000 for key in wrong)


def test_both_halves_and_the_derivative_of_both_are_judged():
    def exchanged(x):
        return torch.cat([F.relu(-x), F.relu(x)], 1)

    def one_sided(x):
        return torch.cat([F.relu(x), F.relu(-x).detach()], 1)

    rows = measured("crelu", exchanged=exchanged, one_sided=one_sided)
    errors = largest(rows)
    assert errors["exchanged", "forward"] > 1000
    assert errors["one_sided", "forward"] <= 0.5
    assert errors["one_sided", "derivative"] > 1000


@pytest.mark.parametrize("name", ["mish", "prelu", "crelu"])
def test_who_fails_says_why(name):
    def fails(x, *weights):
        return raise_value_error(x)

    (row,) = accuracy.measure([provider("fails", fails)], ROWS[name], "fp16", 64)
    assert row["error"] == "ValueError: first line"


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["prelu", "learnable_swish", "crelu"])
def test_kernels_are_judged(name, monkeypatch):
    some = ulp.all_finite(torch.float16)[::16]  # the interpreter takes a program for 64 weights
    monkeypatch.setattr(accuracy, "inputs", lambda dtype, mantissas: [some])
    rows = list(accuracy.measure([provider_called("triton")], ROWS[name], "fp16", 64))
    assert {row["error"] for row in rows} == {""}
    assert all(row["max_ulp"] < 0.51 for row in rows if row["region"] != "around the zero")
    assert {row["kind"] for row in rows} >= ({"derivative"} if name == "crelu" else set(GRADIENTS))
