"""The verdict that `python -m benchmarks compare` gives on two folders of results."""

import csv
import os

import pytest

from benchmarks import compare, environment
from tests.shared.benchmarks import status

SPEED = {
    "provider": "cuda", "activation": "mish", "dtype": "bf16", "direction": "forward",
    "layout": "contiguous", "numel": 2**27, "api": "kernel", "launch": "call", "median": 0.13,
    "share_of_copy": 0.95, "skipped": "", "error": "", "gpu": "H200", "cpu": "Xeon", "commit": "c",
}  # fmt: skip
COUNTS = {
    "capability": 90, "provider": "cuda", "activation": "mish", "direction": "backward",
    "dtype": "bfloat16", "instructions_per_element": 19.0, "registers": 40, "spills": 1, "gpu": "",
    "cpu": "EPYC",
}  # fmt: skip
MEMORY = {
    "provider": "triton", "method": "", "activation": "relu6", "dtype": "bf16", "case": "alone",
    "inplace": False, "numel": 16384, "saved_bytes": 2.0, "peak_bytes": 4.0, "error": "",
    "gpu": "H200", "cpu": "Xeon",
}  # fmt: skip
ACCURACY = {
    "provider": "cuda", "activation": "mish", "dtype": "fp32", "kind": "forward",
    "region": "x >= -87", "inputs": 1000, "max_ulp": 5.0, "error": "", "gpu": "H200",
}  # fmt: skip
TORCH = {
    "net": "resnet50 mish", "batch": 128, "direction": "training", "mode": "torch", "ms": 40.0,
    "min": 20.0, "bound": "device", "step_gb": 8.0, "skipped": "", "error": "", "gpu": "H200",
}  # fmt: skip
FUSED = TORCH | {"mode": "fused", "ms": 20.0, "min": 10.0, "step_gb": 4.0}
TEST = {"test": "tests/test_gpu.py::test_auto", "outcome": "passed", "seconds": 1, "error": ""}
# The row that is judged, and what stands in the file beside it.
ROWS = {
    "speed.csv": [SPEED],
    "speed_edges.csv": [SPEED | {"layout": "odd"}],
    "ours.csv": [COUNTS],
    "memory.csv": [MEMORY],
    "accuracy.csv": [ACCURACY],
    "networks.csv": [FUSED, TORCH],
    "networks_compiled.csv": [FUSED, TORCH],
    "tests.csv": [TEST],
}
# Figures on both sides of each threshold: the old one, one that is about the same, one that is not.
FIGURES = [
    ("speed.csv", "share_of_copy", 0.95, 0.931, 0.929),
    ("speed_edges.csv", "share_of_copy", 0.95, 0.931, 0.929),
    ("ours.csv", "instructions_per_element", 19.0, 19.0, 19.0625),
    ("ours.csv", "registers", 40, 40, 41),
    ("ours.csv", "spills", 0, 0, 1),
    ("memory.csv", "saved_bytes", 2.0, 2.009, 2.011),
    ("memory.csv", "peak_bytes", 2.0, 2.009, 2.011),
    ("accuracy.csv", "max_ulp", 5.0, 5.04, 5.06),
    ("networks.csv", "step_gb", 4.0, 4.07, 4.09),
    ("networks_compiled.csv", "step_gb", 4.0, 4.07, 4.09),
]
figures = pytest.mark.parametrize(
    ("name", "column", "old", "alike", "other"), FIGURES, ids=[":".join(row[:2]) for row in FIGURES]
)


@pytest.fixture
def write(tmp_path):
    """Writes a file of results into a folder, `old` or `new`."""

    def write_rows(folder, name, *rows):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write_rows


@pytest.fixture
def verdict(tmp_path, capsys):
    """Compares the folders `old` and `new`; returns the exit status and what was printed."""

    def run(old="old", new="new"):
        ended = status("compare", tmp_path / old, tmp_path / new)
        captured = capsys.readouterr()
        return ended, captured.out + captured.err

    return run


@pytest.fixture
def change(write, verdict):
    """Compares a file with one in which figures of our row have changed."""

    def run(name, old, new):
        ours, *others = ROWS[name]
        write("old", name, ours | old, *others)
        write("new", name, ours | new, *others)
        return verdict()

    return run


def test_every_kind_of_file_has_a_row_here():
    assert ROWS.keys() == compare.KINDS.keys()


