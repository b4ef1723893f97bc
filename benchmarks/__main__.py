"""How fast, how exact and how sparing with memory fused_act is, beside what else a user could pick.

    python -m benchmarks COMMAND [options]
    python -m benchmarks COMMAND --help     what it measures, and how; its options

Exit status: 0; 1 if something failed, as the column `error` says; 2 if it cannot be done; 130 if it
was interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType

from benchmarks import environment

# A command is the module of its name: `add_arguments(parser)` says what options it takes, and
# `main(arguments)` runs it and returns the rows that it wrote.
COMMANDS = {
    "speed": "how long it takes, and how close that is to a copy of the same bytes",
    "networks": "how long whole networks take, and how much memory, in training and inference",
    "memory": "what is saved for backward, and what saving less takes",
    "accuracy": "how far results are from the true value, in ULP",
    "compile": "how long compiled code takes, beside the same code with torch's own op",
    "overhead": "what a call costs on the host",
    "instructions": "how many instructions an element takes; no GPU needed",
    "training": "what each activation brings in training, and what it costs",
    "activations": "what each activation is like: gallery and comparison sheet",
    "plot": "pictures of the results in a folder",
    "compare": "what got worse from one folder of results to another: a verdict",
    "demo": "a first look: networks trained with and without fused_act, curves, times",
}


def load(command: str) -> ModuleType:
    """Import the module of `command`; packages that it needs may be missing for the others."""
    try:
        return importlib.import_module(f"benchmarks.{command}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "fused_act"):
            raise
        environment.refuse(f"{command} needs the extra 'bench', pip install '.[bench]': {error}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command, which begins `arguments`, and as `main` what runs it."""
    as_typed = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    lines = (f"    {name:13} {summary}" for name, summary in COMMANDS.items())
    description = "\n".join((__doc__, *lines))
    parser = argparse.ArgumentParser("python -m benchmarks", description=description, **as_typed)
    commands = parser.add_subparsers(metavar="COMMAND", help="one of these")
    for name in COMMANDS:
        command = commands.add_parser(name, **as_typed)
        if name in arguments[:1]:
            module = load(name)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> list[dict]:
    found = parse(arguments or ["--help"])
    return found.main(found)


if __name__ == "__main__":
    environment.run(partial(main, sys.argv[1:]))
