"""The trainings of `python -m benchmarks training`, and what it concludes."""

import math

import pytest
import torch

from benchmarks.environment import read_csv
from tests.shared.benchmarks import status
from tests.shared.facts import FACTS

training = pytest.importorskip("benchmarks.training", reason="needs the extra 'bench'")


@pytest.mark.full
def test_training_of_two(tmp_path, capsys, one_thread):
    arguments = ("--epochs", 2, "--seeds", 2, "--results", tmp_path)
    assert status("training", *arguments, "--activations", "mish", "relu6") == 0
    rows = read_csv(tmp_path / "training.csv")
    keys = [(row["activation"], row["seed"], row["epoch"]) for row in rows]
    assert len(set(keys)) == len(rows) == 2 * 2 * 2
    for row in rows:
        assert 0 < float(row["loss"]) < 2.5
        assert 20 < float(row["accuracy"]) <= 100
        assert float(row["saved_mb"]) > 1
    assert (tmp_path / "training.png").exists()
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("training: Mish instead of ReLU6: accuracy ")


def test_half_of_the_filters_before_crelu():
    network = training.network_of(FACTS["crelu"], 0, torch.device("cpu"))
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
    text = training.answer(training.summaries(rows))
    assert f"accuracy {expected}; training loss 1.00 of it, time a step 1.50" in text


def test_spread_of_one_is_none():
    assert training.spread([3.0]) == 0
    assert training.spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