@figures
def test_a_figure_beyond_its_threshold_is_worse(change, name, column, old, alike, other):
    ended, output = change(name, {column: old}, {column: other})
    assert ended == 1
    assert "got worse (1)" in output
    assert "got better" not in output
    last = output.splitlines()[-1]
    assert last.startswith("compare: FAILED: ")
    assert last.endswith(" worse: 1, better: 0, failures: 0")


@figures
def test_a_figure_within_its_threshold_is_even(change, name, column, old, alike, other):
    for before, after in ((old, old), (old, alike), (alike, old)):
        ended, output = change(name, {column: before}, {column: after})
        assert ended == 0
        assert output.splitlines()[-1].endswith(" worse: 0, better: 0, failures: 0")
        assert "got" not in output


@figures
def test_a_figure_that_is_better_passes(change, name, column, old, alike, other):
    ended, output = change(name, {column: other}, {column: old})
    assert ended == 0
    assert "got better (1)" in output
    last = output.splitlines()[-1]
    assert last.startswith("compare: passed: ")
    assert last.endswith(" worse: 0, better: 1, failures: 0")


def test_a_line_says_what_got_worse_and_both_figures(change):
    _, output = change("speed.csv", {}, {"share_of_copy": 0.9})
    expected = "cuda mish forward bf16 2^27 contiguous kernel call, share of a copy: 95.0% -> 90.0%"
    assert f"\ngot worse (1)\n  speed.csv: {expected}\n" in output
    _, output = change("memory.csv", {"inplace": True}, {"inplace": True, "saved_bytes": 3})
    expected = "triton relu6 bf16 alone in place 2^14, bytes saved, an element: 2 -> 3"
    assert f"\n  memory.csv: {expected}\n" in output
    _, output = change("networks.csv", {}, {"ms": 30, "min": 15})
    expected = "resnet50 mish batch 128 training fused, time, of torch's: 0.500 (least 0.500) -> "
    assert f"\n  networks.csv: {expected}0.750 (least 0.750)\n" in output


def test_the_largest_changes_come_first_and_few_of_what_got_better(write, verdict):
    rows = [SPEED | {"numel": 2**27 + i} for i in range(20)]
    better = [row | {"share_of_copy": 0.98 + i / 1000} for i, row in enumerate(rows)]
    write("old", "speed.csv", *rows)
    write("new", "speed.csv", *better)
    _, output = verdict()
    lines = output.partition("got better (20)\n")[2].splitlines()
    assert str(2**27 + 19) in lines[0]
    assert lines[compare.LISTED] == f"  and {20 - compare.LISTED} more"
    ended, output = verdict("new", "old")
    assert ended == 1
    assert output.count("share of a copy") == 20


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith(("net", "tests"))])
def test_others_are_not_judged(change, name):
    column, worse = next((row[1], row[4]) for row in FIGURES if row[0] == name)
    ended, output = change(name, {"provider": "naive"}, {"provider": "naive", column: worse})
    assert ended == 2
    assert output.splitlines()[-1].startswith("expected figures of ours in both folders, got none")


# Speed


@pytest.mark.parametrize(
    "fields", [{"numel": 2**20}, {"api": "public", "median": 0.5}, {"launch": "graph"}], ids=repr
)
def test_times_of_the_host_are_not_compared(write, verdict, fields):
    write("old", "speed.csv", SPEED, SPEED | fields)
    write("new", "speed.csv", SPEED, SPEED | fields | {"share_of_copy": 0.5})
    ended, output = verdict()
    assert ended == 0
    assert "\n  speed.csv, 1: the time is the host's\n" in output


@pytest.mark.parametrize("fields", [{"api": "kernel"}, {"launch": "graph"}], ids=repr)
def test_only_public_calls_are_judged_by_what_they_cost_the_host(write, verdict, fields):
    cell = SPEED | {"numel": 2**10} | fields
    aten = cell | {"provider": "aten", "host_us": 5}
    write("old", "speed.csv", SPEED, cell | {"host_us": 5}, aten)
    write("new", "speed.csv", SPEED, cell | {"host_us": 50}, aten)
    ended, output = verdict()
    assert ended == 0
    assert "time of the host" not in output


