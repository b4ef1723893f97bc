"""`python -m benchmarks overhead`: what is timed goes the way that its row names."""

import pytest
import torch

from benchmarks import environment, overhead, timing
from fused_act import host
from tests.shared import compiling, cpu_ops

pytestmark = [
    pytest.mark.skipif(compiling.COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(isinstance(host.extension(), str), reason="needs the host extension"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU"),
]
COLUMNS = ["path", "call", "direction", "us", "reference", "reference_us", "added_us"]
PATHS = ["host extension", "host extension, ops.cu", "python", "python, ops.cu"]


@pytest.fixture
def ways_taken(monkeypatch):
    """What each turn of ours went through, in place of its time."""
    seen = []

    def turn(call, seconds):
        def run():
            with cpu_ops.counted(cpu_ops.TORCH_KERNELS) as a, cpu_ops.counted(cpu_ops.CSRC) as b:
                call()
            seen.append((a.taken, b.taken))
            return [2.0 if a.taken or b.taken else 1.0]

        return run

    monkeypatch.setattr(timing, "cpu_turn", turn)
    return seen


def test_rows(ways_taken):
    """A call in C++ is said to take 2 s here and all others 1 s."""
    rows = list(overhead.kernel_rows(rounds=2))
    assert all(list(row)[: len(COLUMNS)] == COLUMNS for row in rows)
    assert list(dict.fromkeys(row["path"] for row in rows)) == PATHS
    assert list(dict.fromkeys(row["direction"] for row in rows)) == list(overhead.DIRECTIONS)
    for row in rows:
        direction = overhead.DIRECTIONS[row["direction"]]
        added = 1e6 / direction.calls if row["path"].startswith("host") else 0.0
        assert row["added_us"] == pytest.approx(added)
        assert row["us"] - row["reference_us"] == pytest.approx(added)
    for of_torch, of_csrc in ways_taken:
        assert not (of_torch and of_csrc)


def test_what_is_not_there_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(host, "extension", lambda: "no extension; a cure")
    assert list(overhead.ways()) == ["python", "python, ops.cu"]
    assert "python alone is measured: no extension; a cure" in capsys.readouterr().err
    monkeypatch.setattr(compiling, "COMPILER", None)
    assert overhead.ways() == {}
    assert "no C++ compiler" in capsys.readouterr().err


def test_the_file(tmp_path):
    rows = environment.write_csv(tmp_path / "overhead.csv", overhead.import_rows(runs=1))
    assert [row["call"] for row in rows] == ["import torch, fused_act", "the host extension"]
    overhead.print_results(rows)
    assert len(environment.read_csv(tmp_path / "overhead.csv")) == 2
