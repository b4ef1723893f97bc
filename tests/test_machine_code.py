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

from fused_act.activations import FAMILIES
from fused_act.backends import triton
from fused_act.backends.cuda import extension
from tests.shared import kernels, machine_code
from tests.shared.cases import all_dtypes, both_16_bit_dtypes, of_family
from tests.shared.facts import FACTS
from tests.shared.kernels import VARIANTS
from tests.shared.machine_code import Kernel

MAKEFILE = Path(__file__).parent.parent / "Makefile"
CAPABILITIES = {"triton": (80, 90, 100, 120), "cuda": (80, 86, 89, 90, 100, 120)}
needs = {
    "triton": pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    "cuda": pytest.mark.skipif(extension() is None, reason="needs the CUDA extension"),
}
BACKENDS = [pytest.param(name, marks=mark) for name, mark in needs.items()]
all_backends = pytest.mark.parametrize("backend", BACKENDS)


def computes(variant):
    """Whether it computes anything: what a mask lets through passes as it is."""
    return not (variant.masked and variant.direction == "backward")


def targets(*families, where=lambda variant: True):
    """The kernels of some families for every architecture, of which `make test` takes one.

    Triton takes seconds to compile one that sees a matrix: those are compiled for sm_90 alone.
    """
    return pytest.mark.parametrize(
        ("backend", "capability", "variant"),
        [
            pytest.param(
                backend,
                capability,
                variant,
                id=f"{backend}-sm_{capability}-{variant}",
                marks=[needs[backend], *([] if capability == 90 else [pytest.mark.full])],
            )
            for backend, capabilities in CAPABILITIES.items()
            for capability in capabilities
            for variant in VARIANTS
            if variant.row.family in families and where(variant)
            if capability == 90 or backend == "cuda" or variant.row.family == "elementwise"
        ],
    )


all_variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
# Registers of a thread at most, so that enough warps fit on an SM. Those with weights hold sums.
REGISTERS = {
    "elementwise": {"triton": 40, "cuda": 40},
    "mirrored": {"triton": 48, "cuda": 40},
    "weighted forward": {"triton": 40, "cuda": 64},
    "weighted backward": {"triton": 80, "cuda": 64},
}


def of(*families, where=lambda variant: True):
    """The kernels of some families."""
    found = [variant for variant in VARIANTS if variant.row.family in families and where(variant)]
    return pytest.mark.parametrize("variant", found, ids=str)


@functools.cache
def extension_kernels(capability):
    return machine_code.cuda_kernels(extension(), capability)


@functools.cache
def compiled(backend, variant, dtype, capability) -> Kernel:
    if backend == "triton":
        return kernels.triton_kernel(variant, dtype, capability)
    return kernels.cuda_kernel(extension_kernels(capability), variant, dtype, capability)


def skip_unless_counted(backend):
    (counted,) = re.findall(r"^TRITON \?= triton==(\S+)", MAKEFILE.read_text(), re.MULTILINE)
    if backend == "triton" and triton.version() != counted:
        pytest.skip(f"counts are those of triton {counted}")


@pytest.mark.full
@needs["triton"]
@all_variants
def test_every_triton_kernel_compiles(variant):
    """`make test-all` runs this with the oldest Triton that is supported, too."""
    assert kernels.triton_kernel(variant, torch.bfloat16, 90).accesses("STG")


def test_the_oldest_triton_that_is_tested_is_the_oldest_that_is_supported():
    (tested,) = re.findall(r"^TRITON_OLDEST \?= triton==(\S+)", MAKEFILE.read_text(), re.MULTILINE)
    assert tuple(map(int, tested.split(".")))[:2] == triton.MINIMUM


@all_backends
@all_variants
@all_dtypes
def test_instructions_for_an_element(backend, variant, dtype, record_property):
    skip_unless_counted(backend)
    kernel = compiled(backend, variant, dtype, 90)
    record_property("instructions per element", kernel.per_element())
    of_row = [each for each in VARIANTS if each.row is variant.row]
    budgets = FACTS[variant.row.name].budgets[backend, 8 * dtype.itemsize]
    assert len(budgets) == len(of_row)
    assert kernel.per_element() <= budgets[of_row.index(variant)]


