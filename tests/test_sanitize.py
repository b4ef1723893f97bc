"""What `make sanitize` runs under compute-sanitizer: which tensors, and how it judges results."""

import re
from pathlib import Path

import pytest
import torch

from tests import sanitize
from tests.shared import accuracy
from tests.shared.cases import ALL_CASES, CASES, all_dtypes

ROOT = Path(__file__).parent.parent


@all_dtypes
def test_sizes_are_around_all_edges(dtype):
    """Of a vector, a mask byte and a tile; a tile at each alignment that has a kernel."""
    vector, tile = 16 // dtype.itemsize, 4096 // dtype.itemsize
    found = set(sanitize.sizes_and_offsets(dtype))
    sizes = {size for size, _ in found}
    around = {edge + step for edge in (vector, 8, tile) for step in (-1, 0, 1)}
    assert {0, 1} | around <= sizes
    assert max(sizes) > 2 * tile + 8
    assert max(sizes) % tile % 8 == 1
    for size in (tile, max(sizes)):
        bytes_behind = {offset * dtype.itemsize % 16 for other, offset in found if other == size}
        assert {step & -step for step in bytes_behind} == {
            each for each in (0, 2, 4, 8) if each == 0 or each >= dtype.itemsize
        }
    assert len(found) < 40  # a memory checker takes its time
    columns = {columns for columns, _ in sanitize.columns_and_offsets(dtype)}
    assert {0, 1, vector - 1, vector, 9, tile, tile + 1} == columns


def test_tiles_are_those_of_the_kernels():
    def constant(path, name):
        (value,) = re.findall(rf"constexpr int {name} = (\d+);", (ROOT / "csrc" / path).read_text())
        return int(value)

    assert constant("elementwise.cuh", "kTileBytes") == sanitize.TILE
    assert constant("weighted_tiles.cuh", "kColumnBytes") == sanitize.COLUMNS
    tiles = pytest.importorskip("fused_act.backends.triton.tiles")
    weighted = pytest.importorskip("fused_act.backends.triton.weighted")
    assert tiles.BYTES_PER_BLOCK == sanitize.TILE
    assert weighted.COLUMN_BYTES == sanitize.COLUMNS


class Seen:
    """Stands for `run` and `run_matrices`; notes what they would run."""

    def __init__(self, monkeypatch):
        self.elementwise, self.matrices = [], []
        monkeypatch.setattr(sanitize, "run", lambda *call: self.elementwise.append(call))
        monkeypatch.setattr(sanitize, "run_matrices", self.run_matrices)

    def run_matrices(self, *call):
        self.matrices.append(call)
        return 1


@pytest.fixture
def seen(monkeypatch):
    return Seen(monkeypatch)


def test_every_row_and_dtype_comes_by(seen, capsys):
    sanitize.main(["--backends", "torch"])
    assert {(case, dtype) for case, dtype, *_ in seen.elementwise} == {
        (case, dtype) for case in CASES for dtype in sanitize.NAMES.values()
    }
    assert {case for cases, *_ in seen.matrices for case in cases} == set(ALL_CASES) - set(CASES)
    assert {dtype for _, dtype, *_ in seen.matrices} == set(sanitize.NAMES.values())
    count = len(seen.elementwise) + len(seen.matrices)
    assert capsys.readouterr().out == f"sanitize: {count} tensors through torch\n"


def test_what_threads_share_is_masks_and_sums(seen):
    sanitize.main(["--backends", "torch", "--sharing", "--dtypes", "float16"])
    assert {case.saves for case, *_ in seen.elementwise} == {"mask"}
    assert {case.name for case, *_ in seen.elementwise} == {
        case.name for case in CASES if case.saves == "mask"
    }
    assert {dtype for _, dtype, *_ in seen.elementwise} == {torch.float16}
    assert all(set(cases) == set(sanitize.MATRICES) for cases, *_ in seen.matrices)


def test_sizes_and_offsets_may_be_chosen(seen):
    sanitize.main(["--backends", "torch", "--sizes", "5", "--offsets", "0", "3"])
    assert {call[2:] for call in seen.elementwise + seen.matrices} == {(5, 0), (5, 3)}


OF_OUTPUT = [
    (case, inplace)
    for case in CASES
    for inplace in (False, True)
    if (case.row.saves_inplace if inplace else case.saves) == "y"
]


@pytest.mark.parametrize(("case", "inplace"), OF_OUTPUT, ids=str)
@pytest.mark.parametrize("ulps", [0, 1, -8])
def test_a_derivative_is_that_of_the_saved_output(case, inplace, ulps):
    """A kernel's y in fp32 may be some ULP off, and backward knows no other; an H200 showed it."""
    x = torch.linspace(-8, -0.125, 4099)
    y = accuracy.true_value(case, "forward", x).float()
    y = (y.view(torch.int32) + ulps).view(torch.float32)
    factor = torch.linspace(-3, 3, 4099)
    exact = case.facts.derivative_from_output(y.double(), *case.parameters)
    right = (exact * factor.double()).float()
    accuracy.assert_near(case, "derivative", right, x, factor, y=y, inplace=inplace)
    wrong = right.clone()
    wrong[3000] += 1e-4
    with pytest.raises(AssertionError, match="Mismatched elements: 1 / 4099"):
        accuracy.assert_near(case, "derivative", wrong, x, factor, y=y, inplace=inplace)


def test_an_output_that_is_too_far_off_is_seen_where_it_is_judged():
    """That `y` is right is for the comparison of y to say."""
    case = next(case for case, inplace in OF_OUTPUT if not inplace)
    x = torch.linspace(-8, 8, 99)
    y = accuracy.true_value(case, "forward", x).float()
    accuracy.assert_near(case, "forward", y, x)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        accuracy.assert_near(case, "forward", y + 1e-4, x)


def test_a_derivative_of_a_saved_output_is_not_judged_without_it():
    case = next(case for case, inplace in OF_OUTPUT if not inplace)
    with pytest.raises(AssertionError, match="its derivative is that of y"):
        accuracy.assert_near(case, "derivative", torch.zeros(3), torch.zeros(3))
