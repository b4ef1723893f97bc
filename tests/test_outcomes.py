"""`--outcomes FILE`: a row for each test as it ends, and how a run goes on that was cut off."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
TESTS = """
    import pytest

    def test_passes():
        pass

    def test_fails():
        assert 1 + 1 == 3, "two lines\\nand a, comma"

    @pytest.mark.skip(reason="no GPU")
    def test_skipped():
        pass

    @pytest.fixture
    def broken():
        raise OSError("no such thing")

    def test_error(broken):
        pass

    @pytest.fixture
    def broken_behind():
        yield
        raise OSError("left behind")

    def test_error_behind(broken_behind):
        pass
"""
OUTCOMES = {
    "test_passes": "passed",
    "test_fails": "failed",
    "test_skipped": "skipped",
    "test_error": "error",
    "test_error_behind": "error",
}
# What a commit is does not matter here, but the same one must come back.
COMMIT = """
    import tests.outcomes
    import pytest
    tests.outcomes.commit = lambda: "{}"

    @pytest.hookimpl(tryfirst=True)  # as tests/conftest.py puts tests into tiers
    def pytest_collection_modifyitems(items):
        with open("seen.txt", "w") as file:
            print(len(items), file=file)
"""
IN_TWO_PROCESSES = ("-n", "2", "--dist", "loadscope")


@pytest.fixture
def run(pytester):
    """Runs pytest with the option in a process of its own, on the tests of this folder."""

    def run(*options, commit="abc", status=0):
        pytester.makeconftest(COMMIT.format(commit))
        # This process may be one of pytest-xdist; that one is not.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.outcomes"]
        finished = subprocess.run(
            [*command, "--outcomes", "tests.csv", *options],
            env=inherited | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == status, finished.stdout + finished.stderr
        return finished.stdout or finished.stderr

    return run


def rows(name="tests.csv"):
    with open(name, newline="") as file:
        return {row["test"].rpartition(":")[2]: row for row in csv.DictReader(file)}


def outcomes(name="tests.csv"):
    return {test: row["outcome"] for test, row in rows(name).items()}


@pytest.mark.parametrize("processes", [(), IN_TWO_PROCESSES], ids=["serial", "xdist"])
def test_a_row_for_each_test(pytester, run, processes):
    pytester.makepyfile(test_tiny=TESTS)
    printed = run(*processes, status=1)
    found = rows()
    assert outcomes() == OUTCOMES
    assert (
        found["test_fails"]["error"] == "AssertionError: two lines and a, comma assert (1 + 1) == 3"
    )
    assert found["test_skipped"]["error"] == "no GPU"
    assert found["test_error"]["error"] == "OSError: no such thing"
    assert found["test_passes"]["error"] == ""
    assert {row["commit"] for row in found.values()} == {"abc"}
    assert all(float(row["seconds"]) >= 0 for row in found.values())
    assert not Path("tests.partial.csv").exists()
    # Before the list of failures that pytest prints in the end.
    as_they_come = printed.partition("= FAILURES =")[0].partition("= ERRORS =")[0]
    assert f"FAILED test_tiny.py::test_fails: {found['test_fails']['error']}" in as_they_come
    assert "ERROR test_tiny.py::test_error: OSError: no such thing" in as_they_come


def test_a_file_that_cannot_be_imported_is_an_error(pytester, run):
    pytester.makepyfile(test_tiny="import no_such_module")
    run(status=2)
    (row,) = rows("tests.partial.csv").values()
    assert row["outcome"] == "error"
    assert "No module named 'no_such_module'" in row["error"]


KILLED = """
    import os, signal, sys, time

    def test_first():
        pass

    def test_second():
        if "xdist" in sys.modules and "PYTEST_XDIST_WORKER" in os.environ:
            time.sleep(1)  # until the row of the first is written
            os.kill(os.getppid() if {parent} else os.getpid(), signal.SIG{name})
            time.sleep(3)
        os.kill(os.getpid(), signal.SIG{name})
        time.sleep(3)

    def test_third():
        pass
"""
ALL_PASS = """
    def test_first():
        raise AssertionError("it passed before")

    def test_second():
        pass

    def test_third():
        pass
