"""What `replace_activations` reports, and `restored`, for libraries that know classes by name.

How modules are replaced: test_api.py; in whole models: test_zoo.py.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fused_act
from fused_act import replace

REPLACED = pytest.mark.parametrize("original", replace.FUSED, ids=lambda kind: kind.__name__)


class Subclass(nn.SiLU):
    pass


def odd(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


# What is left, and a word of the reason.
LEFT = [
    (lambda: nn.LeakyReLU(float("inf")), "its slope is inf"),
    (lambda: nn.LeakyReLU(float("nan")), "its slope is nan"),
    (lambda: nn.LeakyReLU(1e39), "its slope is 1e"),
    (lambda: nn.LeakyReLU("0.1"), "its slope is '0.1'"),
    (lambda: odd(nn.ReLU6(), max_val=4.0), "its bounds are 0.0 and 4.0"),
    (lambda: odd(nn.ReLU6(), min_val=-1.0), "its bounds are -1.0 and 6.0"),
    (Subclass, "subclass"),
    (nn.GELU, "no fused one"),
    (lambda: odd(nn.ReLU(), forward=torch.relu), "`forward` of its own"),
    (fused_act.Mish, "fused already"),
    (fused_act.Swish, "fused already"),
    (fused_act.CReLU, "fused already"),
    (lambda: parametrized(nn.PReLU()), "is parametrized"),
    (lambda: parametrized(fused_act.PReLU()), "fused already"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a forward of its own
@pytest.mark.parametrize(("make", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_what_is_left_and_why(make, reason):
    model = nn.Sequential(nn.Linear(3, 3), make())
    kind = type(model[1])
    found = []
    assert fused_act.replace_activations(model, report=found.append) is model
    assert type(model[1]) is kind
    (replacement,) = found
    assert replacement[:3] == ("1", kind, None)
    assert reason in replacement.reason
    assert str(replacement) == f"1: {kind.__name__} is left as it is: {replacement.reason}"


@REPLACED
def test_what_is_replaced_is_reported(original, capsys):
    model = nn.Sequential(nn.Linear(3, 3), original(), nn.MultiheadAttention(2, 1))
    found = []
    fused_act.replace_activations(model, report=found.append)
    fused = replace.FUSED[original]
    assert found == [fused_act.Replacement("1", original, fused, "")]
    fused_act.replace_activations(original(), report=print)
    name = original.__name__
    assert capsys.readouterr().out == f"the model itself: {name} is now fused_act.{name}\n"
    found.clear()
    model = nn.Sequential(original())
    fused_act.replace_activations(model, lambda name, module: False, report=found.append)
    assert [each.reason for each in found] == ["filter_fn leaves it out"]
    asked = []
    model.append(nn.GELU())
    fused_act.replace_activations(model, lambda name, module: asked.append(name))
    assert asked == ["0"]  # of what can be replaced
    assert type(model[0]) is original


WRITE_IN_PLACE = [kind for kind in replace.FUSED if hasattr(kind(), "inplace")]
INPLACE = [1, 64, "yes", None, torch.tensor(True), 0]


@pytest.mark.parametrize("original", WRITE_IN_PLACE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("inplace", INPLACE, ids=repr)
def test_slips_that_torch_runs_run(original, inplace):
    """`nn.ReLU(64)` writes in place: what is true counts."""
    model = nn.Sequential(original())
    model[0].inplace = inplace
    x = torch.linspace(-3, 3, 7)
    expected = copy.deepcopy(model)(x.clone())
    fused_act.replace_activations(model)
    written = x.clone()
    assert torch.equal(model(written), expected)
    assert torch.equal(written, expected) is bool(inplace)


def classes(model):
    return [type(module) for module in model.modules()]


@REPLACED
@pytest.mark.parametrize("raises", [False, True])
def test_restored_has_torchs_classes_and_then_ours(original, raises):
    model = nn.Sequential(nn.Linear(3, 3), original(), nn.Sequential(original()))
    model.append(fused_act.Swish())
    expected, before = classes(model), classes(fused_act.replace_activations(model))
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = []
    model[1].register_forward_hook(lambda *args: hooks.append(1))
    try:
        with fused_act.restored(model) as same:
            assert same is model
            assert classes(model) == expected
            with fused_act.restored(model):  # nothing is left to restore
                assert classes(model) == expected
            assert classes(model) == expected
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    assert classes(model) == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    model[1](torch.ones(2, 3))
    assert hooks == [1]


def test_restored_around_parametrizations():
    """`register_parametrization` gives a module a class of its own, and removing it torch's."""
    model = fused_act.replace_activations(nn.Sequential(nn.PReLU()))
    x = torch.linspace(-3, 3, 7)
    with fused_act.restored(model):
        parametrize.register_parametrization(model[0], "weight", Doubled())
        expected = model(x)
    assert isinstance(model[0], fused_act.PReLU)
    assert parametrize.is_parametrized(model[0], "weight")
    assert torch.equal(model(x), expected)
    kind = type(model[0])
    with fused_act.restored(model):
        assert isinstance(model[0], nn.PReLU)
        assert not isinstance(model[0], fused_act.PReLU)
        assert torch.equal(model(x), expected)
    assert type(model[0]) is kind
    with fused_act.restored(model):
        parametrize.remove_parametrizations(model[0], "weight")
        assert type(model[0]) is nn.PReLU
    assert type(model[0]) is fused_act.PReLU
    assert torch.equal(model(x), expected)
    parametrized(model[0])
    with fused_act.restored(model):
        parametrize.remove_parametrizations(model[0], "weight")
        parametrized(model[0])
        assert not isinstance(model[0], fused_act.PReLU)
    assert isinstance(model[0], fused_act.PReLU)
    assert parametrize.is_parametrized(model[0], "weight")


