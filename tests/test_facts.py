"""The rows of facts: there is one for each activation, and what they say of torch is so."""

import pytest
import torch

import fused_act
from fused_act.activations import ROWS
from tests.shared.cases import all_rows
from tests.shared.facts import ALL, FACTS, FEATURED
from tests.shared.layouts import random


def test_every_row_has_its_facts_and_no_other():
    assert [facts.name for facts in ALL] == list(FACTS)
    assert FACTS.keys() == ROWS.keys()
    assert set(FEATURED) <= FACTS.keys()


def test_every_public_module_is_there():
    """But for those that are the same function."""
    modules = {
        value
        for value in vars(fused_act).values()
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    }
    assert {type(facts.module()) for facts in ALL} >= modules


@pytest.mark.parametrize("facts", ALL, ids=lambda facts: facts.name)
def test_what_torch_has_in_its_place_is_the_same(facts):
    x = torch.randn(2, 3, 4, 4)
    y = facts.module()(x)
    assert torch.equal(y, facts.torch_module()(x))
    assert y.numel() == facts.widens * x.numel()


@all_rows
def test_functions_are_the_same(case):
    """Ours and torch's."""
    x = random(99)
    assert torch.equal(case.function(x), case.torch_function(x))


IN_BENCHMARKS = [facts for facts in ALL if facts.row.family == "elementwise"]


@pytest.mark.parametrize("facts", IN_BENCHMARKS, ids=lambda facts: facts.name)
def test_what_benchmarks_compare_is_the_same(facts):
    x, out = random(99), torch.empty(99)
    y = facts.torch_function(x, *facts.defaults)
    facts.aten_out(x, *facts.defaults, out=out)
    torch.testing.assert_close(out, y)
    if facts.naive is not None:
        torch.testing.assert_close(facts.naive(x), y, rtol=1e-4, atol=1e-4)
