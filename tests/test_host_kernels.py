"""The CUDA C++ loops, run on the host: every tail and alignment, guard bands, 64-bit offsets.

The accuracy of the functors is in test_accuracy.py.
"""

import ctypes
import itertools
import math

import pytest
import torch

from fused_act.dispatch import DTYPES
from tests import accuracy
from tests.cases import CASES, LARGE, SIZES, Guarded, all_cases, all_dtypes, passes, unpack_mask


@all_cases
@all_dtypes
@pytest.mark.parametrize("offset", range(9))
def test_bulk_tail_and_mask(case, dtype, offset, host_of):
    """Every size from every alignment is right; nothing outside the output is written."""
    host, masked = host_of(case), case.activation.saves == "mask"
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
        saved = {"x": x, "y": y.inside, "mask": mask.inside}[case.activation.saves]
        host.backward(grad_output, saved, grad_input.inside)
        accuracy.assert_near(case, "derivative", grad_input.inside, x, grad_output)
        grad_input.assert_untouched_outside()


@all_dtypes
def test_accesses_are_as_wide_as_all_addresses_allow(dtype, host_of):
    """32 bytes at most. A host does not mind the access that kills a kernel: one out of line."""
    widest_access = host_of(CASES[0]).library.widest_access
    for a, b in itertools.product(range(0, 96, dtype.itemsize), repeat=2):
        bytes_ = math.gcd(a, b, 32)
        pointers = ctypes.c_void_p(a), ctypes.c_void_p(b)
        assert widest_access(DTYPES.index(dtype), *pointers) == bytes_ // dtype.itemsize, (a, b)


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "relu6"], ids=str)
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


@all_cases
@all_dtypes
def test_offsets_beyond_32_bits(case, dtype, host_of):
    """A block past 2^31 and past 2^32 elements, on buffers that hold this block alone."""
    host = host_of(case)
    tile = host.tile(dtype)
    x = 4 * torch.randn(tile).to(dtype)
    expected = host.pair(x)
    for block in (2**31 // tile + 1, 2**32 // tile + 5, 2**40 // tile):
        mask = torch.empty(tile // 8, dtype=torch.uint8) if host.masked else None
        y = host.forward(x, torch.empty_like(x), mask, block)
        assert torch.equal(y, expected["forward"])
        saved = {"x": x, "y": y, "mask": mask}[host.saves]
        grad = host.backward(torch.ones_like(x), saved, torch.empty_like(x), block)
        assert torch.equal(grad, expected["derivative"])
