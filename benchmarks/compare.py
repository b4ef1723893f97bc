"""A verdict on two folders of results of the same GPU, or CPU: what got worse from OLD to NEW.

    python -m benchmarks compare OLD NEW

A figure of ours is worse where it passes its threshold:

- speed.csv, speed_edges.csv: a share of a copy fell by more than 0.02, and its ranges in OLD and
  NEW, from the 20 % to the 80 % quantile of the time, do not overlap; only times of the device
  count. Where both have `host_us`, a call costs the host over 20 % and 2 µs more than it did, after
  both are set beside torch's op in the same file, so a slower host does not count as a regression.
- ours.csv: instructions of an element, registers or spills of a kernel rose at all.
- memory.csv: saved or peak bytes rose by more than 0.5 %.
- accuracy.csv: the largest error rose by more than 1 %.
- networks.csv, networks_compiled.csv: beside torch's modules in the same file both the median and
  the least time of a step rose by more than 2 %, and its ranges from the 20 % to the 80 % quantile
  do not overlap. It has to be more than 10 % where the host bounds the step in OLD or NEW, and
  where nobody knows, as on a CPU: the time of the host scatters. Or the memory of a step, less that
  of torch's, rose by more than 1 % of torch's.
- tests.csv: a test fails in NEW, also where it did in OLD.

Better is what would be worse from NEW to OLD. Ranges count where both rows have the quantiles.

An error in any row of NEW is a failure, and so is a row that was measured in OLD and ran out of
memory in NEW, and a run that was cut off, which has left a `.partial.csv` that no newer complete
file replaces. What only one of both has is listed and fails nothing, so that the folder of a run of
one kind can be compared; only a tests.csv that NEW lacks is a failure. The last line says how many
of the rows that OLD has of ours were compared. Of rows that nothing tells apart the last one is
compared. Between a folder and itself only failures are judged.

Exit status: 0; 1 if anything got worse or failed; 2 if nothing can be compared.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import environment, options
from benchmarks.networks import of_today
from benchmarks.providers import OURS
from benchmarks.speed import OUT_OF_MEMORY
from benchmarks.speed_results import comparison, quotable

WORSE, BETTER, EVEN, FAILED, NOT_COMPARED = "worse", "better", "even", "failed", "not compared"
COMPARED = (WORSE, BETTER, EVEN)
FAILURES = ("failed", "error")  # outcomes of a test
SHARE_OF_COPY = 0.02
HOST_RATIO, HOST_US = 1.2, 2.0
BYTES, ULP, NETWORK_TIME, NETWORK_MEMORY = 1.005, 1.01, 1.02, 0.01
NETWORK_TIME_OF_HOST = 1.1  # on a CPU two runs of the same code differed by 4 % and more
SAME_NETWORK = 0.05  # by how much torch's memory of a step may differ in the same network
SAME_INPUTS = 0.01  # and the number of inputs: a search of more finds a larger error
LISTED = 12  # lines of what got better, and of what could not be compared

Numbers = tuple[float, ...] | None


class Finding(NamedTuple):
    """What became of one figure.

    Args:
        what: the figure; of what is not compared, the reason.
        change: how large it is beside the old figure, to sort by.
    """

    what: str
    where: str
    old: str
    new: str
    verdict: str
    change: float = 0.0


def numbers(row: dict, *columns: str) -> Numbers:
    """The figures in these columns, or None where one is missing."""
    values = [row.get(column) for column in columns]
    return tuple(map(float, values)) if all(values) else None


def more_than(ratio: float) -> Callable[[Numbers, Numbers], bool]:
    """Whether all figures rose by more than `ratio`: the noise of one of them is no change."""
    return lambda old, new: all(after > ratio * before for before, after in zip(old, new))


def is_below(low: tuple[float, ...], high: tuple[float, ...]) -> bool:
    """Whether one range ends before the other begins; one that is empty is not known."""
    return not low or not high or low[1] < high[0]


def share_fell(old: Numbers, new: Numbers) -> bool:
    """Args: old, new: the share, and its range where that is known."""
    return old[0] - new[0] > SHARE_OF_COPY and is_below(new[1:], old[1:])


def slower_by(ratio: float) -> Callable[[Numbers, Numbers], bool]:
    """Of median, least, and the range where that is known."""
    rose = more_than(ratio)
    return lambda old, new: rose(old[:2], new[:2]) and is_below(old[2:], new[2:])


def host_rose(old: Numbers, new: Numbers) -> bool:
    """Args: old, new: ours, and torch's, which tells by how much the host itself differs."""
    expected = old[0] * new[1] / old[1]
    return new[0] > HOST_RATIO * expected and new[0] - expected > HOST_US


