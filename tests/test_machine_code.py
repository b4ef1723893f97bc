"""What the compilers make of the kernels: wide accesses, few instructions, no spills, NaN kept.

Triton kernels are compiled ahead of time; the CUDA kernels are those of the built extension. Counts
are those of one compiler each: Triton's of the version in the Makefile, and nvcc's.
"""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from benchmarks import machine_code
from benchmarks.machine_code import Kernel
from fused_act.activations import FAMILIES
from fused_act.backends import triton
from fused_act.backends.cuda import extension
from tests.cases import all_dtypes, both_16_bit_dtypes

ELEMENTWISE = FAMILIES["elementwise"]

MAKEFILE = Path(__file__).parent.parent / "Makefile"

# Instructions for an element on sm_90, load, store and conversion included: forward, with a mask
# where there is one, and each backward. Memory speed on an H200 allows 31 and 47 in 16 bits, in
# fp32 twice that.
BUDGETS = {
    ("triton", 16): {
        "mish": (13, 19),
        "swish": (10, 18),
        "relu6": (11, 5),
        "sigmoid": (9, 9),
        "tanh": (17, 9),
        "relu": (6, 5),
        "leaky_relu": (8, 7),
        "selu": (14, 11, 10),
    },
    ("cuda", 16): {
        "mish": (14, 20),
        "swish": (11, 19),
        "relu6": (11, 7),
        "sigmoid": (10, 9),
        "tanh": (19, 9),
        "relu": (8, 7),
        "leaky_relu": (9, 7.5),
        "selu": (17, 13, 12),
    },
    ("triton", 32): {
        "mish": (24, 32),
        "swish": (26, 32),
        "relu6": (16, 10),
        "sigmoid": (18, 7),
        "tanh": (19, 7),
        "relu": (14, 10),
        "leaky_relu": (15, 11),
        "selu": (19, 21, 10),
    },
    ("cuda", 32): {
        "mish": (27, 33),
        "swish": (28, 34),
        "relu6": (14.5, 11),
        "sigmoid": (21, 10),
        "tanh": (23, 10),
        "relu": (12.5, 11),
        "leaky_relu": (12.5, 11.5),
        "selu": (22, 24, 13),
    },
}

# What clamps, in which widths; elsewhere a test that found no clamp would prove nothing.
CLAMPED = {
    ("mish", "forward"): (16, 32),
    ("mish", "backward"): (16, 32),
    ("swish", "forward"): (32,),
    ("swish", "backward"): (16, 32),
    ("relu6", "forward"): (16, 32),
    ("relu", "forward"): (16, 32),
    ("sigmoid", "forward"): (32,),
    ("selu", "backward"): (32,),
}

CAPABILITIES = {"triton": (80, 90, 100, 120), "cuda": (80, 86, 89, 90, 100, 120)}
BACKENDS_BY_NAME = {
    "triton": pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or triton.INTERPRET, reason="needs triton"
    ),
    "cuda": pytest.mark.skipif(extension() is None, reason="needs the CUDA extension"),
}
BACKENDS = [pytest.param(name, marks=mark) for name, mark in BACKENDS_BY_NAME.items()]


def named(row, direction, masked):
    suffix = "-masked" if masked else ""
    return pytest.param(row, direction, masked, id=f"{row.name}-{direction}{suffix}")


KERNELS = [named(*kernel) for kernel in machine_code.kernels()]
all_kernels = pytest.mark.parametrize(("activation", "direction", "masked"), KERNELS)


@functools.cache
def extension_kernels(capability):
    return machine_code.cuda_kernels(extension(), capability)


@functools.cache
def compiled(backend, activation, direction, masked, dtype, capability) -> Kernel:
    if backend == "triton":
        return machine_code.triton_kernel(activation, direction, masked, dtype, capability)
    found = extension_kernels(capability)
    return machine_code.cuda_kernel(found, activation, direction, masked, dtype, capability)


def skip_unless_counted(backend):
    (counted,) = re.findall(r"^TRITON \?= triton==(\S+)", MAKEFILE.read_text(), re.MULTILINE)
    if backend == "triton" and triton.version() != counted:
        pytest.skip(f"counts are those of triton {counted}")


@BACKENDS_BY_NAME["triton"]
@pytest.mark.parametrize(
    ("row", "direction", "masked"),
    [named(*kernel) for kernel in (*machine_code.kernels(), *machine_code.matrix_kernels())],
)
def test_every_triton_kernel_compiles(row, direction, masked):
    """`make test` runs this with the oldest Triton that is supported, too."""
    elementwise = row.family == "elementwise"
    compile_ = machine_code.triton_kernel if elementwise else machine_code.triton_matrix_kernel
    assert compile_(row, direction, masked, torch.bfloat16, 90).accesses("STG")
    if row.family == "weighted":  # the above is for a weight of each row
        machine_code.compile_triton_weighted(row, direction, True, torch.bfloat16, 90)