"""


@pytest.mark.parametrize(("name", "status"), [("KILL", -9), ("INT", 2)])
@pytest.mark.parametrize("processes", [(), IN_TWO_PROCESSES], ids=["serial", "xdist"])
def test_a_run_that_is_cut_off_is_taken_up_again(pytester, run, ctrl_c, name, status, processes):
    """What passed is left out, in each process; a file of before stays until all is complete."""
    Path("tests.csv").write_text("older\n")
    # One worker, so that the first test has ended before the second begins.
    one = ("-n", "1", "--dist", "loadscope") if processes else ()
    pytester.makepyfile(test_tiny=KILLED.format(name=name, parent=True))
    run(*one, status=status)
    assert outcomes("tests.partial.csv") == {"test_first": "passed"}
    assert Path("tests.csv").read_text() == "older\n"
    pytester.makepyfile(test_tiny=ALL_PASS)
    printed = run(*processes)
    assert "1 tests left out: they passed before, see tests.partial.csv" in printed
    assert outcomes() == dict.fromkeys(("test_first", "test_second", "test_third"), "passed")
    assert not Path("tests.partial.csv").exists()


@pytest.mark.full
def test_a_process_that_dies_is_an_error_of_its_test(pytester, run):
    """Without the groups of tests/conftest.py all other processes die of it, too."""
    pytester.makepyfile(test_tiny=KILLED.format(name="KILL", parent=False))
    printed = run("-n", "1", "--dist", "loadscope", "--max-worker-restart", "2", status=1)
    assert "ended early: 4 rows in tests.partial.csv, 1 tests have none" in printed
    found = outcomes("tests.partial.csv")
    assert found == {"test_first": "passed", "test_second": "error"}
    assert not Path("tests.csv").exists()  # it would say that no other test failed


def leave_partial(*lines):
    header = "test,outcome,seconds,error,commit\n"
    Path("tests.partial.csv").write_text(header + "".join(lines))


def test_only_what_passed_is_left_out(pytester, run):
    pytester.makepyfile(test_tiny=ALL_PASS)
    leave_partial(
        "test_tiny.py::test_first,passed,0.1,,abc\n",
        "test_tiny.py::test_second,failed,0.1,AssertionError,abc\n",
        "test_tiny.py::test_third,skipped,0",  # it was killed while it wrote
    )
    run()
    assert [row["outcome"] for row in rows().values()] == ["passed"] * 3
    assert Path("seen.txt").read_text() == "3\n"


@pytest.mark.parametrize("commit", ["def", "abc-dirty", ""])
def test_another_commit_begins_anew(pytester, run, commit):
    """And so do changes that are not committed, which may be others every time."""
    pytester.makepyfile(test_tiny=ALL_PASS)
    leave_partial(f"test_tiny.py::test_first,passed,0.1,,{'abc' if commit == 'def' else commit}\n")
    assert "FAILED test_tiny.py::test_first: AssertionError: it" in run(commit=commit, status=1)
    assert outcomes()["test_first"] == "failed"


def test_where_all_have_passed_before_the_file_is_complete(pytester, run):
    pytester.makepyfile(test_tiny="def test_first():\n    pass\n")
    leave_partial("test_tiny.py::test_first,passed,0.1,,abc\n")
    run()
    assert outcomes() == {"test_first": "passed"}


def test_a_run_that_stops_at_the_first_failure_is_not_complete(pytester, run):
    pytester.makepyfile(test_tiny=TESTS)
    run("-x", status=1)
    assert not Path("tests.csv").exists()
    assert outcomes("tests.partial.csv") == {"test_passes": "passed", "test_fails": "failed"}


def test_to_collect_only_writes_nothing(pytester, run):
    pytester.makepyfile(test_tiny=TESTS)
    run("--collect-only")
    assert not [path for path in Path().iterdir() if path.suffix == ".csv"]


def test_a_file_that_cannot_be_written_is_refused(pytester, run):
    pytester.makepyfile(test_tiny=TESTS)
    Path("tests.partial.csv").mkdir()
    assert "cannot write tests.partial.csv: Is a directory; choose another --outcomes" in run(
        status=4
    )
