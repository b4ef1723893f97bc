"""Reads tests/mutations.toml, the list of seeded bugs and of the tests that must catch them."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIST = Path(__file__).parent / "mutations.toml"


@dataclasses.dataclass(frozen=True)
class Guard:
    """The tests that must catch a bug.

    Args:
        tests: arguments of pytest: files or tests, -k and -m.
        interpreted: the tests run the Triton kernels in the interpreter.
        rebuilds: the tests read the built CUDA extension, which takes nvcc to build again.
        host: the tests call the host extension, which takes a C++ compiler to build again.
        gpu: the tests need a GPU because nothing else shows the bug.
    """

    tests: str
    interpreted: bool = False
    rebuilds: bool = False
    host: bool = False
    gpu: bool = False

    def arguments(self) -> argparse.Namespace:
        """The `places`, `k` and `m` in `tests`, or a ValueError."""
        return ARGUMENTS.parse_args(shlex.split(self.tests))


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A seeded bug: `old`, which occurs once in `file`, becomes `new`."""

    name: str
    file: str
    bug: str
    guard: Guard
    old: str
    new: str


class Arguments(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


ARGUMENTS = Arguments(add_help=False)
ARGUMENTS.add_argument("places", nargs="+")
ARGUMENTS.add_argument("-k", default="")
ARGUMENTS.add_argument("-m", default="")

REQUIRED = ("name", "file", "bug", "tests", "old", "new")
OPTIONAL = ("interpreted", "rebuilds", "host", "gpu")


def read_mutations(path: Path = LIST) -> list[Mutation]:
    """The list in `path`, or a ValueError whose one line says what is wrong with which entry."""
    try:
        document = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if list(document) != ["mutation"]:
        raise ValueError(f"{path.name}: expected tables [[mutation]], found {list(document)}")
    mutations = {}
    for number, entry in enumerate(document["mutation"], 1):
        where = f"{path.name}, entry {number} ({entry.get('name', 'without a name')})"
        try:
            mutation = mutation_of(entry)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if mutation.name in mutations:
            raise ValueError(f"{where}: names must be unique, and an earlier entry has this one")
        mutations[mutation.name] = mutation
    return list(mutations.values())


def mutation_of(entry: dict) -> Mutation:
    if missing := [key for key in REQUIRED if key not in entry]:
        raise ValueError(f"lacks {', '.join(missing)}")
    for key, value in entry.items():
        if key not in REQUIRED + OPTIONAL:
            raise ValueError(f"`{key}` is none of the keys {', '.join(REQUIRED + OPTIONAL)}")
        if key in REQUIRED and not isinstance(value, str):
            raise ValueError(f"`{key}` must be a string, not {value!r}")
        if key in OPTIONAL and not isinstance(value, bool):
            raise ValueError(f"`{key}` must be true or false, not {value!r}")
    guard = Guard(entry["tests"], **{key: entry.get(key, False) for key in OPTIONAL})
    try:
        guard.arguments()
    except ValueError as error:
        raise ValueError(f"`tests` must be files or tests, -k and -m: {error}") from None
    texts = {key: entry[key] for key in REQUIRED if key != "tests"}
    return Mutation(**texts, guard=guard)
