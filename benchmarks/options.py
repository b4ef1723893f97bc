"""The options that several commands share: each has one name, one type and one error message.

A command says which of them it takes, and what holds where one is not given.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import environment
from benchmarks.providers import DEFAULT, DTYPES
from fused_act.activations import ROWS


def add_results(parser: argparse.ArgumentParser, folder: str = "") -> None:
    """Args: folder: the default, in benchmarks/results; "" for the one that the device names."""
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        default=environment.ROOT / "results" / (folder or environment.device_folder()),
        help="where the files are; default: benchmarks/results/"
        + (folder or "<name of the GPU, cpu or cpu_interpreter>"),
    )


def add_activations(
    parser: argparse.ArgumentParser,
    choices: Mapping[str, object] = ROWS,
    default: Sequence[object] = DEFAULT,
) -> None:
    """Args: choices: what each name stands for; default: some of these."""
    names = [name for name, value in choices.items() if value in default]
    parser.add_argument(
        "--activations",
        type=functools.partial(one_of, choices),
        nargs="+",
        metavar="NAME",
        default=default,
        help=f"of {' '.join(choices)}; default: {listed(names, choices)}",
    )


def add_dtypes(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    parser.add_argument(
        "--dtypes",
        choices=DTYPES,
        nargs="+",
        default=default,
        help=f"default: {listed(default, DTYPES)}",
    )


def add_sizes(
    parser: argparse.ArgumentParser, default: Sequence[int] | None, otherwise: str
) -> None:
    """Args: otherwise: what holds where no size is given, in words."""
    parser.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        default=default,
        metavar="N",
        help=f"numbers of elements, 1048576 or 2^20; default: {otherwise}",
    )


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    add_count(parser, "--rounds", default, "turns of each call")


def add_epochs(parser: argparse.ArgumentParser, default: int) -> None:
    add_count(parser, "--epochs", default, "passes over the digits")


def add_seeds(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--seeds", 3, "runs of each network")


def add_time_limit(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Args: otherwise: what holds where no limit is given, in words."""
    parser.add_argument(
        "--time-limit",
        type=seconds,
        metavar="SECONDS",
        help=f"start nothing further after so long; default: {otherwise}",
    )


def add_count(parser: argparse.ArgumentParser, name: str, default: int, of: str) -> None:
    parser.add_argument(
        name, type=count, default=default, metavar="N", help=f"{of}; default: {default}"
    )


def listed(names: Sequence[str], choices: Mapping[str, object]) -> str:
    return "all" if set(names) == set(choices) else " ".join(names)


def one_of(choices: Mapping[str, object], name: str) -> object:
    if name not in choices:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {name!r}")
    return choices[name]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return found


def size(text: str) -> int:
    """A number of elements: `1048576` or `2^20`."""
    base, _, exponent = text.partition("^")
    try:
        numel = int(base) ** min(int(exponent or 1), 64)
    except ValueError:
        numel = 0
    if not 2**8 <= numel <= 2**40:
        raise argparse.ArgumentTypeError(f"expected 2^8 to 2^40, or a number such, got {text!r}")
    return numel


def size_name(numel: int) -> str:
    exponent = numel.bit_length() - 1
    return f"2^{exponent}" if numel == 2**exponent else str(numel)