# A share of 0.95 at a median of 0.13; a time of 0.13 * 0.95 / 0.93 = 0.1328 is a share of 0.93.
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"q20": 0.129, "q80": 0.1328}, {"q20": 0.1330, "q80": 0.14}, True),
        ({"q20": 0.129, "q80": 0.1328}, {"q20": 0.1325, "q80": 0.14}, False),
        ({"q20": 0.129, "q80": 0.1328}, {"q20": 0.1328, "q80": 0.14}, False),  # they touch
        ({"q20": 0.129, "q80": 0.15}, {}, True),  # NEW has none
        ({}, {"q20": 0.12, "q80": 0.15}, True),
        ({"q20": 0.129, "q80": 0.15}, {"q20": 0, "q80": 0.15}, True),
    ],
)
def test_a_share_is_worse_where_its_ranges_do_not_overlap(change, old, new, expected):
    slower = {"median": 0.13 * 0.95 / 0.92, "share_of_copy": 0.92} | new
    ended, output = change("speed.csv", old, slower)
    assert ended == ("got worse (1)" in output) == expected
    ended, output = change("speed.csv", slower, old)
    assert ended == 0
    assert ("got better (1)" in output) == expected
    within = {"median": 0.13 * 0.95 / 0.931, "share_of_copy": 0.931} | new
    assert change("speed.csv", old, within)[0] == 0  # within 0.02, wherever the ranges are


def test_ranges_are_of_the_share_and_not_of_the_time(change):
    """A time that is longer, and of a slower copy, is no smaller share."""
    old = {"median": 0.13, "q20": 0.129, "q80": 0.131, "share_of_copy": 0.95}
    new = {"median": 0.26, "q20": 0.258, "q80": 0.262, "share_of_copy": 0.92}
    assert change("speed.csv", old, new)[0] == 1
    assert "got better (1)" in change("speed.csv", new, old)[1]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((20, 10), (23.9, 10), (0, 0)),
        ((20, 10), (24.1, 10), (1, 0)),
        ((24.1, 10), (20, 10), (0, 1)),
        ((5, 5), (6.9, 5), (0, 0)),  # 38 %, but less than 2 µs
        ((5, 5), (7.1, 5), (1, 0)),
        ((20, 10), (40, 20), (0, 0)),  # the host is slower
        ((20, 10), (20, 5), (1, 0)),  # the host is faster, and we are not
    ],
)
def test_costs_on_the_host_are_judged_beside_torchs(write, verdict, old, new, expected):
    call = SPEED | {"api": "public", "median": 1.0}
    for folder, (ours, torchs) in (("old", old), ("new", new)):
        rows = call | {"host_us": ours}, call | {"provider": "aten", "host_us": torchs}
        write(folder, "speed.csv", *rows)
    ended, output = verdict()
    worse, better = expected
    assert ended == worse
    assert output.splitlines()[-1].endswith(f"worse: {worse}, better: {better}, failures: 0")
    assert ("time of the host: " in output) == bool(worse or better)


def test_costs_on_the_host_are_judged_where_both_files_have_them(write, verdict):
    call = SPEED | {"api": "public", "median": 1.0}
    aten = call | {"provider": "aten"}
    write("old", "speed.csv", call, aten)
    write("new", "speed.csv", call | {"host_us": 50}, aten | {"host_us": 5})
    ended, output = verdict()
    assert ended == 0
    assert "speed.csv, 1: OLD has no time of the host" in output
    write("old", "speed.csv", call | {"host_us": 5})  # without torch's
    assert verdict()[0] == 0
    write("old", "speed.csv", call | {"host_us": 5}, aten | {"host_us": 5})
    assert verdict()[0] == 1


# Networks


@pytest.fixture
def is_slower(change):
    """Whether the second row of a network is slower than the first, and the first then faster."""

    def judge(old, new):
        ended, output = change("networks.csv", old, new)
        assert ended == ("got worse (1)" in output) == ("time, of torch's: " in output)
        reverse, reversed_output = change("networks.csv", new, old)
        assert reverse == 0
        assert ("got better (1)" in reversed_output) == ended
        return bool(ended)

    return judge


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ms": 20.5, "min": 10.3}, True),
        ({"ms": 20.3, "min": 10.3}, False),
        ({"ms": 30.0, "min": 10.1}, False),
        ({"ms": 20.1, "min": 15.0}, False),
    ],
)
def test_a_network_is_slower_where_median_and_least_are(is_slower, fields, expected):
    assert is_slower({}, fields) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("host", "host"),
        ("host", "device"),
        ("device", "host"),
        ("device", ""),
        ("", ""),
        ("", "host"),
    ],
)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ms": 22.1, "min": 11.1}, True),
        ({"ms": 21.9, "min": 11.1}, False),
        ({"ms": 30.0, "min": 10.9}, False),
    ],
)
def test_a_step_that_the_host_may_bound_has_another_threshold(
    is_slower, fields, expected, old, new
):
    assert is_slower({"bound": old}, {"bound": new} | fields) == expected


