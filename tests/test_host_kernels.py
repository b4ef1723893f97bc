"""The CUDA C++ functors and loops, run on the host: every 16-bit input, every tail, 64-bit offsets.

The host stands in for the GPU: it takes correctly rounded functions for the approximate
instructions, then ones that are off by as much as the hardware's may be.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fused_act.backends import DTYPES
from tests import accuracy
from tests.cases import CASES, all_cases, all_dtypes

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The host build of each activation, by name, out of the registration lines of ops.cu."""
    folder = tmp_path_factory.mktemp("host_kernels")
    registrations = re.findall(
        r'implement(?:_masked)?<(\w+)((?:, double)*)>\(library, "(\w+)"\)',
        (ROOT / "csrc" / "ops.cu").read_text(),
    )
    include = Path(torch.__file__).parent / "include"
    built = {}
    for struct, parameters, name in registrations:
        library = folder / f"{name}.so"
        command = [
            COMPILER,
            *("-std=c++20", "-O2", "-shared", "-fPIC", f"-I{include}"),
            f"-DACTIVATION={struct}",
            f"-DPARAMETER_COUNT={parameters.count('double')}",
            str(ROOT / "tests" / "host_kernels.cpp"),
            *("-o", str(library)),
        ]
        subprocess.run(command, check=True)
        built[name] = ctypes.CDLL(str(library))
        built[name].tile.restype = ctypes.c_int64
    return built


