"""The table of seeded bugs fits the sources, and the committed results are of this table.

`make mutate` seeds the bugs, which takes minutes.
"""

import pytest

from tests.mutations import MUTATIONS, ROOT, written


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_is_one_replacement(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old


def test_results_are_of_this_table():
    rows, names = written(), [mutation.name for mutation in MUTATIONS]
    assert list(rows) == names
    assert len(set(names)) == len(names)
    for mutation in MUTATIONS:
        assert rows[mutation.name][1:3] == [f"`{mutation.file}`", mutation.bug]
    uncaught = {name for name, row in rows.items() if row[-1].startswith("**")}
    assert uncaught <= {mutation.name for mutation in MUTATIONS if mutation.guard.gpu}