def test_a_file_that_does_not_say_what_bounds_a_step_may_be_of_the_host(write, verdict):
    fused, torch = ({key: row[key] for key in row if key != "bound"} for row in (FUSED, TORCH))
    for ms, expected in ((21.9, 0), (22.1, 1)):
        write("old", "networks.csv", fused, torch)
        write("new", "networks.csv", FUSED | {"ms": ms, "min": 11.1}, TORCH)
        assert verdict()[0] == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"q20": 19.0, "q80": 21.0}, {"q20": 21.2, "q80": 23.0}, True),
        ({"q20": 19.0, "q80": 21.0}, {"q20": 20.8, "q80": 23.0}, False),
        ({"q20": 19.0, "q80": 21.0}, {"q20": 21.0, "q80": 23.0}, False),  # they touch
        ({"q20": 19.0, "q80": 30.0}, {}, True),  # NEW has none
        ({}, {"q20": 15.0, "q80": 30.0}, True),
        ({"q20": 19.0, "q80": 30.0}, {"q20": 15.0, "q80": ""}, True),
    ],
)
def test_a_network_is_slower_where_its_ranges_do_not_overlap(is_slower, old, new, expected):
    assert is_slower(old, {"ms": 22.0, "min": 11.0} | new) == expected


@pytest.mark.parametrize("torchs", [0.5, 1, 2])
@pytest.mark.parametrize(("q20", "expected"), [(21.2, 1), (20.8, 0)])
def test_ranges_of_networks_are_beside_torchs_median(write, verdict, torchs, q20, expected):
    """On a machine on which torch's median is another, all times are."""
    write("old", "networks.csv", FUSED | {"q20": 20.0, "q80": 21.0}, TORCH)
    new = {"ms": 22.0, "min": 11.0, "q20": q20, "q80": 23.0}
    ours, base = (
        {column: value * torchs for column, value in times.items()}
        for times in (new, {"ms": 40.0, "min": 20.0})
    )
    write("new", "networks.csv", FUSED | ours, TORCH | base)
    ended, output = verdict()
    assert ended == expected
    assert ("0.500 (least 0.500) -> 0.550 (least 0.550)" in output) == bool(expected)


def test_a_network_is_judged_beside_torchs_modules(write, verdict):
    slower = {"ms": 80.0, "min": 40.0}
    write("old", "networks.csv", TORCH, FUSED)
    write("new", "networks.csv", TORCH | slower, FUSED | {"ms": 40.0, "min": 20.0})
    assert verdict()[0] == 0
    checkpoint = FUSED | {"mode": "checkpoint"}  # of torch's modules
    write("old", "networks.csv", TORCH, FUSED, checkpoint)
    write("new", "networks.csv", TORCH, FUSED, checkpoint | slower)
    assert verdict()[0] == 0
    write("new", "networks.csv", FUSED)
    ended, output = verdict()
    assert ended == 2
    assert "networks.csv, 1: NEW has no time, of torch's" in output


@pytest.mark.parametrize(("torchs", "expected"), [(8.0, 1), (8.2, 0)])
def test_memory_that_torchs_step_takes_more_as_well_is_not_ours(write, verdict, torchs, expected):
    write("old", "networks.csv", TORCH, FUSED)
    write("new", "networks.csv", TORCH | {"step_gb": torchs}, FUSED | {"step_gb": 4.2})
    assert verdict()[0] == expected


@pytest.mark.parametrize(("step", "same"), [(8.3, True), (7.7, True), (8.5, False), (7.5, False)])
def test_another_network_of_the_same_name_is_not_compared(write, verdict, step, same):
    write("old", "networks.csv", TORCH, FUSED)
    write("new", "networks.csv", TORCH | {"step_gb": step}, FUSED | {"step_gb": 100.0})
    ended, output = verdict()
    assert ended == (1 if same else 2)
    reason = f"resnet50 mish is not the same network: torch's step takes 8.000 GiB in OLD, {step}"
    assert (reason in output) == (not same)


