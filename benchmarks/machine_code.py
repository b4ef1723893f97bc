"""What the compilers made of the kernels: the instructions that a full tile runs, no GPU needed.

    python -m benchmarks.machine_code

Triton kernels are compiled ahead of time for a target; the CUDA kernels are read out of the built
extension. Both go through cuobjdump, which comes with the triton wheel and with the CUDA toolkit.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import environment
from fused_act.activation import Activation
from fused_act.activations import ACTIVATIONS
from fused_act.backends.cuda import extension

TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUDA_TYPES = {torch.float16: "c10::Half", torch.bfloat16: "c10::BFloat16", torch.float32: "float"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of SASS: `/*0110*/  @!P0 LDG.E.128 R8, desc[UR4][R14.64] ;`"""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def is_conditional(self) -> bool:
        """`@P0 BRA 0x50`, or on newer targets `BRA.U UP0, 0x50`."""
        return bool(self.predicate or re.match(r"!?U?P\d", self.operands))

    @property
    def target(self) -> int | None:
        match = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(match[1], 16) if self.opcode.startswith("BRA") and match else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel and what a thread of a full tile runs of it."""

    name: str
    instructions: list[Instruction]
    elements_per_thread: int

    def hot_path(self) -> list[Instruction]:
        """What a thread of a full tile runs: the path to EXIT with the wide accesses.

        A path through a block of the last tile would show narrow accesses to tensor elements.
        """
        paths = [path for path in self.paths() if any(width(i) == 128 for i in path)]
        if not paths:
            raise ValueError(f"{self.name}: no path has 128-bit accesses only")
        return min(paths, key=len)

    def paths(self) -> list[list[Instruction]]:
        """Every path from the entry to an EXIT without an access of 2 or 4 bytes."""
        index = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        finished, unfinished = [], [(0, [])]
        while unfinished:
            position, path = unfinished.pop()
            while True:
                instruction = self.instructions[position]
                if width(instruction) in (16, 32, 64):
                    break
                path = [*path, instruction]
                if instruction.opcode == "EXIT" and not instruction.predicate:
                    finished.append(path)
                    break
                target = instruction.target
                if target is not None and index[target] > position:
                    if not instruction.is_conditional:
                        position = index[target]
                        continue
                    unfinished.append((index[target], path))
                elif target is not None:
                    break  # a loop; after EXIT, the padding
                position += 1
        return finished

    def instructions_per_element(self) -> float:
        return len(self.hot_path()) / self.elements_per_thread

    def opcodes(self) -> set[str]:
        return {instruction.opcode for instruction in self.instructions}

    def accesses(self, opcode: str) -> list[int]:
        """Widths in bits of the global loads (`LDG`) or stores (`STG`) on the hot path."""
        return [width(i) for i in self.hot_path() if i.opcode.split(".")[0] == opcode]

    def late_loads(self) -> int:
        """16-byte loads after the first use of a loaded value, which are not in flight with it."""
        loaded, late, used = set(), 0, False
        for instruction in self.hot_path():
            target, _, sources = instruction.operands.partition(",")
            if instruction.opcode.startswith("LDG"):
                late += used and width(instruction) == 128
                first = int(re.match(r"R(\d+)", target)[1])
                loaded |= set(range(first, first + max(1, width(instruction) // 32)))
            elif loaded & {int(number) for number in re.findall(r"\bR(\d+)", sources)}:
                used = True
        return late

    def spills(self) -> int:
        """Accesses on the hot path to local memory, where spilled registers go."""
        return sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in self.hot_path())


def width(instruction: Instruction) -> int | None:
    """Bits that a global access moves a thread, or None for other instructions."""
    opcode, *modifiers = instruction.opcode.split(".")
    if opcode not in ("LDG", "STG"):
        return None
    for modifier, bits in {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16}.items():
        if modifier in modifiers:
            return bits
    return 8 if "U8" in modifiers or "S8" in modifiers else 32


def tool(name: str) -> str:
    """The path of cuobjdump, from the triton wheel or else the CUDA toolkit."""
    try:
        import triton
    except ImportError:
        bundled = None
    else:
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if bundled is not None and bundled.exists():
        return str(bundled)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name}: neither in the triton wheel nor on PATH")
    return found


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each function in the output of `cuobjdump -sass`."""
    functions, name = defaultdict(list), None
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*(\S+)\s*(.*?);", line):
            address, predicate, opcode, operands = match.groups()
            functions[name].append(
                Instruction(int(address, 16), predicate or "", opcode, operands.strip())
            )
    return dict(functions)


