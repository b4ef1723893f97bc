"""The kernels that each row has, and the machine code of each: Triton's, and the extension's.

A family is a `FamilyKernels`. What a kernel's code is made of, machine_code.py says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fused_act.activations import FAMILIES
from fused_act.families.base import Row
from tests.shared.machine_code import (
    CUDA_THREADS,
    CUDA_TILE,
    CUDA_TYPES,
    TRITON_TYPES,
    Function,
    Kernel,
    code_of,
    compile_ahead,
)

LONG_ROWS = 2**20


class Variant(NamedTuple):
    """One kernel of a row.

    Args:
        direction: "forward", "backward" or "backward from output".
        masked: forward writes a mask, backward reads one.
        by_column: the columns of the matrix have the weights, and not its rows.
    """

    row: Row
    direction: str
    masked: bool = False
    by_column: bool = False

    def __str__(self) -> str:
        parts = [self.row.name, self.direction.replace(" ", "_")]
        return "-".join(parts + ["masked"] * self.masked + ["by_column"] * self.by_column)

    @property
    def inputs(self) -> int:
        """Tensors of the dtype that are read, of as many elements as `x`; a mask is none."""
        if self.direction == "forward":
            return 1
        return 2 if self.row.family == "mirrored" or not self.masked else 1

    @property
    def outputs(self) -> int:
        """Likewise those that are written."""
        return 2 if self.row.family == "mirrored" and self.direction == "forward" else 1


class FamilyKernels(NamedTuple):
    """What is known of the kernels of a family.

    Args:
        variants: the kernels of a row.
        compile_triton: `compile_triton(variant, dtype, capability, columns)`, Triton's compiled
            kernel, for aligned tensors.
        find_cuda: `find_cuda(names, variant, dtype, capability)`, the C++ name of the kernel that
            runs for aligned tensors, and its threads a block.
    """

    variants: Callable[[Row], Iterator[Variant]]
    compile_triton: Callable
    find_cuda: Callable


def elementwise_variants(row: Row) -> Iterator[Variant]:
    yield Variant(row, "forward")
    if row.saves == "mask":
        yield Variant(row, "forward", masked=True)
        yield Variant(row, "backward", masked=True)
    if row.saves == "x":
        yield Variant(row, "backward")
    if row.saves_inplace == "y":
        yield Variant(row, "backward from output")


def compile_elementwise(variant: Variant, dtype: torch.dtype, capability: int, columns: int):
    from fused_act.backends.triton import elementwise
    from fused_act.backends.triton.activations import functions_of

    row, direction, masked, _ = variant
    element = f"*{TRITON_TYPES[dtype]}"
    common = {"numel": "i64", "parameters": ("fp32",) * len(row.parameters)}
    if direction == "forward":
        kernel = elementwise.forward_kernel
        signature = {"x_ptr": element, "y_ptr": element}
        signature |= {"mask_ptr": "*u8" if masked else "constexpr"} | common
        # As a launch without a mask, which passes what a launch with one needs.
        passes = "passes" if row.saves == "mask" else None
        constants = dict(zip(("FORWARD", "PASSES"), functions_of(row, "forward", passes)))
        constants |= {} if masked else {"mask_ptr": None}
    else:
        kernel = elementwise.backward_kernel
        signature = {"grad_output_ptr": element, "saved_ptr": "*u8" if masked else element}
        signature |= {"grad_input_ptr": element} | common
        function = "gradient" if masked else direction.replace("backward", "derivative")
        (derivative,) = functions_of(row, function.replace(" ", "_"))
        tile = elementwise.masked_backward_tile if masked else elementwise.backward_tile
        constants = {"BACKWARD": derivative, "TILE": tile}
    constants |= {"BLOCK_SIZE": elementwise.block_size(dtype)}
    return compile_ahead(kernel, signature, constants, capability, elementwise.OPTIONS)


def find_elementwise(
    names: list[str], variant: Variant, dtype: torch.dtype, capability: int
) -> tuple[str, int]:
    access = 32 if capability >= 100 else 16
    kernel, _, from_output = variant.direction.partition(" ")
    pattern = (
        rf"elementwise::{kernel}_kernel<{access // dtype.itemsize}, {str(variant.masked).lower()}, "
        rf"{'fused_act::elementwise::FromOutput<' if from_output else ''}"
        rf"fused_act::{variant.row.spelling}<{re.escape(CUDA_TYPES[dtype])}>"
    )
    (name,) = (name for name in names if re.search(pattern, name))
    return name, CUDA_TILE // access


def weighted_variants(row: Row) -> Iterator[Variant]:
    for by_column in (False, True):
        for direction in ("forward", "backward"):
            yield Variant(row, direction, by_column=by_column)


def compile_weighted(variant: Variant, dtype: torch.dtype, capability: int, columns: int):
    """With a weight of each row or column, of which 16 divides the length."""
    from fused_act.backends.triton import weighted
    from fused_act.backends.triton.activations import functions_of

    row, direction, _, by_column = variant
    shape = (64, 128, 1, 1) if by_column else (64, 64, 64, 64)
    x = torch.empty(shape, dtype=dtype, device="meta")
    forward = direction == "forward"
    size = weighted.block_size if forward else weighted.backward_block_size
    matrix = weighted.Matrix.of(x, x.size(1), size(dtype))
    kernel = getattr(weighted, f"{direction}_kernel")
    functions = ("forward",) if forward else ("derivative", "weight_gradient")
    constants = dict(zip(map(str.upper, functions), functions_of(row, *functions)))
    constants |= {"BY_COLUMN": by_column}
    constants |= {"BLOCK_M": matrix.tile_rows, "BLOCK_N": matrix.tile_columns}
    fp32 = {"weight_ptr": "*fp32", "partials_ptr": "*fp32"}
    sizes = {"numel": "i64", "columns": "i32", "weights": "i32"}
    signature = {
        name: fp32.get(name) or sizes.get(name) or f"*{TRITON_TYPES[dtype]}"
        for name in kernel.arg_names
    }
    options = getattr(weighted, f"{direction.upper()}_OPTIONS")
    return compile_ahead(kernel, signature, constants, capability, options, ("columns", "weights"))


def find_weighted(
    names: list[str], variant: Variant, dtype: torch.dtype, capability: int, access: int = 16
) -> tuple[str, int]:
    """Args: access: bytes of an access of x; fewer than 16 for rows of odd lengths."""
    element, width = CUDA_TYPES[dtype], access // dtype.itemsize
    by_column = str(variant.by_column).lower()
    arguments = f"{width}, {by_column}, fused_act::{variant.row.pair.spelling}, {element}"
    start = f"weighted::{variant.direction}_kernel<{arguments}>"
    (name,) = (name for name in names if start in name)
    return name, CUDA_THREADS


def mirrored_variants(row: Row) -> Iterator[Variant]:
    yield Variant(row, "forward")
    yield Variant(row, "forward", masked=True)
    yield Variant(row, "backward", masked=True)


def compile_mirrored(variant: Variant, dtype: torch.dtype, capability: int, columns: int):
    from fused_act.backends.triton import mirrored
    from fused_act.backends.triton.activations import functions_of

    row, direction, masked, _ = variant
    element = f"*{TRITON_TYPES[dtype]}"
    if direction == "forward":
        kernel = mirrored.forward_kernel
        signature = {"x_ptr": element, "y_ptr": element}
        signature |= {"mask_ptr": "*u8" if masked else "constexpr"}
        constants = dict(zip(("FORWARD", "PASSES"), functions_of(row, "forward", "passes")))
        constants |= {} if masked else {"mask_ptr": None}
    else:
        kernel = mirrored.backward_kernel
        signature = {"grad_output_ptr": element, "mask_ptr": "*u8", "grad_input_ptr": element}
        constants = dict(zip(("GRADIENT",), functions_of(row, "gradient")))
    signature |= dict.fromkeys(("row_count", "columns", "column_blocks"), "i32")
    constants |= dict(zip(("BLOCK_M", "BLOCK_N"), mirrored.tile(columns, dtype)))
    divisible = ("columns",) if columns % 16 == 0 else ()
    return compile_ahead(kernel, signature, constants, capability, mirrored.OPTIONS, divisible)


def find_mirrored(
    names: list[str], variant: Variant, dtype: torch.dtype, capability: int
) -> tuple[str, int]:
    masked = f"{str(variant.masked).lower()}, " if variant.direction == "forward" else ""
    pattern = (
        rf"mirrored::{variant.direction}_kernel<(\d+), {masked}"
        rf"fused_act::{variant.row.pair.spelling}<{re.escape(CUDA_TYPES[dtype])}>"
    )
    matches = filter(None, (re.search(pattern, name) for name in names))
    return max(matches, key=lambda match: int(match[1])).string, CUDA_THREADS


BY_FAMILY = {
    "elementwise": FamilyKernels(elementwise_variants, compile_elementwise, find_elementwise),
    "weighted": FamilyKernels(weighted_variants, compile_weighted, find_weighted),
    "mirrored": FamilyKernels(mirrored_variants, compile_mirrored, find_mirrored),
}
VARIANTS = [
    variant
    for family, rows in FAMILIES.items()
    for row in rows
    for variant in BY_FAMILY[family].variants(row)
]


def compile_triton(variant: Variant, dtype: torch.dtype, capability: int, columns: int = LONG_ROWS):
    """Triton's compiled kernel, whose `asm` holds "ttir", "ptx" and "cubin".

    Args:
        capability: 90 for sm_90.
        columns: the length of the rows, where kernels go by rows.
    """
    return BY_FAMILY[variant.row.family].compile_triton(variant, dtype, capability, columns)


def triton_kernel(
    variant: Variant, dtype: torch.dtype, capability: int, columns: int = LONG_ROWS
) -> Kernel:
    """The machine code of `compile_triton`."""
    compiled = compile_triton(variant, dtype, capability, columns)
    return code_of(compiled, variant.row.name, dtype)


def cuda_kernel(
    functions: dict[str, Function], variant: Variant, dtype: torch.dtype, capability: int
) -> Kernel:
    """The kernel of the extension that runs for aligned tensors.

    Args:
        functions: what `machine_code.cuda_kernels` found for that capability.
    """
    find = BY_FAMILY[variant.row.family].find_cuda
    name, threads = find(list(functions), variant, dtype, capability)
    return Kernel(name, *functions[name], threads, dtype)