@needs["triton"]
@of("mirrored")
@pytest.mark.parametrize("columns", [16, 64])
@all_dtypes
def test_instructions_of_short_rows(variant, columns, dtype):
    skip_unless_counted("triton")
    kernel = kernels.triton_kernel(variant, dtype, 90, columns)
    of_row = [each for each in VARIANTS if each.row is variant.row]
    budget = FACTS[variant.row.name].budgets["triton", 8 * dtype.itemsize]
    assert kernel.per_element() <= budget[of_row.index(variant)]
    assert kernel.spills() == 0
    assert kernel.registers <= REGISTERS["mirrored"]["triton"]
    loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
    assert loads.count(128) == 2 * variant.inputs
    assert stores.count(128) == 2 * variant.outputs
    assert {*loads, *stores} - {128} == ({8} if variant.masked else set())
    assert not [one for one in kernel.hot_path if one.opcode.startswith("CALL")]


@targets(*FAMILIES)
@all_dtypes
def test_registers_suffice_and_leave_room_for_other_warps(backend, capability, variant, dtype):
    skip_unless_counted(backend)
    kernel = compiled(backend, variant, dtype, capability)
    family = variant.row.family
    limits = REGISTERS.get(family) or REGISTERS[f"{family} {variant.direction}"]
    assert kernel.registers <= limits[backend]
    spills = FACTS[variant.row.name].spills.get((backend, variant.by_column), 0)
    assert kernel.spills() <= (spills if variant.direction == "backward" else 0)


@targets("elementwise", "mirrored")
@all_dtypes
def test_accesses_are_as_wide_as_can_be(backend, capability, variant, dtype):
    """But for the mask: one a thread and tensor in CUDA C++, two in Triton.

    Triton has none of 32 bytes (its pull request 9868), and mirrored CUDA kernels take none.
    """
    kernel = compiled(backend, variant, dtype, capability)
    elementwise = variant.row.family == "elementwise"
    width = 256 if backend == "cuda" and capability >= 100 and elementwise else 128
    of_thread = 1 if backend == "cuda" else 2
    loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
    assert loads.count(width) == of_thread * variant.inputs
    assert stores.count(width) == of_thread * variant.outputs
    assert {*loads, *stores} - {width} == ({8} if variant.masked else set())
    assert not [one for one in kernel.hot_path if one.opcode.startswith("CALL")]


@targets("weighted")
@all_dtypes
def test_accesses_with_weights_are_wide(backend, capability, variant, dtype):
    kernel = compiled(backend, variant, dtype, capability)
    loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
    assert 128 * loads.count(128) >= 8 * 32 * variant.inputs
    assert 128 * stores.count(128) >= 8 * 32  # the path of a cut tile has wide ones too
    # Of 4 bytes are weights, and the sums for them.
    assert {*loads, *stores} <= {128, 64, 32}


@needs["cuda"]
@of_family("weighted")
@all_dtypes
@pytest.mark.parametrize("by_column", [False, True], ids=["by_row", "by_column"])
def test_narrow_accesses_spill_little(case, by_column, dtype):
    """What rows of odd lengths run, whose threads have more runs and so more weights and sums."""
    found = extension_kernels(90)
    for direction in ("forward", "backward"):
        variant = kernels.Variant(case.row, direction, by_column=by_column)
        for access in [bytes_ for bytes_ in (2, 4, 8) if bytes_ >= dtype.itemsize]:
            name, _ = kernels.find_weighted(list(found), variant, dtype, 90, access)
            local = [one for one in found[name].instructions if one.opcode[:3] in ("LDL", "STL")]
            assert len(local) <= 64
            assert found[name].registers <= 128


@targets("elementwise", where=computes)
@all_dtypes
def test_clamps_let_nan_through(backend, capability, variant, dtype):
    """The plain forms drop NaN, and neither the interpreter nor the host shows it."""
    kernel = compiled(backend, variant, dtype, capability)
    opcodes = {one.opcode for one in kernel.hot_path}
    clamps = {opcode for opcode in opcodes if re.match("[FH]MNMX", opcode)}
    assert all(".NAN" in opcode for opcode in clamps)
    # A conversion that clamps at 0 on its way keeps NaN, as the PTX manual has it of cvt.relu.
    clamps |= {opcode for opcode in opcodes if ".RELU" in opcode}
    # Elsewhere a test that found no clamp would prove nothing.
    clamped = FACTS[variant.row.name].clamps.get(variant.direction, ())
    assert bool(clamps) is (8 * dtype.itemsize in clamped)


