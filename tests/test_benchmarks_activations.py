"""The gallery and the comparison sheet of `python -m benchmarks activations`."""

import pytest

from benchmarks import family, timing
from benchmarks.environment import read_csv
from tests.shared.benchmarks import status

activations = pytest.importorskip("benchmarks.activations", reason="needs matplotlib")


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
    found = activations.shape(family.BY_NAME[name])
    mean = float(found.pop("mean_output"))
    *expected, expected_mean, last = SHAPES[name]
    assert list(found.values()) == [*expected, last]
    assert mean == pytest.approx(float(expected_mean), abs=0.011)


def test_bytes():
    found = {
        name: list(activations.bytes_of(family.BY_NAME[name]).values())
        for name in ("Mish", "ReLU6", "CReLU")
    }
    assert found == {
        "Mish": [4, 6, 2],
        "ReLU6": [4.125, 4.125, 0.125],
        "CReLU": [6.25, 6.25, 0.25],
    }


def test_the_sheet_has_a_row_for_each(monkeypatch, tmp_path, capsys, one_thread):
    times = {
        (member.name, whose): 2.0 if member.name == "Mish" else 1.0
        for member in family.FAMILY
        for whose in ("fused_act", "torch")
    }
    monkeypatch.setattr(timing, "interleaved", lambda calls, **options: times)
    assert status("activations", "--results", tmp_path) == 0
    rows = {row["activation"]: row for row in read_csv(tmp_path / "activations.csv")}
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
