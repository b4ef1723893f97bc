"""The gallery, the comparison sheet and the trainings of the whole family."""

import importlib
import math
import sys

import pytest
import torch

import fused_act
from benchmarks import environment
from fused_act.activations import FAMILIES, ROWS

pytest.importorskip("matplotlib", reason="needs matplotlib")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from benchmarks import compare_training, family, plot_activations, timing

ELEMENTWISE = FAMILIES["elementwise"]


def run(script, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        environment.run(script.main)
    return ended.value.code


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


SHAPES = {
    "ReLU": ("0", "0 to ∞", "yes", "0.40", "below"),
    "LeakyReLU": ("0", "-∞ to ∞", "yes", "0.39", ""),
    "ReLU6": ("0 6", "0 to 6", "yes", "0.40", "below and above"),
    "CReLU": ("0", "0 to ∞", "no", "0.40", ""),
    "SELU": ("0", "-1.76 to ∞", "yes", "0.00", "below"),
    "Tanh": ("", "-1 to 1", "yes", "0.00", "below and above"),
    "Swish": ("", "-0.28 to ∞", "no", "0.21", "below"),
    "Mish": ("", "-0.31 to ∞", "no", "0.24", "below"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name):
    found = plot_activations.shape(family.BY_NAME[name])
    mean = float(found.pop("mean_output"))
    *expected, expected_mean, last = SHAPES[name]
    assert list(found.values()) == [*expected, last]
    assert mean == pytest.approx(float(expected_mean), abs=0.011)


def test_bytes():
    found = {
        name: list(plot_activations.bytes_of(family.BY_NAME[name]).values())
        for name in ("Mish", "ReLU6", "CReLU")
    }
    assert found == {
        "Mish": [4, 6, 2],
        "ReLU6": [4.125, 4.125, 0.125],
        "CReLU": [6.25, 6.25, 0.25],
    }


def test_the_sheet_has_a_row_for_each(monkeypatch, tmp_path, capsys):
    times = {
        (member.name, whose): 2.0 if member.name == "Mish" else 1.0
        for member in family.FAMILY
        for whose in ("fused_act", "torch")
    }
    monkeypatch.setattr(timing, "interleaved", lambda calls, **options: times)
    threads = torch.get_num_threads()
    assert run(plot_activations, monkeypatch, "--results", tmp_path) == 0
    torch.set_num_threads(threads)
    rows = {row["activation"]: row for row in environment.read_csv(tmp_path / "activations.csv")}
    assert list(rows) == list(family.BY_NAME)
    assert float(rows["Mish"]["time_torch"]) == 2.0
    for row in rows.values():
        assert all(
            0 < float(row[f"{provider}_{direction}"]) < 50
            for provider in ("triton", "cuda")
            for direction in ("forward", "backward")
        ), row["activation"]
    assert (tmp_path / "activations.png").stat().st_size > 50_000
    assert "Mish" in capsys.readouterr().out


def test_training_of_two(monkeypatch, tmp_path, capsys, one_thread):
    arguments = ("--epochs", 2, "--seeds", 2, "--results", tmp_path)
    assert run(compare_training, monkeypatch, *arguments, "--activations", "Mish", "ReLU6") == 0
    rows = environment.read_csv(tmp_path / "training.csv")
    keys = [(row["activation"], row["seed"], row["epoch"]) for row in rows]
    assert len(set(keys)) == len(rows) == 2 * 2 * 2
    for row in rows:
        assert 0 < float(row["loss"]) < 2.5
        assert 20 < float(row["accuracy"]) <= 100
        assert float(row["saved_mb"]) > 1
    assert (tmp_path / "training.png").exists()
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("compare_training: Mish instead of ReLU6: accuracy ")


def test_half_of_the_filters_before_crelu():
    network = compare_training.network_of(family.BY_NAME["CReLU"], 0, torch.device("cpu"))
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    widths = [m.out_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths[:4] == [8, 32, 32, 24]


def summary_rows(name, accuracies, ms=1.0):
    return [
        {
            "activation": name, "seed": seed, "epoch": 1, "loss": 0.5, "accuracy": accuracy,
            "ms": ms, "saved_mb": 2.0, "parameters": 7,
        }
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mish", "relu6", "expected"),
    [
        ([98.0, 99.0], [98.2, 98.4], "+0.20 points, within the spread of 0.71"),
        ([98.9, 99.0], [97.0, 97.1], "+1.90 points, beyond the spread of 0.07"),
        ([98.0], [99.0], "-1.00 points, one seed says nothing of chance"),
    ],
)
def test_answer(mish, relu6, expected):
    rows = [*summary_rows("Mish", mish, ms=3.0), *summary_rows("ReLU6", relu6, ms=2.0)]
    text = compare_training.answer(compare_training.summaries(rows))
    assert f"accuracy {expected}; training loss 1.00 of it, time a step 1.50" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--epochs", "0"), "expected a positive whole number, got '0'"),
        (("--seeds", "x"), "expected a positive whole number, got 'x'"),
        (("--activations", "GELU"), "expected one of ReLU, LeakyReLU, PReLU"),
    ],
)
def test_arguments_that_make_no_sense(monkeypatch, capsys, arguments, line):
    assert run(compare_training, monkeypatch, *arguments) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn.datasets"])
def test_without_what_it_needs(monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("compare_training", "digits", "pictures"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
        monkeypatch.delattr(f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("benchmarks.compare_training")
    assert ended.value.code == 2
    assert "compare_training needs scikit-learn and matplotlib" in capsys.readouterr().err


def test_spread_of_one_is_none():
    assert compare_training.spread([3.0]) == 0
    assert compare_training.spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