def grew(old: Numbers, new: Numbers) -> bool:
    """Args: old, new: what a step of ours takes, and torch's: a library of it may take more."""
    return (new[0] - new[1]) - (old[0] - old[1]) > NETWORK_MEMORY * old[1]


def judged(
    what: str, old: Numbers, new: Numbers, is_worse: Callable[[Numbers, Numbers], bool], shown: str
) -> Iterator[Finding]:
    """The finding on one figure; none where neither file has it."""
    if old is None and new is None:
        return
    if old is None or new is None:
        yield not_compared(f"{'OLD' if old is None else 'NEW'} has no {what}")
        return
    verdict = WORSE if is_worse(old, new) else BETTER if is_worse(new, old) else EVEN
    change = abs(new[0] - old[0]) / old[0] if old[0] else math.inf
    yield Finding(what, "", shown.format(*old), shown.format(*new), verdict, change)


def not_compared(reason: str) -> Finding:
    return Finding(reason, "", "", "", NOT_COMPARED)


# What each kind of file says of one row in both folders.


def speed(old: dict, new: dict) -> Iterator[Finding]:
    if quotable(old) and quotable(new):
        yield from judged("share of a copy", share(old), share(new), share_fell, "{:.1%}")
    else:
        yield not_compared("the time is the host's")
    if (new["api"], new["launch"]) == ("public", "call"):
        costs = (numbers(row, "host_us", "base_host_us") for row in (old, new))
        yield from judged("time of the host", *costs, host_rose, "{:.1f} µs (torch's op {:.1f})")


def share(row: dict) -> Numbers:
    """The share of a copy, and its range from the slowest to the fastest of the usual runs."""
    found, times = numbers(row, "share_of_copy"), numbers(row, "median", "q20", "q80")
    if found is None or times is None or 0 in times:
        return found
    median, q20, q80 = times
    return *found, found[0] * median / q80, found[0] * median / q20


def instructions(old: dict, new: dict) -> Iterator[Finding]:
    for column in ("instructions_per_element", "registers", "spills"):
        counts = (numbers(row, column) for row in (old, new))
        yield from judged(column.replace("_", " "), *counts, more_than(1), "{:g}")


def memory(old: dict, new: dict) -> Iterator[Finding]:
    for column, what in (("saved_bytes", "bytes saved"), ("peak_bytes", "bytes at the peak")):
        bytes_ = (numbers(row, column) for row in (old, new))
        yield from judged(f"{what}, an element", *bytes_, more_than(BYTES), "{:.4g}")


def accuracy(old: dict, new: dict) -> Iterator[Finding]:
    inputs = [numbers(row, "inputs") for row in (old, new)]
    if differ(*inputs, SAME_INPUTS):
        yield not_compared("it was searched for with another number of inputs")
        return
    errors = (numbers(row, "max_ulp") for row in (old, new))
    yield from judged("largest error, ULP", *errors, more_than(ULP), "{:.4g}")


def network(old: dict, new: dict) -> Iterator[Finding]:
    steps = [numbers(row, "base_step_gb") for row in (old, new)]
    if differ(*steps, SAME_NETWORK):
        (before,), (after,) = steps
        reason = f"torch's step takes {before:.3f} GiB in OLD, {after:.3f} in NEW"
        yield not_compared(f"{new['net']} is not the same network: {reason}")
        return
    is_slower = slower_by(max(time_threshold(old), time_threshold(new)))
    times = (beside_torch(row) for row in (old, new))
    yield from judged("time, of torch's", *times, is_slower, "{:.3f} (least {:.3f})")
    sizes = (numbers(row, "step_gb", "base_step_gb") for row in (old, new))
    yield from judged("memory", *sizes, grew, "{:.3f} GiB (torch's {:.3f})")


def test(old: dict, new: dict) -> Iterator[Finding]:
    """Of a test that passed in both; `findings` tells the others."""
    yield Finding("test", "", old["outcome"], new["outcome"], EVEN)


def differ(old: Numbers, new: Numbers, share: float) -> bool:
    return None not in (old, new) and abs(new[0] - old[0]) > share * old[0]