@pytest.mark.parametrize("other", [{"direction": "inference"}, {"batch": 256}], ids=repr)
def test_a_direction_and_a_batch_have_a_torch_of_their_own(write, verdict, other):
    slower = {"ms": 80.0, "min": 40.0}
    write("old", "networks.csv", FUSED, TORCH, FUSED | other, TORCH | other)
    write("new", "networks.csv", FUSED, TORCH, FUSED | other | slower, TORCH | other | slower)
    ended, output = verdict()
    assert ended == 1  # fused took half of torch's time there
    assert "got worse (1)" in output
    assert "got better" not in output
    line = f"batch {other.get('batch', 128)} {other.get('direction', 'training')} fused, time"
    assert f"{line}, of torch's: 0.500 (least 0.500) -> 1.000 (least 1.000)" in output
    write("old", "networks.csv", FUSED, TORCH)
    ended, output = verdict()
    assert ended == 0
    assert "networks.csv, 1: OLD has no such row" in output


OLDEST = [
    {"net": "mobilenet_v2 bs8", "mode": mode, "ms": ms, "min": ms, "peak_gb": 2, "step_gb": 1}
    for mode, ms in (
        ("torch", 10), ("fused", 10), ("fused notinplace+remat", 10),
        ("fused notinplace+remat norm", 10),
    )
]  # fmt: skip
OLDER = [
    {"net": "mobilenet_v2 relu6 bs8", "batch": 8, "mode": mode, "ms": ms, "min": ms, "step_gib": 1}
    for mode, ms in (("torch", 20), ("fused", 20), ("fused remat", 30), ("fused remat norm", 20))
]
NEWEST = [
    TORCH | {"net": "mobilenet_v2 bs8", "batch": 8, "step_gb": 1, "mode": mode, "ms": ms, "min": ms}
    for mode, ms in (("torch", 5), ("fused", 5), ("fused remat", 6), ("fused remat norm", 5))
]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(OLDEST, OLDER, "worse"), (OLDEST, NEWEST, "worse"), (OLDER, NEWEST, "better")],
    ids=["oldest-older", "oldest-newest", "older-newest"],
)
def test_networks_of_older_files_are_found(write, verdict, old, new, expected):
    write("old", "networks.csv", *old)
    write("new", "networks.csv", *new)
    ended, output = verdict()
    assert ended == (expected == "worse")
    assert ": 6 in networks.csv" in output
    assert "not compared" not in output
    title, line = output.split("\n\n")[1].splitlines()
    assert title == f"got {expected} (1)"
    assert "training fused remat, time" in line


# Accuracy


@pytest.mark.parametrize(("inputs", "alike"), [(1009, True), (1011, False)])
def test_errors_of_other_inputs_are_not_compared(change, inputs, alike):
    ended, output = change("accuracy.csv", {}, {"inputs": inputs, "max_ulp": 50.0})
    assert ended == (1 if alike else 2)
    assert ("another number of inputs" in output) == (not alike)


# Tests, errors and what is missing


def test_a_test_that_fails_is_a_line_of_its_own(write, verdict):
    failed = {"outcome": "failed", "error": "AssertionError: no"}
    tests = [TEST | {"test": f"test_{i}"} for i in range(4)]
    write("old", "tests.csv", *tests[:2], tests[2] | failed)
    write("new", "tests.csv", tests[0], *(row | failed for row in tests[1:]))
    ended, output = verdict()
    assert ended == 1
    assert "failed in NEW (3)" in output
    for i in (1, 2, 3):
        assert f"\n  tests.csv: test_{i}: AssertionError: no\n" in output
    last = "1 of 3 rows of OLD were compared; figures: 1, worse: 0, better: 0, failures: 3"
    assert output.splitlines()[-1] == f"compare: FAILED: {last}"
    write("new", "tests.csv", *tests[:2], tests[2] | {"outcome": "error"})
    ended, output = verdict()
    assert ended == 1
    assert "test_2: error\n" in output


def test_a_test_that_passes_again_is_better_and_one_that_skips_is_not_compared(write, verdict):
    others = [TEST | {"test": name} for name in ("one", "two")]
    failed, skipped = {"outcome": "failed", "error": "no"}, {"outcome": "skipped", "error": "1 GPU"}
    write("old", "tests.csv", TEST, others[0] | failed, others[1])
    write("new", "tests.csv", TEST, others[0], others[1] | skipped)
    ended, output = verdict()
    assert ended == 0
    assert "tests.csv: one, error: no -> none" in output
    assert "tests.csv, 1: NEW skipped it: 1 GPU" in output


