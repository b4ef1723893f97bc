"""In which tier a test is, and which tests one process runs one after the other.

The tiers are markers: `smoke` is `make check`, all that is not `full` is `make test`, and `full` is
the rest, for `make test-all`. Of the tests that need a GPU `make gpu-test` leaves out what is
`overlapping`. Most of `full` and all of `overlapping` is found here, among the cases of a test.
"""

import collections
import zlib

from tests.shared.facts import FACTS, FEATURED
from tests.shared.layouts import TINY

# A row goes together with the way to compute it: `make test` runs each pair of them.
PAIRED = ("case", "row", "variant", "backend", "way", "inplace")
# What `make gpu` runs, see `-m`: what needs a GPU, and a few that run on one where it is.
OF_GPU = ("gpu", "with_gpu")
# What takes gigabytes of a GPU's memory, so that only one of them may run at a time.
HUGE = ("test_every_fp32_input", "test_more_than_2_to_the_31_elements")


def mark_full(items) -> None:
    """Mark as `full` the cases that `make test` leaves to `make test-all`.

    A test that is marked `exhaustive` keeps all of the featured rows.
    """
    for item in items:
        if item.get_closest_marker("zoo"):
            item.add_marker("full")
    for item in repeated([item for item in items if not item.get_closest_marker("full")], PAIRED):
        if not (item.get_closest_marker("exhaustive") and is_featured(item)):
            item.add_marker("full")


def mark_overlapping(items) -> None:
    """Mark as `overlapping` the cases that `make gpu-test` leaves to `make gpu-test-all`.

    No test is left out as a whole, those marked `full` neither; and no dtype of a row on a backend.
    """
    of_gpu = [item for item in items if any(map(item.get_closest_marker, OF_GPU))]
    for item in repeated(of_gpu, (*PAIRED, "dtype")):
        item.add_marker("overlapping")


def repeated(items, paired) -> list:
    """The cases of each parametrized test that show nothing which no other case of it shows.

    The cases that stay cover every combination of the parameters `paired`, so every row in every
    way to compute it, and every value of the other parameters. They are drawn as if at random, so
    that rows meet different values.
    """
    by_function, found = collections.defaultdict(list), []
    for item in items:
        if hasattr(item, "callspec"):
            by_function[item.nodeid.partition("[")[0]].append(item)
    for cases in by_function.values():
        seen = set()
        for item in sorted(cases, key=place_in_the_draw):
            # By identity, since a value may be of any type: all cases share those of the list.
            # Parameters do not make another row of a case.
            params = item.callspec.params
            values = {name: id(getattr(value, "facts", value)) for name, value in params.items()}
            pair = tuple(values.pop(name, None) for name in paired)
            new = {pair, *values.items()} - seen
            if not new:
                found.append(item)
            seen |= new
    return found


def is_huge(test: str) -> bool:
    return test.partition("::")[2].partition("[")[0] in HUGE


def group_of(test: str) -> str:
    """The name of the group of tests for a GPU that one process of pytest-xdist runs in turn.

    All huge tests are one group. The others are grouped by file, row and backend, so that processes
    seldom compile the same Triton kernels at the same time: while one process compiles the kernels
    of a row, the others compile those of other rows, and a later file finds them all in Triton's
    cache. Only the name of a test is known where this is asked.
    """
    if is_huge(test):
        return "huge"
    file, _, name = test.partition("::")
    parts = name.partition("[")[2].rstrip("]").split("-")
    known = [part for part in parts if part in FACTS or part in ("triton", "cuda")]
    return "-".join([file, *sorted(known)]) if known else test


def order(items) -> None:
    """Of the tests for a GPU put first what takes longest: huge ones, and whole programs."""

    def place(item) -> int:
        is_program = any(map(item.get_closest_marker, OF_GPU)) and not hasattr(item, "callspec")
        return 0 if is_huge(item.nodeid) else 1 if is_program else 2

    items.sort(key=place)


def place_in_the_draw(item) -> tuple[bool, int]:
    """As good as random, but the same everywhere; last comes what has next to no elements."""
    is_tiny = any(isinstance(v, str) and v in TINY for v in item.callspec.params.values())
    return is_tiny, zlib.crc32(item.callspec.id.encode())


def is_featured(item) -> bool:
    case = item.callspec.params["case"]
    return case.name in FEATURED and case.parameters in case.facts.parameters
