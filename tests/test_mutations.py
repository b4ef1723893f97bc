"""The list of seeded bugs fits sources and tests, and the committed results are of this list.

`make mutate` seeds the bugs, which takes minutes.
"""

import re

import pytest
import torch

from tests.mutation_list import read_mutations
from tests.mutations import ROOT, run_guards, written

MUTATIONS = read_mutations()

ENTRY = """
[[mutation]]
name = "sign"
file = "a.py"
bug = "the sign is lost"
tests = "tests/test_a.py -k sign"
old = '-x'
new = 'x'
"""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_is_one_replacement(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old


@pytest.mark.full
@pytest.mark.parametrize("interpreted", [False, True], ids=["plain", "interpreted"])
def test_every_guard_selects_a_test(interpreted):
    """But for those that need a GPU, where none is."""
    guards = {
        mutation.guard
        for mutation in MUTATIONS
        if mutation.guard.interpreted == interpreted
        if torch.cuda.is_available() or not mutation.guard.gpu
    }
    collected, selected = run_guards(ROOT, list(guards), "--collect-only", "-qq")
    assert selected, collected.stdout
    assert not [guard.tests for guard, tests in selected.items() if not tests], collected.stdout


def test_results_are_of_this_list():
    rows, names = written(), [mutation.name for mutation in MUTATIONS]
    assert list(rows) == names
    for mutation in MUTATIONS:
        assert rows[mutation.name][1:3] == [f"`{mutation.file}`", mutation.bug]
        # A test that caught a bug is still there, or `make mutate` has to be run again.
        for path, test in re.findall(r"`(tests/\S+\.py)::(\w+)", rows[mutation.name][-1]):
            assert f"def {test}(" in (ROOT / path).read_text()
    uncaught = {name for name, row in rows.items() if row[-1].startswith("**")}
    assert uncaught <= {mutation.name for mutation in MUTATIONS if mutation.guard.gpu}


MALFORMED = {
    "missing": (ENTRY.replace("old", "odl"), r"entry 1 \(sign\): lacks old"),
    "unknown": (
        ENTRY + "cpu = true",
        "`cpu` is none of the keys name, file, bug, tests, old, new, ",
    ),
    "no-string": (ENTRY.replace("'x'", "0"), "`new` must be a string, not 0"),
    "no-boolean": (ENTRY + "gpu = 1", "`gpu` must be true or false, not 1"),
    "no-arguments": (ENTRY.replace("-k sign", "-k"), "`tests` must be files or tests, -k and -m: "),
    "unquoted": (ENTRY.replace("-k sign", "-k 'sign"), "`tests` must be .*: No closing quotation"),
    "duplicate": (ENTRY + ENTRY, r"entry 2 \(sign\): names must be unique"),
    "no-mutation": (
        ENTRY.replace("mutation", "bug", 1),
        r"expected tables \[\[mutation\]\], found ",
    ),
    "no-toml": (ENTRY + "gpu = True", r"mutations.toml: Invalid value \(at line"),
}


@pytest.mark.parametrize(("text", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_entry_is_named(tmp_path, text, problem):
    path = tmp_path / "mutations.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_mutations(path)