def test_errors_in_rows_fail_once_for_each_text(write, verdict):
    rows = [SPEED | {"numel": 2**27 + i} for i in range(3)]
    error = {"median": "", "share_of_copy": "", "error": "RuntimeError: no kernel"}
    write("old", "speed.csv", *rows)
    write("new", "speed.csv", *(row | error for row in rows), SPEED | {"numel": 2**28} | error)
    ended, output = verdict()
    assert ended == 1
    assert "failed in NEW (1)" in output
    assert "speed.csv: cuda mish forward bf16 2^27 contiguous kernel call, and 3 more: " in output
    write("new", "speed.csv", SPEED, SPEED | {"provider": "naive"} | error)
    assert verdict()[0] == 1  # also of others
    assert verdict("new", "old")[0] == 0


def test_what_is_missing_or_skipped_is_listed_by_reason_and_fails_nothing(write, verdict):
    rows = [SPEED | {"numel": 2**27 + i} for i in range(4)]
    skipped = {"median": "", "share_of_copy": "", "skipped": "over the time limit"}
    write("old", "speed.csv", *rows)
    write("new", "speed.csv", rows[0], *(row | skipped for row in rows[1:3]))
    write("new", "memory.csv", MEMORY)
    ended, output = verdict()
    assert ended == 0
    reasons = output.partition("not compared, by reason (3)\n")[2].splitlines()[:3]
    assert reasons == [
        "  speed.csv, 2: NEW skipped it: over the time limit",
        "  speed.csv, 1: NEW has no such row",
        "  memory.csv, 1: OLD has no such row",
    ]
    assert "OLD skipped it: over the time limit" in verdict("new", "old")[1]


OUT_OF_MEMORY = {"median": "", "share_of_copy": "", "skipped": "out of memory"}


def test_what_was_measured_and_runs_out_of_memory_fails(write, verdict):
    rows = [SPEED | {"numel": 2**27 + i} for i in range(4)]
    lost = [row | OUT_OF_MEMORY for row in rows]
    write("old", "speed.csv", *rows)
    write("new", "speed.csv", rows[0], *lost[1:])
    ended, output = verdict()
    assert ended == 1
    assert "failed in NEW (1)" in output
    where = f"cuda mish forward bf16 {2**27 + 1} contiguous kernel call, and 2 more"
    assert f"  speed.csv: {where}: out of memory, and OLD measured it\n" in output
    assert verdict("new", "old")[0] == 0
    assert verdict("new", "new")[0] == 0


@pytest.mark.parametrize("fields", [OUT_OF_MEMORY, {"skipped": "over"}, {"error": "no"}], ids=repr)
def test_what_was_not_measured_in_old_may_run_out_of_memory(write, verdict, fields):
    other = SPEED | {"numel": 2**28}
    write("old", "speed.csv", SPEED, other | {"median": "", "share_of_copy": ""} | fields)
    write("new", "speed.csv", SPEED, other | OUT_OF_MEMORY, SPEED | {"numel": 1} | OUT_OF_MEMORY)
    ended, output = verdict()
    assert ended == 0
    assert "NEW skipped it: out of memory" in output


def test_a_network_is_lost_where_torchs_modules_run_out_of_memory(write, verdict):
    nothing = {"ms": "", "min": "", "step_gb": "", "skipped": "out of memory"}
    write("old", "networks.csv", TORCH, FUSED)
    write("new", "networks.csv", TORCH | nothing, FUSED)
    ended, output = verdict()
    assert ended == 1
    line = "resnet50 mish batch 128 training torch: out of memory, and OLD measured it"
    assert f"  networks.csv: {line}\n" in output


def test_a_file_that_new_lacks_is_a_line_before_the_verdict_and_fails_nothing(write, verdict):
    write("old", "speed.csv", *(SPEED | {"numel": 2**27 + i} for i in range(3)))
    write("old", "networks.csv", TORCH, FUSED)
    write("old", "memory.csv", MEMORY | {"provider": "aten"})  # nothing of ours
    write("new", "networks.csv", TORCH, FUSED)
    ended, output = verdict()
    assert ended == 0
    assert "not compared, by reason" not in output
    lines = output.splitlines()
    assert lines[-3] == "NEW has no speed.csv: 3 rows of OLD were not compared"
    assert lines[-1].startswith("compare: passed: 1 of 4 rows of OLD were compared; figures: 2, ")
    assert "memory.csv" not in output
    ended, output = verdict("new", "old")
    assert ended == 0
    assert "NEW has no" not in output
    assert "speed.csv, 3: OLD has no such row" in output


