"""CReLU where no kernel runs: on a CPU, compiled, exported, as C++ on the host, as machine code."""

import copy
import ctypes
import functools
import itertools
import pickle
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import metrics

import fused_act
from benchmarks import machine_code
from fused_act.dispatch import DTYPES
from fused_act.families.mirrored import Layout
from fused_act.families.raw_op import is_dense
from tests import host_kernels
from tests.cases import LAYOUTS, Guarded, all_dtypes, both_16_bit_dtypes
from tests.test_machine_code import (
    BACKENDS,
    BACKENDS_BY_NAME,
    CAPABILITIES,
    extension_kernels,
    skip_unless_counted,
)
from tests.test_mirrored import COLUMNS, CRELU, assert_equal, torch_crelu


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_is_dense_in_the_order_of_x(layout):
    """Also where torch's cat gives up the order: for a transposed x, say."""
    x = torch.empty_like(LAYOUTS[layout](dtype=torch.float32))
    for dim in range(x.dim()):
        made = Layout.of(x.shape, x.stride(), dim)
        assert is_dense(made.shape, made.stride)
        assert made.rows * made.columns == x.numel()
        stepped = [i for i in range(x.dim()) if x.shape[i] > 1]
        if x.numel() > 0:
            by_stride = sorted(stepped, key=x.stride().__getitem__)
            assert sorted(stepped, key=made.stride.__getitem__) == by_stride


