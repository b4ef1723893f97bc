"""What rows of speed.csv say: which times may be quoted, tables, and ours beside the best other."""

from __future__ import annotations

import collections
from typing import NamedTuple

from benchmarks import environment, options, providers
from benchmarks.providers import COPY, OURS


def quotable(row: dict[str, str]) -> bool:
    """Whether a time of speed.csv is that of the device.

    Where there is no column `bound`, which older files do not have, the host had a part in the time
    between two events wherever it took longer than the clearing of the L2 cache and the kernels:
    for kernels on 2^22 elements and fewer, and for public functions of less than 0.6 ms, which is
    what the slowest took the host. Their CUDA graphs had so few runs that they took as long as a
    graph needs to start.
    """
    if not row["median"]:
        return False
    if row.get("bound") or not row["gpu"]:
        return row.get("bound") != "host"
    if row["api"] == "kernel":
        return row["launch"] == "call" and int(row["numel"]) > 2**22
    return row["launch"] == "call" and float(row["median"]) >= 0.6


def comparison(row: dict) -> tuple:
    """What has to be alike for two rows to be compared."""
    columns = ("api", "launch", "activation", "direction", "dtype", "numel", "layout")
    return tuple(row[column] for column in columns)


def by_comparison(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """The rows by what was computed and how, then by who computed it."""
    found = {}
    for row in rows:
        found.setdefault(comparison(row), {})[row["provider"]] = row
    return found


def describe(compared: tuple) -> str:
    _, _, activation, direction, dtype, numel, layout = compared
    return f"{activation} {direction} {dtype} {options.size_name(numel)} {layout}"


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["error"] or row["skipped"]:
        return "failed" if row["error"] else "skipped"
    share = f" {row['share_of_copy']:5.0%}" if row["share_of_copy"] else ""
    host = f" {row['host_us']:4.0f} µs" if row["host_us"] else ""
    bound = " HOST" if row["bound"] == "host" else ""
    return f"{row['median']:.4f}{share}{host}{bound}"


def print_results(rows: list[dict]) -> None:
    compared = by_comparison(rows)
    for api, launch in dict.fromkeys(key[:2] for key in compared):
        found = {key: by_name for key, by_name in compared.items() if key[:2] == (api, launch)}
        names = dict.fromkeys(name for by_name in found.values() for name in by_name)
        lines = [
            (describe(key), *(cell(by_name.get(provider)) for provider in names))
            for key, by_name in found.items()
        ]
        print(
            f"\n{api}, {launch}: median in ms, share of a copy of the same bytes, on a GPU what a "
            "call costs the host; HOST where the median is not that of the device alone\n"
        )
        print(environment.table(["", *names], lines))
    providers.print_errors(rows)
    for reason, count in collections.Counter(row["skipped"] for row in rows).items():
        if reason:
            print(f"{count} rows skipped: {reason}")


class Verdict(NamedTuple):
    """One of ours beside the best alternative; `ratio` > 1 is what it gains."""

    ratio: float
    word: str

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x {self.word:6}"


def verdict(own: dict, other: dict) -> Verdict:
    """The verdict is `even` where the ranges from the 20 % to the 80 % quantile overlap."""
    word = "even"
    if own["q80"] < other["q20"]:
        word = "faster"
    elif own["q20"] > other["q80"]:
        word = "slower"
    return Verdict(other["median"] / own["median"], word)


def verdicts(rows: list[dict]) -> list[tuple[tuple, dict, dict[str, Verdict]]]:
    """What was compared, the row of the best alternative, and what that makes of each of ours."""
    found = []
    for compared, by_provider in by_comparison(rows).items():
        timed = {
            name: row
            for name, row in by_provider.items()
            if row["samples"] and row.get("bound") != "host"
        }
        ours = [name for name in timed if name in OURS]
        others = [row for name, row in timed.items() if name not in OURS and name != COPY.name]
        if ours and others:
            best = min(others, key=lambda row: row["median"])
            found.append((compared, best, {name: verdict(timed[name], best) for name in ours}))
    return sorted(found, key=lambda one: max(one[2].values()))


def print_verdicts(rows: list[dict]) -> None:
    found = verdicts(rows)
    if not found:
        return
    names = dict.fromkeys(name for *_, by_name in found for name in by_name)
    lines = [
        (
            f"{compared[0]}, {compared[1]}: {describe(compared)}",
            *(str(by_name.get(name, "-")) for name in names),
            f"{best['provider']} {best['median']:.4f}",
        )
        for compared, best, by_name in found
    ]
    print("\nOurs beside the best alternative: what is lost comes first, then what is gained\n")
    print(environment.table(["", *names, "best alternative, ms"], lines))
    print("\nEven means that the ranges from the 20 % to the 80 % quantile overlap.")
    for name in names:
        words = collections.Counter(by_name[name].word for *_, by_name in found if name in by_name)
        print(
            name, *(f"{word} in {words[word]}" for word in ("slower", "even", "faster")), sep=", "
        )