def disassemble(path: Path, capability: int) -> dict[str, list[Instruction]]:
    """The functions that `path`, a cubin or a library with several, has for sm_`capability`."""
    architecture = [] if path.suffix == ".cubin" else ["-arch", f"sm_{capability}"]
    command = [tool("cuobjdump"), "-sass", *architecture, str(path)]
    return parse_sass(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compile_triton(
    activation: Activation, direction: str, dtype: torch.dtype, capability: int, *, masked: bool
):
    """Compile a Triton kernel ahead of time, as a launch with aligned pointers would.

    Args:
        direction: "forward" or "backward".
        capability: 90 for sm_90.
        masked: forward writes a mask, backward reads one.

    Returns:
        Triton's compiled kernel, whose `asm` holds "ptx" and "cubin".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_act.backends import triton_activations, triton_kernels

    derivative = getattr(triton_activations, f"{activation.name}_derivative")
    element = f"*{TRITON_TYPES[dtype]}"
    common = {"numel": "i64", "parameters": ("fp32",) * len(activation.parameters)}
    if direction == "forward":
        kernel = triton_kernels.forward_kernel
        forward = getattr(triton_activations, f"{activation.name}_forward")
        signature = {"x_ptr": element, "y_ptr": element}
        signature |= {"mask_ptr": "*u8" if masked else "constexpr"} | common
        constants = {"FORWARD": forward, "DERIVATIVE": derivative}
        constants |= {} if masked else {"mask_ptr": None}
    else:
        kernel = triton_kernels.backward_kernel
        signature = {"grad_output_ptr": element, "saved_ptr": "*u8" if masked else element}
        signature |= {"grad_input_ptr": element} | common
        constants = {"DERIVATIVE": derivative, "FROM_MASK": masked}
    constants |= {"BLOCK_SIZE": triton_kernels.block_size(dtype)}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, type_ in enumerate(signature.values())
        if isinstance(type_, str) and type_.startswith("*")
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=triton_kernels.OPTIONS)


def triton_kernel(
    activation: Activation, direction: str, dtype: torch.dtype, capability: int, *, masked: bool
) -> Kernel:
    """The machine code of a Triton kernel; the arguments are those of `compile_triton`."""
    from fused_act.backends import triton_kernels

    compiled = compile_triton(activation, direction, dtype, capability, masked=masked)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        ((name, instructions),) = disassemble(path, capability).items()
    elements = triton_kernels.block_size(dtype) // (32 * triton_kernels.NUM_WARPS)
    return Kernel(f"triton {activation.name} {name}", instructions, elements)


def cuda_kernels(library: Path, capability: int) -> list[tuple[str, list[Instruction]]]:
    """Every kernel of the extension for sm_`capability`, with its C++ name."""
    functions = disassemble(library, capability)
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(functions), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return list(zip(demangled, functions.values()))


def cuda_kernel(
    kernels: list[tuple[str, list[Instruction]]],
    activation: Activation,
    direction: str,
    dtype: torch.dtype,
    *,
    masked: bool,
) -> Kernel:
    """The kernel with 16-byte accesses for `activation`, out of what `cuda_kernels` found."""
    itemsize = dtype.itemsize
    element = re.escape(CUDA_TYPES[dtype])
    pattern = (
        rf"{direction}_kernel<{16 // itemsize}, {str(masked).lower()}, "
        rf"fused_act::{activation.name.replace('_', '')}<{element}>"
    )
    ((name, instructions),) = (
        (name, instructions)
        for name, instructions in kernels
        if re.search(pattern, name, flags=re.IGNORECASE)
    )
    return Kernel(name, instructions, 32 // itemsize)


def cuda_ptx(library: Path) -> str:
    """The PTX that the extension carries for GPUs to come."""
    command = [tool("cuobjdump"), "-ptx", str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def block_index_uses(ptx: str) -> dict[str, list[str]]:
    """What each kernel of `ptx` does with its block index: the opcodes that take it, by kernel."""
    uses = {}
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        name = re.match(r"\w+", entry)[0]
        uses[name] = []
        for register in re.findall(r"mov\.u32\s+(%\w+), %ctaid\.x;", entry):
            uses[name] += re.findall(rf"^\s*(\S+)\s+%\w+,.*{register}\b", entry, flags=re.MULTILINE)
    return uses


def kernels() -> Iterator[tuple[Activation, str, bool]]:
    """(activation, direction, masked) of every kernel; relu6 has two forward kernels."""
    for activation in ACTIVATIONS:
        yield activation, "forward", False
        if activation.saves_mask:
            yield activation, "forward", True
        yield activation, "backward", activation.saves_mask


def rows(capability: int) -> Iterator[dict]:
    """The instructions of each kernel for sm_`capability`, in both backends."""
    extension_kernels = cuda_kernels(extension(), capability) if extension() else []
    for (activation, direction, masked), dtype in itertools.product(kernels(), TRITON_TYPES):
        found = {"triton": triton_kernel(activation, direction, dtype, capability, masked=masked)}
        if extension_kernels:
            found["cuda"] = cuda_kernel(
                extension_kernels, activation, direction, dtype, masked=masked
            )
        for backend, kernel in found.items():
            yield {
                "backend": backend,
                "activation": activation.name,
                "direction": f"{direction} with mask" if masked else direction,
                "dtype": str(dtype).removeprefix("torch."),
                "capability": capability,
                "instructions_per_element": kernel.instructions_per_element(),
                "loads": " ".join(map(str, kernel.accesses("LDG"))),
                "stores": " ".join(map(str, kernel.accesses("STG"))),
                "late_loads": kernel.late_loads(),
                "spills": kernel.spills(),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capability", type=int, default=90, help="90 for sm_90 (%(default)s)", metavar="N"
    )
    arguments = parser.parse_args()
    found = list(rows(arguments.capability))
    folder = environment.ROOT / "results" / "machine_code"
    environment.write_csv(folder / f"sm_{arguments.capability}.csv", found)
    print(
        environment.table(list(found[0]), [[str(cell) for cell in row.values()] for row in found])
    )


if __name__ == "__main__":
    main()
