"""The CUDA C++ loops, run on the host: every tail and alignment, guard bands, 64-bit offsets.

The accuracy of the functors is in test_accuracy.py.
"""

import ctypes
import itertools
import math

import pytest
import torch

from fused_act.dispatch import DTYPES
from tests.shared import accuracy, matrices
from tests.shared.cases import CASES, all_dtypes, elementwise_rows, of_family
from tests.shared.layouts import LARGE, SIZES, Guarded, passes, unpack_mask


@elementwise_rows
@all_dtypes
@pytest.mark.parametrize("offset", range(9))
def test_bulk_tail_and_mask(case, dtype, offset, host_of):
    """Every size from every alignment is right; nothing outside the output is written."""
    host, masked = host_of(case), case.row.saves == "mask"
    for size in (*SIZES, LARGE) if offset < 2 else SIZES:
        x = 4 * torch.randn(size + offset).to(dtype)[offset:]
        y, mask = Guarded(size, dtype, offset), Guarded(-(-size // 8), torch.uint8)
        host.forward(x, y.inside, mask.inside if masked else None)
        accuracy.assert_near(case, "forward", y.inside, x)
        y.assert_untouched_outside()
        if masked:
            assert torch.equal(unpack_mask(mask.inside, size), passes(case, x))
            mask.assert_untouched_outside()
        grad_output, grad_input = torch.randn(size).to(dtype), Guarded(size, dtype, offset)
        saved = {"x": x, "y": y.inside, "mask": mask.inside}[case.row.saves]
        host.backward(grad_output, saved, grad_input.inside)
        accuracy.assert_near(case, "derivative", grad_input.inside, x, grad_output, y=y.inside)
        grad_input.assert_untouched_outside()


@all_dtypes
def test_accesses_are_as_wide_as_all_addresses_allow(dtype, host_of):
    """32 bytes at most. A host does not mind the access that kills a kernel: one out of line."""
    widest_access = host_of(CASES[0]).library.widest_access
    for a, b in itertools.product(range(0, 96, dtype.itemsize), repeat=2):
        bytes_ = math.gcd(a, b, 32)
        pointers = ctypes.c_void_p(a), ctypes.c_void_p(b)
        assert widest_access(DTYPES.index(dtype), *pointers) == bytes_ // dtype.itemsize, (a, b)


MASKED = [case for case in CASES if case.row.saves == "mask" and not case.parameters]


@pytest.mark.parametrize("case", MASKED, ids=str)
@all_dtypes
def test_a_gradient_that_does_not_pass_is_zero(case, dtype, host_of):
    """Infinite or NaN, in full tiles and in tails; a product would make NaN of it."""
    host = host_of(case)
    size = host.tile(dtype) + 9
    grad_output = torch.tensor([float("inf"), float("nan"), 2.0]).repeat(size)[:size].to(dtype)
    none, all_ = (torch.full((-(-size // 8),), bits, dtype=torch.uint8) for bits in (0, 255))
    grad_input = host.backward(grad_output, none, torch.full_like(grad_output, 77))
    assert torch.equal(grad_input, torch.zeros_like(grad_output))
    grad_input = host.backward(grad_output, all_, torch.full_like(grad_output, 77))
    torch.testing.assert_close(grad_input, grad_output, rtol=0, atol=0, equal_nan=True)


@elementwise_rows
@all_dtypes
def test_offsets_beyond_32_bits(case, dtype, host_of):
    """A block past 2^31 and past 2^32 elements, on buffers that hold this block alone."""
    host = host_of(case)
    tile = host.tile(dtype)
    x = 4 * torch.randn(tile).to(dtype)
    expected = host.evaluate(x)
    for block in (2**31 // tile + 1, 2**32 // tile + 5, 2**40 // tile):
        mask = torch.empty(tile // 8, dtype=torch.uint8) if host.masked else None
        y = host.forward(x, torch.empty_like(x), mask, block)
        assert torch.equal(y, expected["forward"])
        saved = {"x": x, "y": y, "mask": mask}[host.saves]
        grad = host.backward(torch.ones_like(x), saved, torch.empty_like(x), block)
        assert torch.equal(grad, expected["derivative"])


# Rows or columns with a weight.


@of_family("weighted")
@matrices.all_permutations
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per_channel"])
def test_weighted_loops(case, layout, per_channel, host_of):
    """Nothing but the result is written, and every element counts once, at every alignment."""
    host = host_of(case)
    for number, (shape, dtype) in enumerate(matrices.shapes_and_dtypes(layout)):
        x, weight = matrices.inputs(shape, layout, dtype, per_channel)
        x, weight = x.cpu(), weight.cpu()
        if x.numel() == 0:
            continue
        dense = torch.empty_like(x).copy_(x)
        offset = number % 3
        memory = [Guarded(x.numel(), dtype, offset) for _ in range(4)]
        source, grad_output, y, grad_input = (
            one.inside.as_strided(dense.shape, dense.stride(), one.inside.storage_offset())
            for one in memory
        )
        source.copy_(x)
        grad_output.copy_(torch.randn_like(x))
        host.forward(source, weight, y)
        grad_weight = host.backward(grad_output, source, weight, grad_input)
        matrices.check_gradients(case, source, weight, grad_output, y, grad_input, grad_weight)
        for one in memory:
            one.assert_untouched_outside()


@of_family("weighted")
def test_weighted_offsets_beyond_32_bits(case, host_of):
    """Of rows as long as a tile, with a weight each, and of one weight."""
    library, offset = host_of(case).library, ctypes.c_int64()
    for block in (2**21, 2**22 + 5, 2**29):
        for weights, inner in ((1, 0), (2**12, 1024)):
            sizes = [ctypes.c_int64(size) for size in (2**60, weights, inner)]
            library.place_of(*sizes, block, 0, ctypes.byref(offset))
            assert offset.value == block * 4096


@of_family("weighted")
def test_a_gradient_that_does_not_reach_the_weight_adds_nothing(case, host_of):
    """An infinite one, where the derivative with respect to the weight is 0."""
    x, grad_output = torch.tensor([[3.0, 0.0]]), torch.tensor([[float("inf"), 1.0]])
    grad = host_of(case).backward(grad_output, x, torch.ones(1), torch.empty_like(x))
    reaches = case.facts.weight_derivative(x[0, 0].double(), torch.ones(()).double()) != 0
    assert grad.tolist() == [float("inf") if reaches else 0.0]


# Rows that are written twice.


@of_family("mirrored")
@all_dtypes
@pytest.mark.parametrize("offset", range(9))
def test_mirrored_loops(case, dtype, offset, host_of):
    """Rows of every length from every alignment; nothing outside the outputs is written."""
    host = host_of(case)
    for i, columns in enumerate(matrices.COLUMNS):
        rows = (1, 3, 67, 600)[i % 4] if columns < 64 else 3
        x = 4 * torch.randn(rows * columns + offset).to(dtype)[offset:].view(rows, columns)
        y = Guarded(2 * x.numel(), dtype, offset)
        mask = Guarded(rows * 2 * (-(-columns // 8)), torch.uint8)
        leaf = x.clone().requires_grad_()
        expected = case.torch_function(leaf)
        for bits in (None, mask.inside.view(rows, 2, -1)):
            y.inside.fill_(77)
            host.forward(x, y.inside.view(rows, 2, columns), bits)
            matrices.assert_equal(y.inside.view(rows, -1), expected.detach())
        grad_output, grad_input = torch.randn_like(expected), Guarded(x.numel(), dtype, offset)
        host.backward(grad_output, bits, grad_input.inside.view(rows, columns))
        (grad,) = torch.autograd.grad(expected, leaf, grad_output)
        matrices.assert_equal(grad_input.inside.view(rows, columns), grad)
        spare = 8 * bits.shape[-1] - columns
        assert not (bits[..., -1] >> (8 - spare)).any() or spare == 0
        for output in (y, mask, grad_input):
            output.assert_untouched_outside()


@of_family("mirrored")
@all_dtypes
def test_mirrored_offsets_beyond_32_bits(case, dtype, host_of):
    """A block past 2^31 and past 2^32 elements, on buffers that hold this block alone."""
    host = host_of(case)
    x = torch.randn(host.elements_of_block(dtype) // 64, 64).to(dtype)
    for first in (2**31 // x.numel() + 1, 2**32 // x.numel() + 5, 2**40 // x.numel()):
        y, mask = x.new_empty(len(x), 2, 64), torch.empty(len(x), 2, 8, dtype=torch.uint8)
        host.forward(x, y, mask, first)
        matrices.assert_equal(y.flatten(1), case.torch_function(x))
        grad = torch.empty_like(x)
        host.backward(torch.ones_like(y), mask, grad, first)
        matrices.assert_equal(grad, case.facts.derivative(x))


@of_family("mirrored")
@pytest.mark.parametrize("columns", [1, 9, 64, 2**31 - 7, 2**32 + 24, 2**35 + 40])
def test_mirrored_runs_of_any_matrix(case, columns, host_of):
    """The division is one of 32 bits where that does, and not beyond."""
    bytes_ = -(-columns // 8)
    for index in (0, 1, 300, 2**29, 2**32 - 1, 2**32, 2**32 + 300, 2**36 + 5):
        row, run = divmod(index, 2 * bytes_)
        rows = max(row, 1)
        place = (ctypes.c_int64 * 5)()
        sizes = [ctypes.c_int64(size) for size in (rows, columns, index // 256)]
        host_of(case).library.locate(*sizes, index % 256, place)
        length = max(0, min(4, columns - 4 * run)) if row < rows else 0
        start = row * columns + 4 * run
        at = [start, start + row * columns, row * 2 * bytes_ + run // 2, run % 2 * 4, length]
        assert list(place) == at, index


@of_family("mirrored")
@all_dtypes
def test_mirrored_accesses_are_as_wide_as_rows_and_addresses_allow(case, dtype, host_of):
    widths = [width for width in (8, 4, 2, 1) if width * dtype.itemsize <= 16]
    for columns in (1, 2, 4, 6, 8, 12, 16, 24, 64):
        for offset in range(9):
            width = host_of(case).library.widest_access(
                DTYPES.index(dtype),
                ctypes.c_int64(columns),
                ctypes.c_void_p(64 * 8),
                ctypes.c_void_p(offset * dtype.itemsize),
            )
            fits = (w for w in widths if columns % w == 0 and offset % w == 0)
            assert width == next(fits), (columns, offset)