def beside_torch(row: dict) -> Numbers:
    """Median and least time of a step, of torch's, and the range where the row has one."""
    ours, base = numbers(row, "ms", "min"), numbers(row, "base_ms", "base_min")
    if ours is None or base is None or 0 in base:
        return None
    spread = numbers(row, "q20", "q80") or ()
    median = base[0]
    return ours[0] / median, ours[1] / base[1], *(quantile / median for quantile in spread)


def time_threshold(row: dict) -> float:
    """A GPU keeps time better than a host; where nobody knows which it was, it may be the host."""
    return NETWORK_TIME if row.get("bound") == "device" else NETWORK_TIME_OF_HOST


# How the rows of each kind are read: what they are called, and what stands beside them.


def with_base(
    rows: list[dict],
    cell: Callable[[dict], tuple],
    is_base: Callable[[dict], bool],
    columns: Sequence[str],
) -> list[dict]:
    """Each row with `columns` of the row of torch's in the same cell, as `base_<column>`."""
    base = {cell(row): row for row in rows if is_base(row)}
    return [
        row | {f"base_{column}": base.get(cell(row), {}).get(column, "") for column in columns}
        for row in rows
    ]


def as_they_are(rows: list[dict]) -> list[dict]:
    return rows


def speed_rows(rows: list[dict]) -> list[dict]:
    return with_base(rows, comparison, lambda row: row["provider"] == "aten", ["host_us"])


def network_rows(rows: list[dict]) -> list[dict]:
    def cell(row: dict) -> tuple:
        return row["net"], row["direction"], row.get("batch")

    def is_base(row: dict) -> bool:
        return row["mode"] == "torch"

    return with_base(list(map(of_today, rows)), cell, is_base, ["ms", "min", "step_gb"])


def test_rows(rows: list[dict]) -> list[dict]:
    """`error` and `skipped` say what the outcome is, as in other files."""
    return [
        row
        | {
            "error": (row["error"] or row["outcome"]) if row["outcome"] in FAILURES else "",
            "skipped": (row["error"] or "skipped") if row["outcome"] == "skipped" else "",
        }
        for row in rows
    ]


def by_us(row: dict) -> bool:
    return row["provider"] in OURS


class Kind(NamedTuple):
    """A kind of file.

    Args:
        columns: what tells its rows apart, as far as both files have them.
        judge: yields what it finds in a row of OLD and that of NEW.
        read: makes of the rows in a file those that are judged.
        is_ours: whether a row is judged; errors count in all of them.
    """

    columns: tuple[str, ...]
    judge: Callable[[dict, dict], Iterator[Finding]]
    read: Callable[[list[dict]], list[dict]] = as_they_are
    is_ours: Callable[[dict], bool] = by_us


CELL = ("provider", "activation", "direction", "dtype")
SPEED = Kind((*CELL, "numel", "layout", "api", "launch"), speed, speed_rows)
NETWORKS = Kind(
    ("net", "batch", "direction", "mode"),
    network,
    network_rows,
    lambda row: row["mode"].startswith("fused"),
)
TESTS = "tests.csv"
COUNTS = "ours.csv"  # read in machine code: it says nothing of the machine that it was read on
KINDS = {
    TESTS: Kind(("test",), test, test_rows, lambda row: True),
    "speed.csv": SPEED,
    "speed_edges.csv": SPEED,
    "networks.csv": NETWORKS,
    "networks_compiled.csv": NETWORKS,
    "memory.csv": Kind(
        ("provider", "method", "activation", "dtype", "case", "inplace", "numel"), memory
    ),
    "accuracy.csv": Kind(("provider", "activation", "kind", "dtype", "region"), accuracy),
    COUNTS: Kind((*CELL, "capability"), instructions),
}

# How a column is shown where its value alone does not say what it is.
SHOWN = {
    "numel": lambda value: options.size_name(int(value)),
    "batch": "batch {}".format,
    "capability": "sm_{}".format,
    "inplace": lambda value: "in place" if value == "True" else "",
}


def name_of(row: dict, columns: Sequence[str]) -> str:
    """What tells `row` apart, for people."""
    cells = ((column, row[column]) for column in columns if row[column])
    return " ".join(filter(None, (SHOWN.get(column, str)(value) for column, value in cells)))


def rows_of_ours(kind: Kind, rows: list[dict]) -> list[dict]:
    """The rows that are judged, of those that are the same in all columns of `kind` the last one.

    A name that is given twice on the command line gives such rows. Each is a whole measurement, so
    nothing is lost by taking one, and `with_base` takes the last one of torch's, too. The least or
    the best would flatter the file that has more of them.
    """
    columns = [name for name in kind.columns if all(name in row for row in rows)]
    last = {tuple(row[name] for name in columns): row for row in filter(kind.is_ours, rows)}
    return list(last.values())


