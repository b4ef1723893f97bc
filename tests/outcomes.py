"""`pytest --outcomes=FILE`: a row for each test as it ends, for a run that may be cut off.

FILE is a csv. Until each test has its row the rows are in `<name>.partial.csv`, and a run that
is killed leaves them there. The next run with the same option leaves out what passed there, if the
commit is the same and nothing was changed. Failures are printed as they come, too.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

COLUMNS = ("test", "outcome", "seconds", "error", "commit")


def pytest_addoption(parser):
    parser.addoption(
        "--outcomes",
        metavar="FILE",
        help="write how each test ended to this csv as it ends, and go on where a run was cut off",
    )


def pytest_configure(config):
    if config.option.outcomes is None or config.option.collectonly:
        return
    if hasattr(config, "workerinput"):  # with pytest-xdist the process that prints writes
        passed = config.workerinput["passed before"]
    else:
        writer = Writer(config)
        config.pluginmanager.register(writer)
        passed = [row["test"] for row in writer.before]
    config.pluginmanager.register(LeftOut(passed))


class LeftOut:
    """Leaves out the tests that passed before a run was cut off."""

    def __init__(self, passed: list[str]):
        self.passed = set(passed)

    # Not first: what tests/tiers.py leaves out must not depend on what has passed.
    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if item.nodeid in self.passed]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self.passed]


class Writer:
    """Writes the rows.

    Args:
        before: those of the tests that passed before the last run was cut off.
        running: what is known of tests that have not ended.
        left: the tests that were collected and have no row yet.
    """

    def __init__(self, config):
        self.config = config
        self.path = Path(config.option.outcomes)
        self.partial = self.path.with_suffix(f".partial{self.path.suffix}")
        self.commit = commit()
        self.before = [row for row in rows_of(self.partial) if self.still_holds(row)]
        self.running: dict[str, dict] = {}
        self.left: set[str] | None = None
        self.file = None
        self.count = len(self.before)

    def still_holds(self, row: dict) -> bool:
        """Whether the test passed with the sources as they are now. Without git nobody can tell."""
        known = self.commit and not self.commit.endswith("-dirty")
        return bool(known and row["commit"] == self.commit and row["outcome"] == "passed")

    def say(self, line: str) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.partial.open("w", newline="")
        except OSError as error:
            raise pytest.UsageError(
                f"cannot write {error.filename}: {error.strerror}; choose another --outcomes"
            ) from None
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
        self.writer.writeheader()
        self.writer.writerows(self.before)
        self.file.flush()
        if self.before:
            self.say(f"{self.count} tests left out: they passed before, see {self.partial}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        """All processes leave out the same, whenever they start."""
        node.workerinput["passed before"] = [row["test"] for row in self.before]

    def pytest_collection_finish(self, session):
        if session.items:  # with pytest-xdist the process that prints collects nothing
            self.left = {item.nodeid for item in session.items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        if self.left is None:  # a process that takes the place of another collects the same
            self.left = set(ids)

    def write(self, test: str, outcome: str, seconds: float, error: str) -> None:
        values = (test, outcome, f"{seconds:.3f}", error, self.commit)
        self.writer.writerow(dict(zip(COLUMNS, values)))
        self.file.flush()
        self.count += 1
        if self.left:
            self.left.discard(test)
        if outcome in ("failed", "error"):
            self.say(f"{outcome.upper()} {test}: {error}")

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(report.nodeid or "collection", "error", 0.0, line_of(report))

    def pytest_runtest_logreport(self, report):
        test = report.nodeid
        found = self.running.setdefault(test, {"outcome": "passed", "seconds": 0.0, "error": ""})
        found["seconds"] += report.duration
        if not report.passed and found["outcome"] != "failed":
            failed = "failed" if report.when == "call" else "error"
            found["outcome"] = failed if report.failed else "skipped"
            found["error"] = line_of(report)
        if report.when in ("teardown", "???"):  # ???: its process died
            self.write(test, **self.running.pop(test))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if self.file is None:
            return
        self.file.close()
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = exitstatus = pytest.ExitCode.OK  # all have passed before
        by_itself = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if by_itself and not self.left and not (session.shouldstop or session.shouldfail):
            os.replace(self.partial, self.path)
            self.say(f"{self.count} rows in {self.path}")
        else:
            left = f", {len(self.left)} tests have none" if self.left else ""
            self.say(f"ended early: {self.count} rows in {self.partial}{left}")


def commit() -> str:
    """What git calls these sources, or "" where there is no git."""
    from benchmarks.environment import environment  # imports torch, which takes seconds

    return environment()["commit"]


def rows_of(path: Path) -> list[dict]:
    """The whole rows of a file that may be missing, or end within a row."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.keys() == set(COLUMNS)]


def line_of(report) -> str:
    """Why a test failed or was skipped, in one line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr).strip().rpartition("\n")[2]).split()
    return " ".join(lines)[:300]
