"""Models of transformers and timm compute the same, bit for bit, with their activations replaced.

Each package has a virtual environment of its own: timm needs torchvision, beside whose build for
CUDA transformers does not import on a CPU build of torch.
"""

import collections
import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import fused_act
from fused_act.families import base, elementwise
from tests.shared.models import activations, classes

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("one_thread")]

TEXT = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def mobilenet_v2(transformers, **options):
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.35, **options)
    return transformers.MobileNetV2ForImageClassification(config)


def efficientnet(transformers, **options):
    config = transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, **options
    )
    return transformers.EfficientNetForImageClassification(config)


def llama(transformers, **options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **options))


def create(name):
    return lambda timm, **options: timm.create_model(name, **options)


images = functools.partial(torch.randn, 3, 3, 32, 32)
tokens = functools.partial(torch.randint, 31, (3, 7))

# The package, what builds it, its input, its activation, and how many: stem, blocks and head.
ZOO = {
    "mobilenet_v2": ("transformers", mobilenet_v2, images, fused_act.ReLU6, 2 + 16 * 2 + 1),
    "efficientnet": ("transformers", efficientnet, images, fused_act.SiLU, 1 + 2 + 6 * 3 + 1),
    "llama": ("transformers", llama, tokens, fused_act.SiLU, 2),
    "mobilenetv2_100": ("timm", create("mobilenetv2_100"), images, fused_act.ReLU6, 35),
    "efficientnet_lite0": ("timm", create("efficientnet_lite0"), images, fused_act.ReLU6, 33),
    "efficientnet_b0": ("timm", create("efficientnet_b0"), images, fused_act.SiLU, 49),
}
MISH = {"transformers": {"hidden_act": "mish"}, "timm": {"act_layer": "mish"}}


@pytest.fixture(params=[False, True], ids=["own", "mish"])
def mish(request):
    return request.param


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.timm] if package == "timm" else [])
        for name, (package, *_) in ZOO.items()
    ]
)
def models(request, mish):
    """A model, the same with its activations replaced, and an input."""
    package, build, inputs, fused, count = ZOO[request.param]
    original = build(request.getfixturevalue(package), **(MISH[package] if mish else {}))
    # Some start with numbers so small that no gradient reaches the first layer.
    for parameter in original.parameters():
        initialize = nn.init.kaiming_normal_ if parameter.dim() > 1 else nn.init.normal_
        initialize(parameter)
    replaced = fused_act.replace_activations(copy.deepcopy(original))
    expected = fused_act.Mish if mish else fused
    kinds = collections.Counter(type(module) for module in activations(replaced))
    assert kinds[expected] == count
    assert kinds.keys() <= {expected, fused_act.Sigmoid}  # of squeeze-and-excitation
    assert not activations(original)
    return original, replaced, inputs()


def run(model, x):
    """The output, all gradients and all buffers."""
    torch.manual_seed(0)  # for dropout
    model.zero_grad()
    y = model(x)
    y = getattr(y, "logits", y)
    y.square().sum().backward()
    return [y, *(parameter.grad for parameter in model.parameters()), *model.buffers()]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_replaced_model_computes_the_same(models, training, monkeypatch):
    original, replaced, x = models
    called, rule = [], base.kernels_for
    monkeypatch.setattr(elementwise, "kernels_for", lambda *args: called.append(1) or rule(*args))
    ours = run(replaced.train(training), x)
    assert len(called) == len(activations(replaced))
    assert_equal(ours, run(original.train(training), x))
    assert len(called) == len(activations(replaced))
    assert all(parameter.grad.any() for parameter in replaced.parameters())


def test_restored_model_is_the_original(models):
    original, replaced, x = models
    fused_act.restore_activations(replaced)
    assert classes(replaced) == classes(original)
    for ours, theirs in zip(replaced.modules(), original.modules()):
        assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert_equal(run(replaced, x), run(original, x))


def test_state_dicts_load_across(models):
    original, replaced, x = models
    for target, source in ((replaced, original), (original, replaced)):
        for parameter in source.parameters():
            parameter.data.add_(0.01)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_equal(run(target, x), run(source, x))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_duplicate_is_the_replaced_model(models, duplicate):
    original, replaced, x = models
    twin = duplicate(replaced)
    assert classes(twin) == classes(replaced)
    assert_equal(run(twin, x), run(replaced, x))
    assert classes(fused_act.restore_activations(twin)) == classes(original)


@pytest.mark.parametrize("name", ["mobilenet_v2", "llama"])
def test_saved_model_is_the_original(name, mish, transformers, tmp_path, monkeypatch):
    """The configuration names the activation, not who computes it."""
    original = ZOO[name][1](transformers, **(MISH["transformers"] if mish else {}))
    replaced = fused_act.replace_activations(copy.deepcopy(original))
    replaced.save_pretrained(tmp_path)
    loaded = type(original).from_pretrained(tmp_path)
    assert classes(loaded) == classes(original)
    assert loaded.state_dict().keys() == original.state_dict().keys()
    assert_equal(loaded.state_dict().values(), original.state_dict().values())
    assert classes(fused_act.replace_activations(loaded)) == classes(replaced)
    assert activations(loaded)


def test_functions_are_not_replaced(transformers):
    """Lfm2 has no module for its activation: it calls F.silu."""
    config = transformers.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"])
    model = transformers.Lfm2ForCausalLM(config)
    assert not activations(fused_act.replace_activations(model))