class Host:
    """The host build of one case: forward and backward on CPU tensors."""

    def __init__(self, library, case):
        self.library = library
        self.parameters = (ctypes.c_double * max(1, len(case.parameters)))(*case.parameters)

    def tile(self, dtype):
        return self.library.tile(DTYPES.index(dtype))

    def blocks(self, x):
        return -(-x.numel() // self.tile(x.dtype))

    def forward(self, x, y, mask=None):
        pointer = None if mask is None else ctypes.c_void_p(mask.data_ptr())
        self.library.run_forward(
            *self.arguments(x, x, y), pointer, *map(ctypes.c_int64, (x.numel(), 0, self.blocks(x)))
        )
        return y

    def backward(self, grad_output, saved, grad_input):
        self.library.run_backward(
            *self.arguments(grad_output, grad_output, saved, grad_input),
            *map(ctypes.c_int64, (grad_output.numel(), 0, self.blocks(grad_output))),
            ctypes.c_bool(saved.dtype is torch.uint8),
        )
        return grad_input

    def arguments(self, x, *tensors):
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        return ctypes.c_int(DTYPES.index(x.dtype)), self.parameters, *pointers


@pytest.fixture
def host(libraries):
    """Makes the `Host` of a case; resets the errors that a test has set."""
    yield lambda case: Host(libraries[case.name], case)
    for library in libraries.values():
        library.set_errors(0, 0)


def derivative(host, case, x):
    """f'(x): the gradient of a gradient of 1."""
    if not case.activation.saves_mask:
        return host.backward(torch.ones_like(x), x, torch.empty_like(x))
    mask = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    host.forward(x, torch.empty_like(x), mask)
    return host.backward(torch.ones_like(x), mask, torch.empty_like(x))


@all_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# In ULP, up to what the PTX manual allows ex2.approx and rcp.approx.
@pytest.mark.parametrize("errors", [(0, 0), (2, 1), (-2, 1), (2, -1), (-2, -1)], ids=str)
def test_every_16_bit_input(case, dtype, errors, host):
    x = accuracy.all_finite(dtype)
    host = host(case)
    host.library.set_errors(*errors)
    forward = host.forward(x, torch.empty_like(x))
    tolerance = accuracy.PERTURBED_FORWARD if any(errors) else accuracy.FORWARD
    accuracy.check(case, "forward", x, forward, tolerance)
    accuracy.check(case, "derivative", x, derivative(host, case, x))


@all_cases
@pytest.mark.parametrize("errors", [(0, 0), (2, 1), (-2, 1), (2, -1), (-2, -1)], ids=str)
def test_fp32_in_every_binade(case, errors, host, record_property):
    x = accuracy.stratified_fp32()
    host = host(case)
    host.library.set_errors(*errors)
    for kind, result in (
        ("forward", host.forward(x, torch.empty_like(x))),
        ("derivative", derivative(host, case, x)),
    ):
        for region, found in accuracy.check(case, kind, x, result).items():
            record_property(f"{kind} {region}", found)


@all_cases
@all_dtypes
def test_specials(case, dtype, host):
    info = torch.finfo(dtype)
    inf = float("inf")
    x = torch.tensor(
        [float("nan"), inf, -inf, 0.0, -0.0, info.max, info.min, info.tiny], dtype=dtype
    )
    for shift in range(8):  # every lane of a vector
        rolled = x.repeat(600).roll(shift)
        expected = case.torch_function(rolled)
        result = host(case).forward(rolled, torch.empty_like(rolled))
        torch.testing.assert_close(result, expected, equal_nan=True)
        grad = derivative(host(case), case, rolled)
        if case.activation.saves_mask:
            assert torch.equal(grad[rolled.isnan()], torch.ones_like(grad[rolled.isnan()]))
        else:
            leaf = rolled.clone().requires_grad_()
            (theirs,) = torch.autograd.grad(case.torch_function(leaf).sum(), leaf)
            assert torch.equal(grad[rolled.isnan()].isnan(), theirs[rolled.isnan()].isnan())
        assert not grad[rolled.isfinite()].isnan().any()


SIZES = [*range(1, 71), 127, 128, 129, 4095, 4096, 4097, 8191, 8192, 8193, 12289]


@all_cases
@all_dtypes
@pytest.mark.parametrize("offset", range(9))
def test_bulk_tail_and_mask(case, dtype, offset, host):
    """Every size from every alignment is right; nothing outside the output is written."""
    guard = 64
    for size in SIZES:
        x = 4 * torch.randn(size + offset).to(dtype)[offset:]
        buffer = torch.full((guard + offset + size + guard,), 77, dtype=dtype)
        y = buffer[guard + offset : guard + offset + size]
        masks = torch.full((guard + -(-size // 8) + guard,), 77, dtype=torch.uint8)
        mask = masks[guard:-guard]
        host(case).forward(x, y, mask if case.activation.saves_mask else None)
        accuracy.assert_near(case, "forward", y, x)
        assert (buffer[: guard + offset] == 77).all()
        assert (buffer[guard + offset + size :] == 77).all()
        grad_output = torch.randn(size).to(dtype)
        grads = torch.full_like(buffer, 77)
        grad_input = grads[guard + offset : guard + offset + size]
        if case.activation.saves_mask:
            assert (masks[:guard] == 77).all()
            assert (masks[-guard:] == 77).all()
            bits = mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
            expected = torch.zeros(8 * mask.numel(), dtype=torch.bool)
            expected[:size] = (x > 0) & (x < 6)
            assert torch.equal(bits.flatten().bool(), expected)
        saved = mask if case.activation.saves_mask else x
        host(case).backward(grad_output, saved, grad_input)
        accuracy.assert_near(case, "derivative", grad_input, x, grad_output)
        assert (grads[: guard + offset] == 77).all()
        assert (grads[guard + offset + size :] == 77).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@all_dtypes
def test_offsets_beyond_32_bits(case, dtype, host):
    """A block past 2^31 and past 2^32 elements, on buffers that hold this block alone."""
    host = host(case)
    tile = host.tile(dtype)
    x = 4 * torch.randn(tile).to(dtype)
    expected = host.forward(x, torch.empty_like(x))
    expected_grad = derivative(host, case, x)
    for block in (2**31 // tile + 1, 2**32 // tile + 5, 2**40 // tile):
        start = block * tile
        y, grad = torch.empty_like(x), torch.empty_like(x)
        mask = torch.empty(tile // 8, dtype=torch.uint8)
        saved = mask if case.activation.saves_mask else x

        def base(tensor, elements):
            return ctypes.c_void_p(tensor.data_ptr() - elements * tensor.itemsize)

        span = [ctypes.c_int64(value) for value in (start + tile, block, block + 1)]
        masked = case.activation.saves_mask
        head = ctypes.c_int(DTYPES.index(dtype)), host.parameters
        host.library.run_forward(
            *head, base(x, start), base(y, start), base(mask, start // 8) if masked else None, *span
        )
        assert torch.equal(y, expected)
        ones = torch.ones_like(x)
        host.library.run_backward(
            *head,
            base(ones, start),
            base(saved, start // 8 if masked else start),
            base(grad, start),
            *span,
            ctypes.c_bool(masked),
        )
        assert torch.equal(grad, expected_grad)