def test_tests_that_new_lacks_fail(write, verdict):
    write("old", "speed.csv", SPEED)
    write("old", "tests.csv", TEST)
    write("new", "speed.csv", SPEED)
    ended, output = verdict()
    assert ended == 1
    assert "failed in NEW (1)\n  tests.csv: all tests: NEW has no such file; run them\n" in output
    assert "\nNEW has no tests.csv: 1 rows of OLD were not compared\n" in output
    assert output.splitlines()[-1].endswith("worse: 0, better: 0, failures: 1")
    assert verdict("new", "old")[0] == 0


def test_the_last_line_says_how_much_of_old_was_compared(write, verdict):
    rows = [SPEED | {"numel": 2**20 * (i + 1)} for i in range(6)]  # the first four: the host's
    write("old", "speed.csv", *rows, SPEED | {"provider": "naive"})
    write("old", "memory.csv", MEMORY)
    write("new", "speed.csv", *rows[:-1], SPEED | {"numel": 2**28})
    write("new", "memory.csv", MEMORY)
    _, output = verdict()
    last = "compare: passed: 2 of 7 rows of OLD were compared; figures: 3, worse: 0, "
    assert output.splitlines()[-1].startswith(last)


@pytest.mark.parametrize(("shares", "worse"), [((0.5, 0.95), 0), ((0.95, 0.5), 1)])
def test_of_rows_that_nothing_tells_apart_the_last_one_is_compared(write, verdict, shares, worse):
    write("old", "speed.csv", SPEED)
    write("new", "speed.csv", *(SPEED | {"share_of_copy": share} for share in shares))
    ended, output = verdict()
    assert ended == worse
    last = f"1 of 1 rows of OLD were compared; figures: 1, worse: {worse}, better: 0, failures: 0"
    assert output.splitlines()[-1].endswith(last)
    ended, output = verdict("new", "old")
    assert ended == 0
    last = f"1 of 1 rows of OLD were compared; figures: 1, worse: 0, better: {worse}, failures: 0"
    assert output.splitlines()[-1].endswith(last)


def test_of_torchs_rows_that_nothing_tells_apart_the_last_one_counts(write, verdict):
    slower = {"ms": 80.0, "min": 40.0}
    write("old", "networks.csv", FUSED, TORCH)
    write("new", "networks.csv", FUSED, FUSED | {"ms": 40.0, "min": 20.0}, TORCH, TORCH | slower)
    ended, output = verdict()
    assert ended == 0
    assert output.splitlines()[-1].endswith("figures: 2, worse: 0, better: 0, failures: 0")


def test_an_error_in_the_first_of_such_rows_fails(write, verdict):
    write("old", "speed.csv", SPEED)
    write("new", "speed.csv", SPEED | {"share_of_copy": "", "median": "", "error": "no"}, SPEED)
    ended, output = verdict()
    assert ended == 1
    assert output.splitlines()[-1].endswith("figures: 1, worse: 0, better: 0, failures: 1")


def test_rows_that_a_column_tells_apart_which_old_lacks_are_not_compared(write, verdict):
    old = {key: COUNTS[key] for key in COUNTS if key != "capability"}
    write("old", "ours.csv", old, old | {"provider": "triton"})
    other = COUNTS | {"capability": 80, "registers": 99}
    write("new", "ours.csv", COUNTS, other, COUNTS | {"provider": "triton"})
    ended, output = verdict()
    assert ended == 0
    assert "ours.csv, 1: NEW has more than one such row" in output
    assert ": 1 of 2 rows of OLD were compared" in output


def test_failures_count_in_files_that_old_does_not_have(write, verdict):
    write("old", "speed.csv", SPEED)
    write("new", "speed.csv", SPEED)
    write("new", "tests.csv", TEST | {"outcome": "failed", "error": "no"})
    ended, output = verdict()
    assert ended == 1
    assert "tests.csv: tests/test_gpu.py::test_auto: no" in output


# Runs that were cut off


def test_a_run_that_was_cut_off_fails(write, verdict):
    write("old", "speed.csv", SPEED)
    write("new", "speed.partial.csv", SPEED | {"share_of_copy": 0.5})
    ended, output = verdict()
    assert ended == 1
    assert "speed.partial.csv: the run: it was cut off; run it again" in output
    assert "95.0% -> 50.0%" in output  # its rows are judged
    assert "worse: 1, better: 0, failures: 1" in output