def by_name(rows: list[dict], columns: Sequence[str]) -> dict[str, list[dict]]:
    """The rows of each name, which should be one.

    They are more where the file has another column that tells them apart, and the other file lacks
    it: then nobody knows which one is to be compared.
    """
    found = {}
    for row in rows:
        found.setdefault(name_of(row, columns), []).append(row)
    return found


def reason_not_to_compare(old: list[dict], new: list[dict]) -> str:
    """Args: old, new: the rows of one name; of NEW none has an error."""
    for side, rows in (("NEW", new), ("OLD", old)):
        if not rows:
            return f"{side} has no such row"
        if len(rows) > 1:
            return f"{side} has more than one such row"
        if reason := rows[0].get("skipped"):
            return f"{side} skipped it: {reason}"
    return ""


def findings(kind: Kind, old: list[dict], new: list[dict]) -> Iterator[Finding]:
    """What became of all figures of one file.

    Args:
        old, new: its rows in both folders; none where it is not there.
    """
    old, new = kind.read(old), kind.read(new)
    columns = [name for name in kind.columns if all(name in row for row in (*old, *new))]
    new = with_lost(old, new, columns)
    yield from failures(new, columns)
    before, after = (by_name(rows_of_ours(kind, rows), columns) for rows in (old, new))
    for where in before | after:
        rows, new_rows = before.get(where, []), after.get(where, [])
        if any(row.get("error") for row in new_rows):
            continue
        if reason := reason_not_to_compare(rows, new_rows):
            found = [not_compared(reason)]
        elif error := rows[0].get("error"):
            found = [Finding("error", "", error, "none", BETTER)]
        else:
            found = kind.judge(rows[0], new_rows[0])
        yield from (each._replace(where=where) for each in found)


def with_lost(old: list[dict], new: list[dict], columns: Sequence[str]) -> list[dict]:
    """The rows of NEW; what ran out of memory there, and did not in OLD, has an error.

    This also holds for torch's rows, without which nothing in their cell can be judged.
    """
    measured = {
        name_of(row, columns) for row in old if not (row.get("skipped") or row.get("error"))
    }

    def is_lost(row: dict) -> bool:
        return OUT_OF_MEMORY in (row.get("skipped") or "") and name_of(row, columns) in measured

    error = f"{OUT_OF_MEMORY}, and OLD measured it"
    return [row | {"error": error} if is_lost(row) else row for row in new]


def failures(rows: list[dict], columns: Sequence[str]) -> Iterator[Finding]:
    """The errors in NEW: one for each test, and in other files one for each text."""
    groups = {}
    for row in rows:
        if row.get("error"):
            groups.setdefault(row.get("test") or row["error"], []).append(row)
    for first, *others in groups.values():
        more = f", and {len(others)} more" if others else ""
        yield Finding("error", name_of(first, columns) + more, "", first["error"], FAILED)


def cut_off(folder: Path) -> list[Path]:
    """What runs that ended early have left, where no newer run took its place."""
    return [
        path for path in sorted(folder.glob("*.partial.csv")) if not is_newer(complete(path), path)
    ]


def complete(partial: Path) -> Path:
    return partial.with_name(partial.name.replace(".partial.csv", ".csv"))


def is_newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime > other.stat().st_mtime


def read(folder: Path) -> dict[str, list[dict]]:
    """The rows of each file that is judged, of its last run even where that was cut off."""
    if not folder.is_dir():
        environment.refuse(f"expected a folder of results, got {folder}")
    last = {complete(path).name: path for path in cut_off(folder)}
    paths = {name: last.get(name, folder / name) for name in KINDS}
    return {name: rows_of(path) for name, path in paths.items() if path.exists()}


def rows_of(path: Path) -> list[dict]:
    try:
        return environment.read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        environment.refuse(f"expected a csv file of results, got {path}: {error}")


def machines(files: dict[str, list[dict]]) -> set[str]:
    """The GPUs, or else the CPUs, that the rows name; older files name none."""
    measured = (row for name, rows in files.items() if name != COUNTS for row in rows)
    return {row.get("gpu") or row.get("cpu") for row in measured} - {None, ""}