@pytest.mark.parametrize("requires_grad", [False, True])
def test_function_on_a_cpu(requires_grad):
    """As the function, and its second derivative is right."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=requires_grad)
    assert_equal(fused_act.CReLUFunction.apply(x, -1), torch_crelu(x, -1))
    if requires_grad:
        torch.autograd.gradcheck(fused_act.CReLUFunction.apply, (x, 1))
        torch.autograd.gradgradcheck(fused_act.CReLUFunction.apply, (x, 1))


def test_transforms_get_torchs_ops():
    x = torch.randn(3, 4)

    def results(function):
        def along_0(x):
            return function(x, 0)

        jacobian, vector = torch.func.jacrev(along_0)(x), torch.func.jvp(along_0, (x,), (x,))
        return torch.func.vmap(along_0)(x), jacobian, *vector

    for function in (fused_act.crelu, fused_act.CReLUFunction.apply):
        for ours, theirs in zip(results(function), results(torch_crelu)):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_is_one_kernel(memory_format):
    torch._dynamo.reset()
    x = torch.randn(2, 3, 5, 16).to(memory_format=memory_format)
    metrics.reset()
    compiled = torch.compile(fused_act.crelu, fullgraph=True)
    y = compiled(x)
    assert metrics.generated_kernel_count == 1
    assert_equal(y, torch_crelu(x))
    x.requires_grad_()
    grad_output = torch.randn_like(y)
    ours, theirs = (
        torch.autograd.grad(function(x, 1), x, grad_output)[0]
        for function in (torch.compile(fused_act.crelu, fullgraph=True, dynamic=True), torch_crelu)
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_torchs_ops(strict):
    class Reference(nn.Module):
        def forward(self, input):
            return torch_crelu(input, 1)

    x = torch.randn(2, 3)
    ours, theirs = (
        torch.export.export(module, (x,), strict=strict)
        for module in (fused_act.CReLU(), Reference())
    )
    assert ours.graph_module.code == theirs.graph_module.code


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_module():
    module = fused_act.CReLU(dim=-1)
    x = torch.randn(2, 3, 4)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.jit.script(module)]
    copies += [torch.fx.symbolic_trace(module), torch.jit.trace(module, x)]
    for each in (module, *copies):
        assert_equal(each(x), torch_crelu(x, -1))
    assert repr(copies[1]) == "CReLU(dim=-1)"
    assert not module.state_dict()


# The CUDA C++ loops on the host.


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if host_kernels.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("host_mirrored") / "mirrored.so"
    include = Path(torch.__file__).parent / "include"
    source = host_kernels.ROOT / "tests" / "host_mirrored.cpp"
    subprocess.run(
        [
            host_kernels.COMPILER,
            *("-std=c++20", "-O2", "-shared", "-fPIC", f"-I{include}", "-DACTIVATION=ReLU"),
            *(str(source), "-o", str(library)),
        ],
        check=True,
    )
    built = ctypes.CDLL(str(library))
    built.count_blocks.restype = ctypes.c_int64
    return built


def sizes(*numbers):
    return map(ctypes.c_int64, numbers)


def run_forward(host, x, y, mask, first=0):
    """Run the loops on a matrix x, whose first row is that of block `first`, or on all of it."""
    rows, columns = x.shape
    dtype = DTYPES.index(x.dtype)
    skipped = first * elements_of_block(x.dtype) // columns
    args = [host_kernels.address(each, skipped * each[:1].numel()) for each in (x, y)]
    args += [None if mask is None else host_kernels.address(mask, skipped * mask[:1].numel())]
    last = host.count_blocks(dtype, *sizes(skipped + rows, columns))
    host.run_forward(dtype, *args, *sizes(skipped + rows, columns, first, last))


def run_backward(host, grad_output, mask, grad_input, first=0):
    rows, columns = grad_input.shape
    dtype = DTYPES.index(grad_input.dtype)
    skipped = first * elements_of_block(grad_input.dtype) // columns
    tensors = (grad_output, mask, grad_input)
    args = [host_kernels.address(each, skipped * each[:1].numel()) for each in tensors]
    last = host.count_blocks(dtype, *sizes(skipped + rows, columns))
    host.run_backward(dtype, *args, *sizes(skipped + rows, columns, first, last))


def elements_of_block(dtype):
    return 256 * 16 // dtype.itemsize


@all_dtypes
@pytest.mark.parametrize("offset", range(9))
def test_host_loops(host, dtype, offset):
    """Rows of every length from every alignment; nothing outside the outputs is written."""
    for i, columns in enumerate(COLUMNS):
        rows = (1, 3, 67, 600)[i % 4] if columns < 64 else 3
        x = 4 * torch.randn(rows * columns + offset).to(dtype)[offset:].view(rows, columns)
        y = Guarded(2 * x.numel(), dtype, offset)
        mask = Guarded(rows * 2 * (-(-columns // 8)), torch.uint8)
        leaf = x.clone().requires_grad_()
        expected = torch_crelu(leaf)
        for bits in (None, mask.inside.view(rows, 2, -1)):
            y.inside.fill_(77)
            run_forward(host, x, y.inside.view(rows, 2, columns), bits)
            assert_equal(y.inside.view(rows, -1), expected.detach())
        grad_output, grad_input = torch.randn_like(expected), Guarded(x.numel(), dtype, offset)
        run_backward(host, grad_output, bits, grad_input.inside.view(rows, columns))
        (grad,) = torch.autograd.grad(expected, leaf, grad_output)
        assert_equal(grad_input.inside.view(rows, columns), grad)
        spare = 8 * bits.shape[-1] - columns
        assert not (bits[..., -1] >> (8 - spare)).any() or spare == 0
        for output in (y, mask, grad_input):
            output.assert_untouched_outside()


@both_16_bit_dtypes
def test_host_on_every_16_bit_value(host, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(512, 128)
    y, mask = x.new_empty(512, 2, 128), torch.empty(512, 2, 16, dtype=torch.uint8)
    run_forward(host, x, y, mask)
    leaf = x.clone().requires_grad_()
    expected = torch_crelu(leaf)
    assert_equal(y.flatten(1), expected.detach())
    grad_output = x.flip(0).repeat(1, 2)
    grad = torch.empty_like(x)
    run_backward(host, grad_output, mask, grad)
    assert_equal(grad, torch.autograd.grad(expected, leaf, grad_output)[0])


@all_dtypes
def test_host_offsets_beyond_32_bits(host, dtype):
    """A block past 2^31 and past 2^32 elements, on buffers that hold this block alone."""
    x = torch.randn(elements_of_block(dtype) // 64, 64).to(dtype)
    for first in (2**31 // x.numel() + 1, 2**32 // x.numel() + 5, 2**40 // x.numel()):
        y, mask = x.new_empty(len(x), 2, 64), torch.empty(len(x), 2, 8, dtype=torch.uint8)
        run_forward(host, x, y, mask, first)
        assert_equal(y.flatten(1), torch_crelu(x))
        grad = torch.empty_like(x)
        run_backward(host, torch.ones_like(y), mask, grad, first)
        assert_equal(grad, x.sign())


@pytest.mark.parametrize("columns", [1, 9, 64, 2**31 - 7, 2**32 + 24, 2**35 + 40])
def test_host_finds_runs_of_any_matrix(host, columns):
    """The division is one of 32 bits where that does, and not beyond."""
    bytes_ = -(-columns // 8)
    for index in (0, 1, 300, 2**29, 2**32 - 1, 2**32, 2**32 + 300, 2**36 + 5):
        row, run = divmod(index, 2 * bytes_)
        rows = max(row, 1)
        place = (ctypes.c_int64 * 5)()
        host.locate(*sizes(rows, columns, index // 256), index % 256, place)
        length = max(0, min(4, columns - 4 * run)) if row < rows else 0
        start = row * columns + 4 * run
        at = [start, start + row * columns, row * 2 * bytes_ + run // 2, run % 2 * 4, length]
        assert list(place) == at, index


@all_dtypes
def test_host_accesses_are_as_wide_as_rows_and_addresses_allow(host, dtype):
    widths = [width for width in (8, 4, 2, 1) if width * dtype.itemsize <= 16]
    for columns in (1, 2, 4, 6, 8, 12, 16, 24, 64):
        for offset in range(9):
            width = host.widest_access(
                DTYPES.index(dtype),
                ctypes.c_int64(columns),
                ctypes.c_void_p(64 * 8),
                ctypes.c_void_p(offset * dtype.itemsize),
            )
            fits = (w for w in widths if columns % w == 0 and offset % w == 0)
            assert width == next(fits), (columns, offset)


# Machine code. Instructions are for an element that is written: forward writes two for one read.

BUDGETS = {
    ("triton", 16): {"forward": 5, "masked": 8, "backward": 17},
    ("triton", 32): {"forward": 7, "masked": 16, "backward": 25},
    ("cuda", 16): {"forward": 7, "masked": 10, "backward": 20},
    ("cuda", 32): {"forward": 11.5, "masked": 18, "backward": 34},
}
KINDS = {"forward": ("forward", False), "masked": ("forward", True), "backward": ("backward", True)}
CODE_COLUMNS = (16, 64, 2**20)


@functools.cache
def compile_triton(kind, dtype, columns):
    return machine_code.compile_mirrored(CRELU, *KINDS[kind], dtype, columns, 90)


def compiled(backend, kind, dtype, columns, capability=90):
    if backend == "triton":
        return machine_code.code_of(compile_triton(kind, dtype, columns), CRELU.name, dtype)
    kernels = extension_kernels(capability)
    return machine_code.cuda_mirrored_kernel(kernels, CRELU, *KINDS[kind], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_machine_code(backend, kind, dtype, record_property):
    """Few instructions, accesses of 16 bytes, one a thread and row in CUDA C++, and no spill."""
    skip_unless_counted(backend)
    capabilities = CAPABILITIES[backend] if backend == "cuda" else (90,)
    for columns, capability in itertools.product(
        CODE_COLUMNS if backend == "triton" else CODE_COLUMNS[-1:], capabilities
    ):
        kernel = compiled(backend, kind, dtype, columns, capability)
        if capability == 90:
            record_property(f"instructions per element, {columns} columns", kernel.per_element())
            assert kernel.per_element() <= BUDGETS[backend, 8 * dtype.itemsize][kind]
        assert kernel.spills() == 0
        assert kernel.registers <= (48 if backend == "triton" else 40)
        reads, writes = (2, 1) if kind == "backward" else (1, 2)
        of_thread = 2 if backend == "triton" else 1
        masked = {8} if kind != "forward" else set()
        assert kernel.accesses("LDG").count(128) == of_thread * reads
        assert kernel.accesses("STG").count(128) == of_thread * writes
        assert {*kernel.accesses("LDG"), *kernel.accesses("STG")} - {128} == masked
        assert not [one for one in kernel.hot_path if one.opcode.startswith("CALL")]


@BACKENDS_BY_NAME["triton"]
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", CODE_COLUMNS)
def test_triton_addresses_have_64_bits(kind, columns):
    """Row and column of the tile, which 32 bits hold, grow to 64 before they are multiplied.

    The columns may be 2^31 - 1, so nothing is added to them in 32 bits.
    """
    code = compile_triton(kind, torch.bfloat16, columns).asm["ttir"]
    assert not re.search(r"addi %columns\b", code)
    (index,) = re.findall(r"(%\S+) = tt\.get_program_id x", code)
    parts = re.findall(rf"(%\S+) = arith\.(?:divsi|remsi) {index}, ", code)
    assert len(parts) == 2
    for part in (index, *parts):
        uses = re.findall(rf"= (\S+) .*{re.escape(part)}(?![\w.])", code)
        assert uses
        assert set(uses) <= {"arith.divsi", "arith.remsi", "arith.extsi"}
