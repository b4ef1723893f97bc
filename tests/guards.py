"""A pytest plugin that runs the tests of several guards in one process.

    pytest -p tests.guards --guard "tests/test_api.py -k setter" --guard ... --guard-report FILE

A guard is a string of pytest's arguments: files or tests, -k and -m. It selects the tests that it
would select as the whole command line. Tests that no guard selects are left out. The report, in
JSON, maps each guard to its tests, and each test to how it ended: "passed", "failed" or "skipped",
or null if it did not run.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.mutation_list import Guard


def pytest_addoption(parser):
    parser.addoption("--guard", action="append", default=[])
    parser.addoption("--guard-report", type=Path, required=True)


def pytest_configure(config):
    guards = Guards(config.option.guard, config.option.guard_report)
    config.pluginmanager.register(guards, "guards")


def select(guard: str, items: list, config: pytest.Config) -> list:
    """The `items` that `guard` selects; none if there is nothing in one of its places."""
    arguments = Guard(guard).arguments()
    found = []
    for place in arguments.places:
        starts = (f"{place}::", f"{place}[")
        there = [item for item in items if item.nodeid == place or item.nodeid.startswith(starts)]
        if not there:
            return []
        found += there
    # pytest's own hook for -k and -m. It need not count what it leaves out: the others may not.
    alone = copy.copy(config)
    alone.option = SimpleNamespace(keyword=arguments.k, markexpr=arguments.m)
    alone.hook = SimpleNamespace(pytest_deselected=lambda items: None)
    marks = config.pluginmanager.get_plugin("mark")
    marks.pytest_collection_modifyitems(items=found, config=alone)
    return found


class Guards:
    def __init__(self, guards: list[str], report: Path):
        self.guards = guards
        self.report = report
        self.selected = None
        self.ends = {}

    @pytest.hookimpl(trylast=True)  # after -m of the command line
    def pytest_collection_modifyitems(self, config, items):
        self.selected = {
            guard: [item.nodeid for item in select(guard, items, config)] for guard in self.guards
        }
        wanted = set().union(*self.selected.values())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]

    def pytest_runtest_logreport(self, report):
        # A test fails with its setup or teardown, too, but does not pass with them.
        says = report.when == "call" or not report.passed
        if says and self.ends.get(report.nodeid) != "failed":
            self.ends[report.nodeid] = report.outcome

    def pytest_sessionfinish(self):
        if self.selected is None:
            return  # pytest says why it did not come so far
        ends = {
            guard: {nodeid: self.ends.get(nodeid) for nodeid in nodeids}
            for guard, nodeids in self.selected.items()
        }
        self.report.write_text(json.dumps(ends, indent=1))
