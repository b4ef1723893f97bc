"""What `python -m benchmarks memory` counts."""

import argparse

import pytest
import torch

from benchmarks import memory, providers
from fused_act.activations import ROWS
from tests.shared.benchmarks import provider_called


@pytest.mark.full
def test_memory_of_a_stack(monkeypatch):
    monkeypatch.setattr(memory, "ROUNDS", 1)
    monkeypatch.setattr(memory, "SECONDS", 0.001)
    compared = [providers.FALLBACK, provider_called("aten")]
    name = "conv-norm-act stack"
    contenders = [
        memory.Contender(provider, False, method)
        for provider in compared
        for method in memory.METHODS
    ]
    contenders = [each for each in contenders if each.can(ROWS["mish"], memory.MODELS[name], False)]
    rows = {
        (row["provider"], row["method"]): row
        for row in memory.rows_of(ROWS["mish"], "fp32", name, contenders)
    }
    found = {
        key: [row[column] for column in ("by_activations", "by_norms", "by_layers")]
        for key, row in rows.items()
    }
    # Six layers, 4 bytes an element: all inputs but the first convolution's, which is the data.
    everything = [4.0, pytest.approx(4.0, rel=0.01), pytest.approx(4 * 5 / 6, rel=0.01)]
    assert found == {
        ("fallback", ""): everything,
        ("fallback", "rematerialize"): [4.0, everything[1], 0.0],
        ("fallback", "rematerialize-norm"): [0.0, everything[1], 0.0],
        ("aten", ""): everything,
        ("aten", "checkpoint"): ["", "", ""],
    }
    for (_, method), row in rows.items():
        assert row["ms"] > 0
        if method != "checkpoint":
            parts = [row[column] for column in memory.KINDS]
            assert row["saved_bytes"] == pytest.approx(sum(parts))
    assert rows["aten", "checkpoint"]["saved_bytes"] < 4.0


@pytest.mark.interpreted
def test_memory_of_a_mask():
    contender = memory.Contender(provider_called("triton"), True, "")
    (row,) = memory.rows_of(ROWS["relu6"], "bf16", "alone", [contender])
    assert [row[kind] for kind in memory.KINDS] == [1 / 8, 0, 0, 0, 0]
    assert row["saved_bytes"] == 1 / 8


def kept(name, activation, provider, dtype, inplace=False) -> list[float]:
    """Bytes for each element that an activation computes, by KINDS; nothing is timed."""
    model = memory.MODELS[name]
    contender = memory.Contender(provider_called(provider), inplace, "")
    figures = memory.Run(contender, ROWS[activation], providers.DTYPES[dtype], model).bytes()
    numel = memory.activation_numel(model, ROWS[activation])
    return [figures[kind] / numel for kind in memory.KINDS]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("prelu", 2.0),
        ("learnable_swish", 4.0),  # x, and its sigmoid
        ("crelu", 2.0),  # both halves
    ],
)
def test_what_torch_saves_of_weights_and_mirrored_ones(activation, expected):
    """The weight, 2 bytes for all elements together, does not count."""
    assert kept("alone", activation, "aten", "bf16") == [0, expected, 0, 0, 0]
    # The second convolution saves what comes in.
    assert kept("conv-act-conv", activation, "aten", "bf16") == [0, expected, 0, 2, 0]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("activation", "masks", "by_activations"),
    [("prelu", 0, 2), ("learnable_swish", 0, 2), ("crelu", 1 / 8, 0)],
)
def test_what_kernels_save_of_weights_and_mirrored_ones(activation, masks, by_activations):
    assert kept("alone", activation, "triton", "bf16") == [masks, by_activations, 0, 0, 0]
    found = kept("conv-act-conv", activation, "triton", "bf16")
    assert found == [masks, by_activations, 0, 2, 0]


@pytest.mark.parametrize("name", ["swiglu", "efficientnet"])
def test_what_a_definition_multiplies_is_not_what_the_network_does(name):
    """Both have gates, whose products and sigmoids are called as those of a definition."""
    definition = kept(name, "learnable_swish", "aten", "bf16")
    assert definition[1] == 4.0
    own = kept(name, "swish", "aten", "bf16")
    assert own[1] == 2.0
    assert [definition[0], *definition[2:]] == [own[0], *own[2:]]


def test_what_is_in_place_has_nodes_of_its_own():
    """There the input's node, where they end, is soon that of the output."""
    in_place, own = (kept("swiglu", "relu6", "aten", "bf16", inplace) for inplace in (True, False))
    assert in_place == own
    assert own[1] == 2.0


@pytest.mark.parametrize("activation", providers.DEFAULT, ids=lambda activation: activation.name)
def test_models_compute_the_same_number_of_elements(activation):
    """So that what is saved for each of them compares; alone, CReLU has no layer before it."""
    for name, model in memory.MODELS.items():
        if name != "alone" and model.can_have(activation):
            numel = memory.activation_numel(model, ROWS["mish"])
            assert memory.activation_numel(model, activation) == numel, name


def test_each_place_has_a_weight_that_is_trained():
    contender = memory.Contender(provider_called("aten"), False, "")
    model = memory.MODELS["mobilenet_v2"]
    runs = [
        memory.Run(contender, ROWS[name], torch.float32, model) for name in ("prelu", "leaky_relu")
    ]
    weights, none = ([each for each in run.parameters if each.numel() == 1] for run in runs)
    assert ([each.item() for each in weights], none) == ([0.25] * 7, [])
    assert all(each.requires_grad for each in weights)


def test_crelu_is_measured_where_it_fits(monkeypatch):
    models = {name: memory.MODELS[name] for name in ("alone", "conv-act-conv", "csp", "swiglu")}
    monkeypatch.setattr(memory, "MODELS", models)
    monkeypatch.setattr(memory, "ROUNDS", 1)
    arguments = argparse.Namespace(
        activations=[ROWS["crelu"]], dtypes=["bf16"], compile_networks=False
    )
    rows = list(memory.measure_all(arguments, [provider_called("aten")]))
    assert [(row["case"], row["error"]) for row in rows] == [("alone", ""), ("conv-act-conv", "")]


def test_picture_of_all_activations():
    plot = pytest.importorskip("benchmarks.plot", reason="needs matplotlib")
    names = [activation.name for activation in providers.DEFAULT[:4]]
    common = {"dtype": "bf16", "method": "", "gpu": "H200", "torch": "2", "commit": "c"}
    rows = [
        common | {"activation": name, "provider": provider, "case": case, "saved_bytes": "2.125"}
        for name in names
        for provider in ("aten", "naive")
        for case in ("alone", "conv-act-conv")
        if (name, provider) != ("prelu", "naive")
    ]
    rows = [row | {"inplace": "False"} for row in rows]
    rows += [row | {"inplace": "True"} for row in rows if row["activation"] == "relu6"]
    figure = plot.memory(rows)
    assert [axes.get_title() for axes in figure.axes] == names
    # Three beside each other, which share the groups; what is never in place has fewer.
    lefts = [axes.get_subplotspec().colspan.start for axes in figure.axes]
    groups = [len(axes.get_yticks()) for axes in figure.axes]
    assert (lefts, groups) == ([0, 1, 2, 0], [4, 4, 4, 2])
    assert {text.get_text() for axes in figure.axes for text in axes.texts} == {"2.125"}
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "bytes", "bytes", "bytes"]
    # The last panel has no bar of this colour.
    (legend,) = figure.legends
    colors = {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(legend.texts, legend.legend_handles)
    }
    bars = {bar.get_facecolor() for axes in figure.axes for bar in axes.patches}
    assert set(colors.values()) == bars
