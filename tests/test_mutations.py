"""The table of seeded bugs fits the sources, and the committed results are of this table.

`make mutate` seeds the bugs, which takes minutes.
"""

import pytest

from tests.mutations import MUTATIONS, ROOT, TABLE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_is_one_replacement(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old


def test_results_are_of_this_table():
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    names = [row[0] for row in rows]
    assert names == [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    uncaught = {row[0] for row in rows if row[-1].startswith("**")}
    assert uncaught <= {mutation.name for mutation in MUTATIONS if mutation.guard.gpu}