def test_a_last_row_that_was_cut_off_is_no_traceback(write, verdict):
    write("old", "speed.csv", SPEED)
    path = write("new", "speed.partial.csv", SPEED)
    with path.open("a") as file:
        file.write("cuda,mish,bf16")
    ended, output = verdict()
    assert ended == 1
    assert "1 of 1 rows of OLD were compared" in output


@pytest.mark.parametrize(
    ("of_complete", "of_partial", "expected"), [(2000, 1000, 0), (1000, 2000, 1), (1000, 1000, 1)]
)
def test_the_last_run_is_judged(write, verdict, of_complete, of_partial, expected):
    write("old", "speed.csv", SPEED)
    complete = write("new", "speed.csv", SPEED)
    partial = write("new", "speed.partial.csv", SPEED | {"share_of_copy": 0.5})
    os.utime(complete, (of_complete, of_complete))
    os.utime(partial, (of_partial, of_partial))
    ended, output = verdict()
    assert ended == expected
    assert ("50.0%" in output) == ("cut off" in output) == bool(expected)


def test_a_run_of_what_is_not_judged_fails_too_where_it_was_cut_off(write, verdict):
    write("old", "speed.csv", SPEED)
    write("new", "speed.csv", SPEED)
    write("new", "overhead.partial.csv", {"ms": 1})
    ended, output = verdict()
    assert ended == 1
    assert "overhead.partial.csv: the run: it was cut off" in output
    assert verdict("new", "old")[0] == 0  # of OLD it does not matter


# What is refused


def test_a_folder_with_itself(write, verdict):
    write("new", "speed.csv", SPEED)
    assert verdict("new", "new")[0] == 0
    write("new", "memory.csv", MEMORY | {"error": "no"})
    assert verdict("new", "new")[0] == 1


def test_two_gpus_are_refused(change, write, verdict):
    ended, output = change("speed.csv", {}, {"gpu": "H100"})
    assert (ended, output) == (2, "expected results of one GPU, got H100 and H200\n")
    ended, output = change("speed.csv", {}, {"gpu": ""})
    assert (ended, output) == (2, "expected results of one GPU, got H200 and Xeon\n")
    write("old", "ours.csv", COUNTS)  # of any machine
    write("new", "ours.csv", COUNTS | {"cpu": "Xeon"})
    write("new", "speed.csv", SPEED)
    assert verdict()[0] == 0


def test_what_cannot_be_compared_is_one_line(write, verdict, tmp_path):
    write("old", "speed.csv", SPEED)
    folder = tmp_path / "new"
    assert verdict() == (2, f"expected a folder of results, got {folder}\n")
    write("new", "memory.csv", MEMORY)
    expected = "expected files of results in both folders, got speed.csv and memory.csv\n"
    assert verdict() == (2, expected)
    write("new", "speed.csv", {key: SPEED[key] for key in SPEED if key != "api"})
    ended, output = verdict()
    assert ended == 2
    assert output.splitlines()[-1] == "expected a column 'api' in speed.csv, got none"
    write("new", "speed.csv", SPEED | {"share_of_copy": "much"})
    assert "expected numbers in speed.csv, got could not convert" in verdict()[1]


def test_what_is_no_csv_file_is_one_line(write, verdict):
    write("old", "speed.csv", SPEED)
    path = write("new", "speed.csv", SPEED)
    path.write_bytes(bytes(range(256)))
    ended, output = verdict()
    assert (ended, len(output.splitlines())) == (2, 1)
    assert output.startswith(f"expected a csv file of results, got {path}: 'utf-8' codec can't")
    path.unlink()
    path.mkdir()
    ended, output = verdict()
    assert (ended, len(output.splitlines())) == (2, 1)
    assert output.startswith(f"expected a csv file of results, got {path}: [Errno ")


# The results that there are


def test_an_h200_after_the_kernels_were_tuned(capsys):
    """Of 91e1619 and what came of it: no kernel is slower, and most of CUDA C++ is faster.

    The step of a batch of 8 takes 12 MiB more than it did, in torch's modules as in ours.
    """
    folder = environment.ROOT / "results" / "nvidia-h200"
    assert status("compare", folder / "91e1619", folder) == 0
    output = capsys.readouterr().out
    assert "figures compared on NVIDIA H200: 77 in speed.csv, 8 in networks.csv" in output
    assert "cuda relu6 backward fp32 2^26 contiguous kernel call" in output
    last = "81 of 690 rows of OLD were compared; figures: 85, worse: 0, better: 25, failures: 0"
    assert output.splitlines()[-1] == f"compare: passed: {last}"