def test_restored_leaves_what_the_block_has_made_of_a_module():
    model = fused_act.replace_activations(nn.Sequential(nn.ReLU(), nn.Mish(), nn.SiLU(), nn.Tanh()))
    with fused_act.restored(model):
        model[0].__class__ = Subclass
        model[1] = nn.Identity()
        fused_act.replace_activations(model[2])
        model[3].forward = torch.tanh
    kinds = [type(module) for module in model]
    assert kinds == [Subclass, nn.Identity, fused_act.SiLU, fused_act.Tanh]


def test_restored_leaves_a_forward_in_a_hook():
    model = fused_act.replace_activations(nn.Sequential(nn.ReLU(), nn.Mish()))
    model[0].forward = model[0].forward
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fused_act.restored(model):
            assert classes(model[0]) == [fused_act.ReLU]
            assert classes(model[1]) == [nn.Mish]
    (warning,) = caught
    assert "restored: these modules" in str(warning.message)
    assert warning.filename == __file__
    assert classes(model)[1:] == [fused_act.ReLU, fused_act.Mish]


def test_restored_gives_a_traced_graph_its_names():
    """A tracer takes modules of torch for leaves, by where their class is defined."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.SiLU()))
    names = [node.name for node in torch.fx.symbolic_trace(model).graph.nodes]
    fused_act.replace_activations(model)
    assert [node.name for node in torch.fx.symbolic_trace(model).graph.nodes] != names
    with fused_act.restored(model):
        assert [node.name for node in torch.fx.symbolic_trace(model).graph.nodes] == names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_restored_for_the_fusion_of_quantization():
    """It knows the classes that it fuses."""
    model = fused_act.replace_activations(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()).eval())
    fuse = torch.ao.quantization.fuse_modules
    with pytest.raises((NotImplementedError, AssertionError)):
        fuse(model, [["0", "1"]])
    with fused_act.restored(model):
        fused = fuse(model, [["0", "1"]])
    x = torch.randn(1, 1, 3, 3)
    assert torch.equal(fused(x), model(x))
    assert type(model[1]) is fused_act.ReLU


def test_restored_for_a_registry_of_classes():
    """DeepLift of captum takes its rule for a module from a table of classes."""
    rules = {nn.ReLU: "rescale"}
    model = fused_act.replace_activations(nn.Sequential(nn.ReLU()))
    assert rules.get(type(model[0])) is None
    with fused_act.restored(model):
        assert rules[type(model[0])] == "rescale"
