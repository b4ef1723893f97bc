"""The Python blocks of the README run as they stand, and its tables are those of their sources."""

import collections
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_act
from tests import readme
from tests.test_zoo import activations, classes

TEXT = readme.README.read_text()
# By the heading above.
BLOCKS = dict(
    re.findall(r"^##+ ([^\n]+)\n(?:(?!##)[^\n]*\n)*?```python\n(.*?)```", TEXT, re.M | re.S)
)


def run(title, **names):
    """The names after the block below `title`, which begins with `names`."""
    exec(compile(BLOCKS[title], f"README.md, {title}", "exec"), names)
    return names


def classes_of_ours(model):
    return [type(module) for module in activations(model)]


def test_every_block_is_run():
    assert list(BLOCKS) == ["Use", "torch", "timm", "transformers"]
    assert len(BLOCKS) == TEXT.count("```python")


@pytest.mark.parametrize("name", readme.TABLES)
def test_table_is_that_of_its_source(name):
    pytest.importorskip("tabulate")
    if name == "training":
        for package in ("matplotlib", "sklearn"):
            pytest.importorskip(package, reason="needs the extra 'bench'")
    start, end = readme.between(name, TEXT)
    assert TEXT[start:end] == readme.TABLES[name]() + "\n"


def test_use():
    model, x = nn.Sequential(nn.Mish(), nn.SiLU(), nn.ReLU6()), torch.randn(5)
    before = classes(model)
    names = run("Use", model=model, x=x)
    assert torch.equal(names["y"], F.mish(x))
    assert type(names["layer"]) is fused_act.ReLU6
    assert classes(names["model"]) == before


def test_torch():
    assert classes_of_ours(run("torch")["model"]) == [fused_act.ReLU6, fused_act.Mish]


@pytest.mark.zoo
def test_timm(timm):
    names = run("timm")
    assert classes_of_ours(names["model"]) == [fused_act.Mish] * 67
    swapped = collections.Counter(classes_of_ours(names["swapped"]))
    assert swapped == {fused_act.SiLU: 49, fused_act.Sigmoid: 16}


@pytest.fixture
def act2fn(transformers):
    """transformers' activations by name; what a test changes is put back."""
    table = transformers.activations.ACT2FN
    before = {name: dict.__getitem__(table, name) for name in table}
    yield table
    table.update(before)


@pytest.mark.zoo
def test_transformers(act2fn):
    theirs, x = act2fn["quick_gelu"], torch.randn(99)
    model = run("transformers")["model"]
    assert classes_of_ours(model) == [fused_act.Mish] * model.config.num_hidden_layers
    for name, ours in (
        ("mish", fused_act.Mish),
        ("relu6", fused_act.ReLU6),
        ("silu", fused_act.SiLU),
        ("swish", fused_act.SiLU),
        ("quick_gelu", fused_act.Swish),
    ):
        assert type(act2fn[name]) is ours
    assert torch.equal(act2fn["quick_gelu"](x), theirs(x))
