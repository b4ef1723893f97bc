"""What `make gpu-test` leaves out: cases, but no test, and no dtype of a row on a backend.

Tests that need a GPU are collected where there is one alone, so that a process collects them here
in which torch says that there is.
"""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = """
import json
import pytest
import torch
from tests import tiers

torch.cuda.is_available = lambda: True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    found = []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = {name: str(getattr(value, "facts", value)) for name, value in params.items()}
        found.append(
            {
                "function": item.nodeid.partition("[")[0],
                "values": values,
                "group": tiers.group_of(item.nodeid),
                "markers": [mark.name for mark in item.iter_markers()],
            }
        )
    with open("collected.json", "w") as file:
        json.dump(found, file)
"""
# Rows of all families, what is exhaustive, what is full, and what is huge.
FILES = ("accuracy", "autograd", "faults", "gpu", "layouts", "properties", "rematerialization")


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The tests that a GPU would run, as dictionaries, in their order with pytest-xdist."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "gpu_here.py").write_text(PLUGIN)
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "gpu_here", "-m", "gpu or with_gpu", "-q"]
    subprocess.run(
        [*command, "--collect-only", "--rootdir", ROOT, *files],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "TRITON_INTERPRET": "0"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads((folder / "collected.json").read_text())


def kept(collected):
    return [each for each in collected if "overlapping" not in each["markers"]]


def test_no_test_is_left_out_as_a_whole(collected):
    functions = {each["function"] for each in collected}
    assert {each["function"] for each in kept(collected)} == functions
    # Those that `make test` leaves to `make test-all`, too.
    assert any(function.endswith("test_any_strides") for function in functions)


def test_no_dtype_of_a_row_on_a_backend_is_left_out(collected):
    def combinations(tests):
        names = ("case", "backend", "way", "inplace", "dtype")
        found = {
            (each["function"], *(each["values"].get(name) for name in names)) for each in tests
        }
        values = {(each["function"], *item) for each in tests for item in each["values"].items()}
        return found | values

    assert combinations(kept(collected)) == combinations(collected)


def test_much_is_left_out(collected):
    assert len(kept(collected)) < len(collected) / 3


def test_what_is_huge_runs_in_one_process_and_begins_first(collected):
    groups = [each["group"] for each in collected]
    count = groups.count("huge")
    assert groups[:count] == ["huge"] * count
    huge = {each["function"].rpartition(":")[2] for each in collected[:count]}
    assert huge == {"test_every_fp32_input", "test_more_than_2_to_the_31_elements"}


def test_a_group_compiles_the_kernels_of_one_row(collected):
    for name in {each["group"] for each in collected} - {"huge"}:
        group = [each for each in collected if each["group"] == name]
        assert len({each["values"].get("case") for each in group}) == 1
        ways = {each["values"].get("backend") or each["values"].get("way") for each in group}
        assert len(ways) == 1
        assert len({each["function"].partition("::")[0] for each in group}) == 1


def test_a_file_has_one_group_for_a_row_on_a_backend(collected):
    """Whatever the parameters of the row: they are arguments of the same kernels."""
    groups = collections.defaultdict(set)
    for each in collected:
        if each["group"] != "huge" and "case" in each["values"]:
            file = each["function"].partition("::")[0]
            way = each["values"].get("backend") or each["values"].get("way")
            groups[file, each["values"]["case"], way].add(each["group"])
    assert {len(names) for names in groups.values()} == {1}


TINY = """
import pytest


@pytest.mark.parametrize("i", range(6))
def test_every_fp32_input(i, worker_id):
    print(f"<huge {worker_id}>")


@pytest.mark.parametrize("name", ["triton-mish", "cuda-mish", "triton-tanh", "cuda-tanh"])
@pytest.mark.parametrize("i", range(3))
def test_rows(i, name, worker_id):
    print(f"<{name} {worker_id}>")
"""


def printed_with_xdist(folder, tests, *options, status=0):
    """What pytest prints of `tests` in `folder`, with the pytest and the pytest-xdist of here."""
    (folder / "conftest.py").write_text("from tests.conftest import pytest_xdist_make_scheduler\n")
    (folder / "test_tiny.py").write_text(tests)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--dist", "loadscope", "."],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,  # a process that waits for another test would wait for ever
    )
    assert finished.returncode == status, finished.stdout
    return finished.stdout


def test_a_group_is_run_by_one_process(tmp_path):
    workers = collections.defaultdict(list)
    printed = printed_with_xdist(tmp_path, TINY, "-rP", "-n", "3")
    for name, worker in re.findall(r"<(\S+) (gw\d)>", printed):
        workers[name].append(worker)
    assert {name: len(found) for name, found in workers.items()} == {
        "huge": 6, "triton-mish": 3, "cuda-mish": 3, "triton-tanh": 3, "cuda-tanh": 3,
    }  # fmt: skip
    assert all(len(set(found)) == 1 for found in workers.values())
    assert len({worker for found in workers.values() for worker in found}) > 1


DYING = """
import os
import pytest

NAMES = {names}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("i", range(4))
def test_rows(i, name):
    if (i, name) == (1, NAMES[0]):
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("names", [["triton-mish"], ["triton-mish", "cuda-mish"]], ids=len)
def test_a_test_that_kills_its_process_is_not_run_again(tmp_path, names):
    """And each other test of its group is run by the process that comes in its place."""
    printed = printed_with_xdist(tmp_path, DYING.format(names=names), "-v", "-n", "2", status=1)
    assert printed.count("node down") == 1
    assert f"1 failed, {4 * len(names) - 1} passed" in printed


# The first process has got the last test when it dies, and the second one has been told to end.
DYING_LAST = """
import os
import time
import pytest


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("name", ["triton-mish"])
def test_rows(name, i):
    if i == 1:
        time.sleep(3)
        os.kill(os.getpid(), 9)


@pytest.mark.parametrize("i", range(3))
def test_others(i):
    time.sleep(1 if i == 0 else 0)
"""


def test_a_process_that_comes_last_does_not_wait_for_ever(tmp_path):
    printed = printed_with_xdist(tmp_path, DYING_LAST, "-v", "-n", "2", status=1)
    assert "1 failed, 5 passed" in printed
