"""`python -m benchmarks speed` as a whole, its clock replaced."""

import dataclasses
import signal
import sys
import types
from functools import partial

import pytest
import torch

from benchmarks import environment, speed, timing, workloads
from benchmarks.__main__ import parse
from benchmarks.environment import read_csv
from tests.shared.benchmarks import CLOCK, raise_value_error, status
from tests.shared.facts import FACTS


@pytest.fixture
def compare(monkeypatch, tmp_path, one_thread):
    """Runs the command, its clock replaced; returns its exit status."""
    monkeypatch.setattr(speed, "ON_GPU", False)
    monkeypatch.setattr(timing, "cpu_turn", CLOCK.turn)
    return partial(status, "speed", "--results", tmp_path)


ALL_EAGER = ("--sizes", "2^10", "--dtypes", "fp32", "--providers", "aten", "naive", "fallback")


@pytest.mark.parametrize("without", [(), ("tabulate", "tqdm")], ids=["", "no tabulate, no tqdm"])
def test_the_command_says_what_it_compared(monkeypatch, compare, tmp_path, capsys, without):
    for package in without:
        monkeypatch.setitem(sys.modules, package, None)
    assert compare(*ALL_EAGER) == 0
    rows = read_csv(tmp_path / "speed.csv")
    assert {row["provider"] for row in rows} == {"copy", "aten", "naive", "fallback"}
    assert {row["activation"] for row in rows} == {
        "mish", "swish", "relu6", "prelu", "learnable_swish", "crelu",
    }  # fmt: skip
    assert all(float(row["median"]) > 0 for row in rows)
    output = capsys.readouterr().out
    for text in ("NO GPU", workloads.BYTES, "relu6 inference fp32 2^10", "slower in"):
        assert text in output


def test_edges_are_a_file_of_their_own(compare, tmp_path):
    assert compare("--edges", "--providers", "aten", "--activations", "prelu", *ALL_EAGER[2:4]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["speed_edges.csv"]
    rows = read_csv(tmp_path / "speed_edges.csv")
    assert {row["layout"] for row in rows} == {"channels_last", "odd", "misaligned"}


def test_what_is_too_large_or_too_late_gets_rows_that_say_so(compare, tmp_path, capsys):
    assert compare(*ALL_EAGER[2:], "--sizes", "2^40") == 0
    (skipped,) = {row["skipped"] for row in read_csv(tmp_path / "speed.csv")}
    assert skipped.startswith("over the cap: 24 such tensors take 98304 of")
    assert f"rows skipped: {skipped}" in capsys.readouterr().out

    assert compare(*ALL_EAGER, "--time-limit", "1e-9") == 0
    (skipped,) = {row["skipped"] for row in read_csv(tmp_path / "speed.csv")}
    assert skipped == "over the time limit"


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_limit_that_is_none_is_refused(compare, capsys, tmp_path, limit):
    (tmp_path / "speed.csv").write_text("older")
    assert compare(f"--time-limit={limit}") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith(f"expected a positive number of seconds, got {limit!r}")
    assert (tmp_path / "speed.csv").read_text() == "older"


def test_a_name_given_twice_is_measured_once(compare, tmp_path):
    options = ("--providers", "aten", "--activations", "mish", "mish", *ALL_EAGER[:4])
    assert compare(*options) == 0
    rows = read_csv(tmp_path / "speed.csv")
    assert len(rows) == len({tuple(row.values())[:8] for row in rows}) > 0


def test_a_failure_ends_with_status_1_after_the_others(monkeypatch, compare, tmp_path):
    failing = dataclasses.replace(FACTS["mish"], naive=raise_value_error)
    monkeypatch.setitem(FACTS, "mish", failing)
    assert compare(*ALL_EAGER) == 1
    rows = read_csv(tmp_path / "speed.csv")
    failed = [row for row in rows if row["error"]]
    assert {(row["provider"], row["activation"]) for row in failed} == {("naive", "mish")}
    assert len(failed) == 3 < len(rows)


def test_no_provider_that_can_run_is_refused(compare, capsys):
    assert compare("--providers", "flag_gems") == 2
    assert "none of flag_gems can run here" in capsys.readouterr().err


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_what_was_measured(monkeypatch, compare, tmp_path):
    assert compare(*ALL_EAGER) == 0
    older = read_csv(tmp_path / "speed.csv")
    clocks = iter([{"sm_clock_mhz": ""}])  # which are read at the end of each direction

    def interrupted():
        return next(clocks, None) or signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(environment, "clocks", interrupted)
    assert compare(*ALL_EAGER) == 130
    assert read_csv(tmp_path / "speed.csv") == older
    kept = read_csv(tmp_path / "speed.partial.csv")
    assert {row["direction"] for row in kept} == {"forward"}
    assert len(kept) == 5  # a copy; aten's kernel; three public functions


def test_a_gpu_is_timed_as_a_gpu(monkeypatch, compare, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)  # which is not needed to take times
    monkeypatch.setattr(speed, "ON_GPU", True)
    monkeypatch.setattr(timing, "gpu_turn", CLOCK.turn)
    monkeypatch.setattr(timing, "graph_turn", CLOCK.turn)
    properties = types.SimpleNamespace(total_memory=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert compare("--sizes", "2^10", "2^20", *ALL_EAGER[2:]) == 0
    assert "NO GPU" not in capsys.readouterr().out
    rows = read_csv(tmp_path / "speed.csv")
    assert {row["provider"] for row in rows} == {"copy", "aten", "naive"}
    assert {row["launch"] for row in rows if row["numel"] == "1024"} == {"call", "graph"}
    assert {bool(row["skipped"]) for row in rows if row["numel"] == "1024"} == {False}
    assert {bool(row["skipped"]) for row in rows if row["numel"] != "1024"} == {True}


@pytest.mark.full
@pytest.mark.interpreted
def test_triton_in_the_interpreter(compare, tmp_path):
    layouts = ("--layouts", *workloads.LAYOUTS)
    assert compare("--sizes", "2^10", "--dtypes", "bf16", "--providers", "triton", *layouts) == 0
    rows = read_csv(tmp_path / "speed.csv")
    assert {row["provider"] for row in rows} == {"copy", "triton"}
    assert {row["api"] for row in rows if row["provider"] == "triton"} == {"kernel", "public"}
    bytes_ = {
        row["direction"]: int(row["bytes"])
        for row in rows
        if (row["provider"], row["activation"], row["numel"]) == ("triton", "relu6", "1024")
    }
    assert bytes_ == {
        "inference": 4096, "forward": 4224, "backward": 4224, "forward+backward": 8448,
    }  # fmt: skip


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    """Nothing is compiled: with `--sizes` that would take all of the time limit, and skip rows."""
    what = ("--sizes", "2^12", "--dtypes", "bf16", "--layouts", *workloads.LAYOUTS)
    few = ("--activations", "relu6", "prelu", "--providers", "triton", "cuda", "aten")
    rows = speed.main(parse(["speed", "--results", str(tmp_path), *what, *few]))
    assert not [row["error"] for row in rows if row["error"]]
    assert {row["launch"] for row in rows} == {"call", "graph"}
    assert all(row["samples"] for row in rows)
    bounds = {row["bound"] for row in rows}
    assert "device" in bounds
    assert bounds <= {"device", "host"}  # other processes may keep the host from its work
    assert all(row["host_us"] > 0 for row in rows if row["launch"] == "call")
