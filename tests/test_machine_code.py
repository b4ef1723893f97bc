"""What the compilers make of the kernels: wide accesses, few instructions, no spills, NaN kept.

Triton kernels are compiled ahead of time; the CUDA kernels are those of the built extension.
"""

import functools
import importlib.util
import re

import pytest
import torch

from benchmarks import machine_code
from fused_act.activations import ACTIVATIONS
from fused_act.backends.cuda import extension
from fused_act.backends.triton import INTERPRET
from tests.cases import all_dtypes, both_16_bit_dtypes

# Instructions for an element of a 16-bit tensor on sm_90, load, store and conversion included:
# (forward, backward); relu6 forward writes its mask. Memory speed on an H200 allows 31 and 47.
BUDGET_16_BIT = {"mish": (18, 24), "swish": (14, 18), "relu6": (13, 10)}
# fp32 moves twice the bytes and may spend as much again.
BUDGET_FP32 = {"mish": (28, 36), "swish": (28, 36), "relu6": (16, 11)}

# Whose kernels do not clamp; elsewhere a test that found no clamp would prove nothing.
UNCLAMPED = {("swish", "forward", torch.float16), ("swish", "forward", torch.bfloat16)}

CAPABILITIES = {"triton": (80, 90, 100, 120), "cuda": (80, 86, 89, 90, 100, 120)}
BACKENDS_BY_NAME = {
    "triton": pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or INTERPRET, reason="needs triton"
    ),
    "cuda": pytest.mark.skipif(extension() is None, reason="needs the CUDA extension"),
}
BACKENDS = [pytest.param(name, marks=mark) for name, mark in BACKENDS_BY_NAME.items()]
KERNELS = [
    pytest.param(
        activation,
        direction,
        masked,
        id=f"{activation.name}-{direction}{'-masked' if masked else ''}",
    )
    for activation, direction, masked in machine_code.kernels()
]
all_kernels = pytest.mark.parametrize(("activation", "direction", "masked"), KERNELS)


@functools.cache
def extension_kernels(capability):
    return machine_code.cuda_kernels(extension(), capability)


@functools.cache
def compiled(backend, activation, direction, dtype, capability, masked) -> machine_code.Kernel:
    if backend == "triton":
        return machine_code.triton_kernel(activation, direction, dtype, capability, masked=masked)
    found = extension_kernels(capability)
    return machine_code.cuda_kernel(found, activation, direction, dtype, masked=masked)


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_instructions_for_an_element(
    backend, activation, direction, masked, dtype, record_property
):
    kernel = compiled(backend, activation, direction, dtype, 90, masked)
    count = kernel.instructions_per_element()
    record_property("instructions per element", count)
    budget = BUDGET_16_BIT if dtype.itemsize == 2 else BUDGET_FP32
    assert count <= budget[activation.name][direction == "backward"]


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_accesses_are_wide_and_nothing_spills(backend, activation, direction, masked, dtype):
    """16-byte accesses only, but for the mask; at least two loads of each input in flight."""
    inputs = 1 if direction == "forward" or masked else 2
    for capability in CAPABILITIES[backend]:
        kernel = compiled(backend, activation, direction, dtype, capability, masked)
        assert kernel.spills() == 0
        loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
        assert loads.count(128) >= 2 * inputs
        assert stores.count(128) >= 2
        narrow = {width for width in loads + stores if width < 128}
        assert narrow == ({8} if masked else set())


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_all_loads_come_before_the_math(backend, activation, direction, masked, dtype):
    assert compiled(backend, activation, direction, dtype, 90, masked).late_loads() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@all_dtypes
def test_clamps_let_nan_through(backend, activation, direction, masked, dtype):
    """The plain forms drop NaN, and neither the interpreter nor the host shows it."""
    if masked and direction == "backward":
        pytest.skip("the mask alone decides; nothing is clamped")
    for capability in CAPABILITIES[backend]:
        kernel = compiled(backend, activation, direction, dtype, capability, masked)
        clamps = {one.opcode for one in kernel.hot_path() if re.match("[FH]MNMX", one.opcode)}
        assert all(".NAN" in opcode for opcode in clamps)
        assert clamps or (activation.name, direction, dtype) in UNCLAMPED


@pytest.mark.parametrize("backend", BACKENDS)
@all_kernels
@both_16_bit_dtypes
def test_results_round_to_nearest(backend, activation, direction, masked, dtype):
    """The other modes show in the opcode; the conversions of the host are not the device's."""
    if masked and direction == "backward":
        pytest.skip("a gradient passes as it is")
    kernel = compiled(backend, activation, direction, dtype, 90, masked)
    conversions = [one.opcode for one in kernel.hot_path() if one.opcode.startswith("F2F")]
    assert conversions
    assert not [opcode for opcode in conversions if {"RZ", "RM", "RP"} & set(opcode.split("."))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=lambda activation: activation.name)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@all_dtypes
def test_one_exponential_one_reciprocal(backend, activation, direction, dtype):
    kernel = compiled(backend, activation, direction, dtype, 90, False)
    opcodes = [one.opcode for one in kernel.hot_path()]
    assert opcodes.count("MUFU.EX2") == kernel.elements_per_thread
    assert opcodes.count("MUFU.RCP") == kernel.elements_per_thread
    assert {opcode for opcode in opcodes if "MUFU" in opcode} == {"MUFU.EX2", "MUFU.RCP"}


WIDENING = re.compile(r"(mul|mad)\.wide\.[su]32|cvt\.[su]64\.[su]32")


@BACKENDS_BY_NAME["triton"]
@all_kernels
@all_dtypes
def test_triton_addresses_have_64_bits(activation, direction, masked, dtype):
    """The block index grows to 64 bits in the first step: a 32-bit product wraps after 2^31."""
    compiled = machine_code.compile_triton(activation, direction, dtype, 90, masked=masked)
    (uses,) = machine_code.block_index_uses(compiled.asm["ptx"]).values()
    assert uses
    assert all(map(WIDENING.fullmatch, uses)), uses


@BACKENDS_BY_NAME["cuda"]
def test_cuda_addresses_have_64_bits():
    found = machine_code.block_index_uses(machine_code.cuda_ptx(extension()))
    # Four widths for each 16-bit dtype, three for fp32.
    assert len(found) == len(KERNELS) * (4 + 4 + 3)
    for kernel, uses in found.items():
        assert uses, kernel
        assert all(map(WIDENING.fullmatch, uses)), (kernel, uses)


def test_parser_sees_predicates_widths_and_branches():
    text = """
        Function : demo
        /*0000*/                   ISETP.GE.AND P0, PT, R0, R2, PT ;
        /*0010*/               @P0 BRA 0x60 ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R14.64] ;
        /*0030*/                   STL [R1], R8 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0050*/                   EXIT ;
        /*0060*/                   LDG.E.U16 R8, desc[UR4][R14.64] ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
    """
    ((name, instructions),) = machine_code.parse_sass(text).items()
    kernel = machine_code.Kernel(name, instructions, elements_per_thread=6)
    assert [one.opcode for one in kernel.hot_path()][2:] == [
        "LDG.E.128",
        "STL",
        "STG.E.128",
        "EXIT",
    ]
    assert kernel.instructions_per_element() == 1
    assert kernel.accesses("LDG") == [128]
    assert kernel.spills() == 1
    assert instructions[1].predicate == "@P0"
    assert instructions[1].target == 0x60