def commits(files: dict[str, list[dict]]) -> str:
    rows = (row for rows in files.values() for row in rows)
    found = dict.fromkeys(row["commit"] for row in rows if row.get("commit"))
    return ", ".join(found) or "of no known commit"


def listed(title: str, lines: Sequence[str], limit: float = math.inf) -> None:
    if lines:
        print(f"\n{title} ({len(lines)})")
        shown = lines if len(lines) <= limit else lines[:limit]
        print(*(f"  {line}" for line in shown), sep="\n")
        if len(shown) < len(lines):
            print(f"  and {len(lines) - len(shown)} more")


def line(name: str, found: Finding) -> str:
    if found.verdict == FAILED:
        return f"{name}: {found.where}: {found.new}"
    return f"{name}: {found.where}, {found.what}: {found.old} -> {found.new}"


def select(found: dict[str, list[Finding]], *verdicts: str) -> list[tuple[str, Finding]]:
    """The findings with one of these verdicts and their files, the largest change first."""
    pairs = [(name, each) for name, all_of_it in found.items() for each in all_of_it]
    chosen = [pair for pair in pairs if pair[1].verdict in verdicts]
    return sorted(chosen, key=lambda pair: pair[1].change, reverse=True)


def missing(name: str) -> list[Finding]:
    """The findings on a file that OLD has and NEW lacks: only tests have to be run every time."""
    if name != TESTS:
        return []
    return [Finding("tests", "all tests", "", "NEW has no such file; run them", FAILED)]


def print_findings(found: dict[str, list[Finding]]) -> None:
    for title, verdict, limit in (
        ("failed in NEW", FAILED, math.inf),
        ("got worse", WORSE, math.inf),
        ("got better", BETTER, LISTED),
    ):
        listed(title, [line(*pair) for pair in select(found, verdict)], limit)
    reasons = Counter((name, each.what) for name, each in select(found, NOT_COMPARED))
    lines = [f"{name}, {count}: {why}" for (name, why), count in reasons.most_common()]
    listed("not compared, by reason", lines, LISTED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD", help="the folder that is the measure")
    parser.add_argument("new", type=Path, metavar="NEW", help="the folder that is judged")


def main(arguments: argparse.Namespace) -> list[dict]:
    old, new = read(arguments.old), read(arguments.new)
    both = [name for name in KINDS if name in old and name in new]
    if not both:
        there = (f"{', '.join(files) or 'none'}" for files in (old, new))
        environment.refuse(
            "expected files of results in both folders, got {} and {}".format(*there)
        )
    devices = sorted(machines(old) | machines(new))
    if len(devices) > 1:
        environment.refuse(f"expected results of one GPU, got {' and '.join(devices)}")
    print(f"OLD {arguments.old}: {commits(old)}\nNEW {arguments.new}: {commits(new)}")
    found, rows = {}, {}
    for name, kind in KINDS.items():
        try:
            rows[name] = len(rows_of_ours(kind, kind.read(old.get(name, []))))
            if rows[name] and name not in new:
                found[name] = missing(name)
            else:
                found[name] = list(findings(kind, old.get(name, []), new.get(name, [])))
        except KeyError as error:
            environment.refuse(f"expected a column {error} in {name}, got none")
        except ValueError as error:
            environment.refuse(f"expected numbers in {name}, got {error}")
    for path in cut_off(arguments.new):
        cut = Finding("run", "the run", "", "it was cut off; run it again", FAILED)
        found.setdefault(path.name, []).append(cut)
    counts = {name: len(select({name: all_of_it}, *COMPARED)) for name, all_of_it in found.items()}
    figures = sum(counts.values())
    files = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    print(f"figures compared{' on ' if devices else ''}{''.join(devices)}: {files or 'none'}")
    print_findings(found)
    worse, better, failed = (len(select(found, each)) for each in (WORSE, BETTER, FAILED))
    if not figures and not failed:
        environment.refuse("expected figures of ours in both folders, got none to compare")
    for name, count in rows.items():
        if count and name not in new:
            print(f"\nNEW has no {name}: {count} rows of OLD were not compared")
    compared = len({(name, each.where) for name, each in select(found, *COMPARED)})
    summary = (
        f"{compared} of {sum(rows.values())} rows of OLD were compared; "
        f"figures: {figures}, worse: {worse}, better: {better}, failures: {failed}"
    )
    bad = worse + failed
    print(f"\ncompare: {'FAILED' if bad else 'passed'}: {summary}")
    return [{"error": summary}] if bad else []