@all_backends
@of("elementwise", where=computes)
@both_16_bit_dtypes
def test_results_round_to_nearest(backend, variant, dtype):
    """The other modes show in the opcode; the conversions of the host are not the device's."""
    kernel = compiled(backend, variant, dtype, 90)
    opcodes = [one.opcode for one in kernel.hot_path]
    conversions = [opcode for opcode in opcodes if opcode.startswith("F2F")]
    # Triton 3.9 clamps in 16 bits, which rounds nothing.
    assert conversions or any(opcode.startswith("HMNMX2") for opcode in opcodes)
    assert not [opcode for opcode in conversions if {"RZ", "RM", "RP"} & set(opcode.split("."))]


WITH_SPECIAL_FUNCTIONS = [
    variant for variant in VARIANTS if FACTS[variant.row.name].special_functions
]


@all_backends
@pytest.mark.parametrize("variant", WITH_SPECIAL_FUNCTIONS, ids=str)
@all_dtypes
def test_one_exponential_one_reciprocal(backend, variant, dtype):
    """Or whatever special functions the row names: each once for an element, and no other."""
    kernel = compiled(backend, variant, dtype, 90)
    opcodes = [one.opcode for one in kernel.hot_path]
    names = {f"MUFU.{name}" for name in FACTS[variant.row.name].special_functions}
    assert {opcode for opcode in opcodes if "MUFU" in opcode} == names
    assert [opcodes.count(name) for name in names] == [kernel.elements_per_thread] * len(names)


def test_inline_ptx_is_what_has_no_other_name():
    """An approximate instruction, a clamp that keeps NaN, and a mask's bit; none in the loops."""
    csrc = MAKEFILE.parent / "csrc"
    found = {path.name: path.read_text().count("asm") for path in csrc.glob("*.*")}
    assert {name for name, count in found.items() if count} == {"math.cuh"}
    ptx = re.findall(r'asm(?: volatile)?\("\{?(\S+)', (csrc / "math.cuh").read_text())
    assert ptx == ["ex2.approx.ftz.f32", "rcp.approx.ftz.f32", "min.NaN.f32", "max.NaN.f32", ".reg"]


WIDENING = re.compile(r"(mul|mad)\.wide\.[su]32|cvt\.[su]64\.[su]32")


@needs["triton"]
@of("elementwise")
@all_dtypes
def test_triton_addresses_have_64_bits(variant, dtype):
    """The block index grows to 64 bits in the first step: a 32-bit product wraps after 2^31."""
    code = kernels.compile_triton(variant, dtype, 90).asm["ptx"]
    (uses,) = machine_code.block_index_uses(code).values()
    assert uses
    assert all(map(WIDENING.fullmatch, uses)), uses


@needs["triton"]
@of("mirrored")
@pytest.mark.parametrize("columns", [16, 64, kernels.LONG_ROWS])
def test_mirrored_triton_addresses_have_64_bits(variant, columns):
    """Row and column of the tile, which 32 bits hold, grow to 64 before they are multiplied.

    The columns may be 2^31 - 1, so nothing is added to them in 32 bits.
    """
    code = kernels.compile_triton(variant, torch.bfloat16, 90, columns).asm["ttir"]
    assert not re.search(r"addi %columns\b", code)
    (index,) = re.findall(r"(%\S+) = tt\.get_program_id x", code)
    parts = re.findall(rf"(%\S+) = arith\.(?:divsi|remsi) {index}, ", code)
    assert len(parts) == 2
    for part in (index, *parts):
        uses = re.findall(rf"= (\S+) .*{re.escape(part)}(?![\w.])", code)
        assert uses
        assert set(uses) <= {"arith.divsi", "arith.remsi", "arith.extsi"}


@needs["cuda"]
def test_cuda_addresses_have_64_bits():
    found = machine_code.block_index_uses(machine_code.cuda_ptx(extension()))
    # Those with weights divide the block index first; host/weighted.cpp runs their arithmetic.
    found = {kernel: uses for kernel, uses in found.items() if "weighted" not in kernel}
    # Five widths for each 16-bit dtype, four for fp32. What is mirrored has no 32-byte accesses.
    widths = {"elementwise": 5 + 5 + 4, "mirrored": 4 + 4 + 3}
    counts = [widths.get(variant.row.family, 0) for variant in VARIANTS]
    assert len(found) == sum(counts)
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