def test_the_oldest_triton_that_is_tested_is_the_oldest_that_is_supported():
    (tested,) = re.findall(r"^TRITON_OLDEST \?= triton==(\S+)", MAKEFILE.read_text(), re.MULTILINE)
    assert tuple(map(int, tested.split(".")))[:2] == triton.MINIMUM


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_instructions_for_an_element(
    backend, activation, direction, masked, dtype, record_property
):
    skip_unless_counted(backend)
    kernel = compiled(backend, activation, direction, masked, dtype, 90)
    record_property("instructions per element", kernel.per_element())
    budget = dict(
        zip(directions(activation), BUDGETS[backend, 8 * dtype.itemsize][activation.name])
    )
    assert kernel.per_element() <= budget[direction]


def directions(activation) -> dict[str, None]:
    return dict.fromkeys(
        direction for each, direction, _ in machine_code.kernels() if each is activation
    )


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_registers_suffice_and_leave_room_for_other_warps(
    backend, activation, direction, masked, dtype
):
    skip_unless_counted(backend)
    for capability in CAPABILITIES[backend]:
        kernel = compiled(backend, activation, direction, masked, dtype, capability)
        assert kernel.registers <= 40
        assert kernel.spills() == 0


def inputs(direction, masked) -> int:
    return 1 if direction == "forward" or masked else 2


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_accesses_are_as_wide_as_can_be(backend, activation, direction, masked, dtype):
    """But for the mask: one a thread and tensor in CUDA C++, two in Triton.

    Triton has none of 32 bytes (its pull request 9868).
    """
    for capability in CAPABILITIES[backend]:
        kernel = compiled(backend, activation, direction, masked, dtype, capability)
        width = 256 if backend == "cuda" and capability >= 100 else 128
        of_thread = 1 if backend == "cuda" else 2
        loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
        assert loads.count(width) == of_thread * inputs(direction, masked)
        assert stores.count(width) == of_thread
        assert {*loads, *stores} - {width} == ({8} if masked else set())


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_clamps_let_nan_through(backend, activation, direction, masked, dtype):
    """The plain forms drop NaN, and neither the interpreter nor the host shows it."""
    if masked and direction == "backward":
        pytest.skip("the mask alone decides; nothing is clamped")
    for capability in CAPABILITIES[backend]:
        kernel = compiled(backend, activation, direction, masked, dtype, capability)
        opcodes = {one.opcode for one in kernel.hot_path}
        clamps = {opcode for opcode in opcodes if re.match("[FH]MNMX", opcode)}
        assert all(".NAN" in opcode for opcode in clamps)
        # A conversion that clamps at 0 on its way keeps NaN, as the PTX manual has it of cvt.relu.
        clamps |= {opcode for opcode in opcodes if ".RELU" in opcode}
        clamped = 8 * dtype.itemsize in CLAMPED.get((activation.name, direction), ())
        assert bool(clamps) is clamped


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@both_16_bit_dtypes
def test_results_round_to_nearest(backend, activation, direction, masked, dtype):
    """The other modes show in the opcode; the conversions of the host are not the device's."""
    if masked and direction == "backward":
        pytest.skip("a gradient passes as it is")
    kernel = compiled(backend, activation, direction, masked, dtype, 90)
    opcodes = [one.opcode for one in kernel.hot_path]
    conversions = [opcode for opcode in opcodes if opcode.startswith("F2F")]
    # Triton 3.9 clamps in 16 bits, which rounds nothing.
    assert conversions or any(opcode.startswith("HMNMX2") for opcode in opcodes)
    assert not [opcode for opcode in conversions if {"RZ", "RM", "RP"} & set(opcode.split("."))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ELEMENTWISE[:2], ids=lambda activation: activation.name)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@all_dtypes
def test_one_exponential_one_reciprocal(backend, activation, direction, dtype):
    kernel = compiled(backend, activation, direction, False, dtype, 90)
    opcodes = [one.opcode for one in kernel.hot_path]
    assert opcodes.count("MUFU.EX2") == kernel.elements_per_thread
    assert opcodes.count("MUFU.RCP") == kernel.elements_per_thread
    assert {opcode for opcode in opcodes if "MUFU" in opcode} == {"MUFU.EX2", "MUFU.RCP"}


