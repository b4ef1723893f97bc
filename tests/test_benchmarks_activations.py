"""The gallery and the comparison sheet of `python -m benchmarks activations`."""

import pytest

from benchmarks import timing
from benchmarks.environment import read_csv
from tests.shared.benchmarks import status
from tests.shared.facts import ALL, FACTS

activations = pytest.importorskip("benchmarks.activations", reason="needs matplotlib")


WITH_SHAPE = [facts for facts in ALL if facts.shape is not None]


@pytest.mark.parametrize("facts", WITH_SHAPE, ids=lambda facts: facts.name)
def test_shape(facts):
    found = activations.shape(facts)
    mean = float(found.pop("mean_output"))
    *expected, expected_mean, last = facts.shape
    assert list(found.values()) == [*expected, last]
    assert mean == pytest.approx(float(expected_mean), abs=0.011)


def test_bytes():
    found = {
        name: list(activations.bytes_of(FACTS[name]).values())
        for name in ("mish", "relu6", "crelu")
    }
    assert list(found.values()) == [[4, 6, 2], [4.125, 4.125, 0.125], [6.25, 6.25, 0.25]]


def test_the_sheet_has_a_row_for_each(monkeypatch, tmp_path, capsys, one_thread):
    times = {
        (facts.title, whose): 2.0 if facts.title == "Mish" else 1.0
        for facts in ALL
        for whose in ("fused_act", "torch")
    }
    monkeypatch.setattr(timing, "interleaved", lambda calls, **options: times)
    assert status("activations", "--results", tmp_path) == 0
    rows = {row["activation"]: row for row in read_csv(tmp_path / "activations.csv")}
    assert list(rows) == [facts.title for facts in ALL]
    assert float(rows["Mish"]["time_torch"]) == 2.0
    for row in rows.values():
        assert all(
            0 < float(row[f"{provider}_{direction}"]) < 50
            for provider in ("triton", "cuda")
            for direction in ("forward", "backward")
        ), row["activation"]
    assert (tmp_path / "activations.png").stat().st_size > 50_000
    assert "Mish" in capsys.readouterr().out
