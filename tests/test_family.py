"""The table of the whole family: it is complete, and what it says of torch and of bytes is so."""

import pytest
import torch

import fused_act
from benchmarks import family
from fused_act.activations import FAMILIES, ROWS

ELEMENTWISE = FAMILIES["elementwise"]


def test_the_family_is_all_there_is():
    """Every row, and every module that is public, but for those that are the same function."""
    assert {member.op for member in family.FAMILY} == ROWS.keys()
    modules = {
        value
        for value in vars(fused_act).values()
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    }
    assert {type(member.module()) for member in family.FAMILY} == modules


@pytest.mark.parametrize("member", family.FAMILY, ids=lambda member: member.name)
def test_what_torch_has_in_its_place_is_the_same(member):
    x = torch.randn(2, 3, 4, 4)
    y = member.module()(x)
    assert torch.equal(y, member.torch_module()(x))
    assert y.numel() == member.widens * x.numel()


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda activation: activation.name)
def test_what_is_saved_is_what_the_row_says(activation):
    (member,) = (member for member in family.FAMILY if member.op == activation.name)
    assert member.saves == {"mask": "bits"}.get(activation.saves, activation.saves)