def test_inline_ptx_is_what_has_no_other_name():
    """An approximate instruction, a clamp that keeps NaN, and a mask's bit; none in the loops."""
    csrc = MAKEFILE.parent / "csrc"
    found = {path.name: path.read_text().count("asm") for path in csrc.iterdir()}
    assert {name for name, count in found.items() if count} == {"math.cuh"}
    ptx = re.findall(r'asm(?: volatile)?\("\{?(\S+)', (csrc / "math.cuh").read_text())
    assert ptx == ["ex2.approx.ftz.f32", "rcp.approx.ftz.f32", "min.NaN.f32", "max.NaN.f32", ".reg"]


WIDENING = re.compile(r"(mul|mad)\.wide\.[su]32|cvt\.[su]64\.[su]32")


@BACKENDS_BY_NAME["triton"]
@all_kernels
@all_dtypes
def test_triton_addresses_have_64_bits(activation, direction, masked, dtype):
    """The block index grows to 64 bits in the first step: a 32-bit product wraps after 2^31."""
    compiled = machine_code.compile_triton(activation, direction, masked, dtype, 90)
    (uses,) = machine_code.block_index_uses(compiled.asm["ptx"]).values()
    assert uses
    assert all(map(WIDENING.fullmatch, uses)), uses


@BACKENDS_BY_NAME["cuda"]
def test_cuda_addresses_have_64_bits():
    found = machine_code.block_index_uses(machine_code.cuda_ptx(extension()))
    # Those with weights divide the block index first; host_weighted.cpp runs their arithmetic.
    found = {kernel: uses for kernel, uses in found.items() if "weighted" not in kernel}
    # Five widths for each 16-bit dtype, four for fp32. What is mirrored has no 32-byte accesses; it
    # has two kernels forward, one backward.
    mirrored = sum("mirrored" in kernel for kernel in found)
    assert mirrored == len(FAMILIES["mirrored"]) * 3 * (4 + 4 + 3)
    assert len(found) - mirrored == len(KERNELS) * (5 + 5 + 4)
    for kernel, uses in found.items():
        assert uses, kernel
        assert all(map(WIDENING.fullmatch, uses)), (kernel, uses)


def kernel_of(text: str, **fields) -> Kernel:
    text = f"Function demo:\n  REG:24 STACK:0\nFunction : demo\n{text}"
    ((name, function),) = machine_code.parse_sass(text).items()
    return Kernel(name, *function, **{"threads": 256, "dtype": torch.float32} | fields)


def test_parser_sees_predicates_widths_and_branches():
    kernel = kernel_of("""
        /*0000*/                   ISETP.GE.AND P0, PT, R0, R2, PT ;
        /*0010*/               @P0 BRA 0x60 ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R14.64] ;
        /*0030*/                   STL [R1], R8 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0050*/                   EXIT ;
        /*0060*/                   LDG.E.U16 R8, desc[UR4][R14.64] ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
    """)
    opcodes = [one.opcode for one in kernel.hot_path]
    assert opcodes[2:] == ["LDG.E.128", "STL", "STG.E.128", "EXIT"]
    assert kernel.registers == 24
    assert kernel.elements_per_thread == 4
    assert kernel.per_element() == 6 / 4
    assert kernel.accesses("LDG") == [128]
    assert kernel.spills() == 1
    assert kernel.instructions[1].predicate == "@P0"
    assert kernel.instructions[1].target == 0x60


def test_hot_path_calls_no_function_and_loads_in_flight_end_with_the_first_use():
    kernel = kernel_of("""
        /*0000*/                   LDG.E.ENL2.256 R12, R8, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R16, desc[UR4][R4.64] ;
        /*0020*/               @P0 BRA 0x50 ;
        /*0030*/                   CALL.REL.NOINC 0xb0 ;
        /*0040*/                   BRA 0x80 ;
        /*0050*/                   FADD R0, R0, R1 ;
        /*0060*/                   FADD R1, R0, R11 ;
        /*0070*/                   MUFU.EX2 R1, R1 ;
        /*0080*/                   LDG.E.128 R20, desc[UR4][R4.64] ;
        /*0090*/                   STG.E.ENL2.256 desc[UR4][R2.64], R8, R12 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   RET.REL.NODEC R2 ;
    """)
    assert "CALL.REL.NOINC" not in [one.opcode for one in kernel.hot_path]
    assert kernel.loads_in_flight() == [256, 128]
    assert kernel.accesses("LDG") == [256, 128, 128]
    assert kernel.per_element("MUFU") == 1 / 8
