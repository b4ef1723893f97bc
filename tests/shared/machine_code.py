"""What the compilers made of a kernel: the instructions that a full tile runs, no GPU needed.

Triton kernels are compiled ahead of time for a target; CUDA kernels are read out of a library: ours
out of the built extension, ATen's out of a libtorch_cuda.so. All go through cuobjdump, which comes
with the triton wheel and with the CUDA toolkit. Which kernels a row has is in kernels.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from tests.shared.facts import ALL, Facts

TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUDA_TYPES = {torch.float16: "c10::Half", torch.bfloat16: "c10::BFloat16", torch.float32: "float"}

# Threads of a block: as kThreads and kTileBytes of csrc/ and num_threads() of ATen say.
CUDA_THREADS, CUDA_TILE, ATEN_THREADS = 256, 4096, 128

# Bits: an access of fewer moves one element, or a few bytes of a mask.
WIDE = 64


class Unavailable(RuntimeError):
    """Machine code that cannot be had here; the message says what is missing."""


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

    @property
    def width(self) -> int | None:
        """Bits that a global access moves a thread, or None for other instructions."""
        opcode, *modifiers = self.opcode.split(".")
        if opcode not in ("LDG", "STG"):
            return None
        for modifier, bits in {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16}.items():
            if modifier in modifiers:
                return bits
        return 8 if "U8" in modifiers or "S8" in modifiers else 32

    @property
    def is_wide(self) -> bool:
        return self.width is not None and self.width >= WIDE


class Function(NamedTuple):
    """A kernel as cuobjdump shows it."""

    instructions: list[Instruction]
    registers: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel and what a thread of a full tile runs of it."""

    name: str
    instructions: list[Instruction]
    registers: int
    threads: int  # of a block
    dtype: torch.dtype

    @functools.cached_property
    def hot_path(self) -> list[Instruction]:
        """What a thread of a full tile runs.

        Of all paths to EXIT it is the one whose wide accesses move most, for those of the last tile
        are narrow; of several such, one that calls no function, for those are for rare operands;
        then the shortest. Loops are left out: only the last tile has some.
        """
        index = {one.address: position for position, one in enumerate(self.instructions)}
        best = {}  # by position: what the way from there is worth, and its next position
        for position in reversed(range(len(self.instructions))):
            one = self.instructions[position]
            if one.opcode == "EXIT" and not one.predicate:
                best[position] = (0, 0, -1), None
                continue
            following = {index.get(one.target)}
            if one.target is None or one.is_conditional:
                following.add(position + 1)
            # A target that is not in `best` lies before: a loop, or the padding after EXIT.
            ways = [(best[after][0], after) for after in following if after in best]
            if ways:
                (bits, calls, length), after = max(ways)
                bits += one.width if one.is_wide else 0
                calls -= one.opcode.startswith("CALL")
                best[position] = (bits, calls, length - 1), after
        if 0 not in best or best[0][0][0] == 0:
            raise ValueError(f"{self.name}: no path to EXIT has a wide access")
        path, position = [], 0
        while position is not None:
            path.append(self.instructions[position])
            position = best[position][1]
        return path

    @property
    def elements_per_thread(self) -> int:
        return sum(filter(WIDE.__le__, self.accesses("STG"))) // (8 * self.dtype.itemsize)

    def per_element(self, opcode: str = "") -> float:
        """Instructions on the hot path whose opcode begins so, for one element."""
        count = sum(one.opcode.startswith(opcode) for one in self.hot_path)
        return count / self.elements_per_thread

    def accesses(self, opcode: str) -> list[int]:
        """Widths in bits of the global loads (`LDG`) or stores (`STG`) on the hot path."""
        return [one.width for one in self.hot_path if one.opcode.split(".")[0] == opcode]

    def loads_in_flight(self) -> list[int]:
        """Widths of the wide loads that a thread has under way before it uses a loaded value."""
        widths, loaded = [], set()
        for one in self.hot_path:
            if one.opcode.startswith("LDG"):
                # `LDG.E.ENL2.256 R12, R8, desc[UR4][R2.64]` fills two times four registers.
                targets = re.findall(r"\bR(\d+)", one.operands.partition("[")[0])
                length = max(1, one.width // 32 // len(targets))
                for first in map(int, targets):
                    loaded |= set(range(first, first + length))
                if one.is_wide:
                    widths.append(one.width)
            else:
                sources = one.operands.partition(",")[2]
                if loaded & set(map(int, re.findall(r"\bR(\d+)", sources))):
                    break
        return widths

    def spills(self) -> int:
        """Accesses on the hot path to local memory, where spilled registers go."""
        return sum(one.opcode.split(".")[0] in ("LDL", "STL") for one in self.hot_path)


def run(name: str, *arguments: str, text: str | None = None) -> str:
    """What a tool of the triton wheel, or else on PATH, prints."""
    try:
        import triton
    except ImportError:
        bundled = None
    else:
        bundled = shutil.which(name, path=Path(triton.__file__).parent / "backends/nvidia/bin")
    command = bundled or shutil.which(name)
    if command is None:
        raise Unavailable(f"{name} is neither in the triton wheel nor on PATH")
    done = subprocess.run([command, *arguments], input=text, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(lines[-1] if lines else f"{name} fails ({done.returncode})")
    return done.stdout


def parse_sass(text: str) -> dict[str, Function]:
    """Each function in the output of `cuobjdump -sass -res-usage`."""
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", text))
    functions, name = defaultdict(list), None
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*(\S+)\s*(.*?);", line):
            address, predicate, opcode, operands = match.groups()
            functions[name].append(
                Instruction(int(address, 16), predicate or "", opcode, operands.strip())
            )
    return {name: Function(code, int(registers[name])) for name, code in functions.items()}


def disassemble(path: Path, *options: str) -> dict[str, Function]:
    """The functions of `path`: a cubin, or a library with several."""
    return parse_sass(run("cuobjdump", "-sass", "-res-usage", *options, str(path)))


def demangle(names: Iterable[str]) -> list[str]:
    return run("c++filt", text="\n".join(names)).splitlines()


def compile_ahead(
    kernel,
    signature: dict[str, object],
    constants: dict[str, object],
    capability: int,
    options: dict[str, int],
    divisible: tuple[str, ...] = (),
):
    """Compile a Triton kernel ahead of time, as a launch with aligned pointers would.

    Args:
        signature, constants: types and values of its arguments, in any order.
        capability: 90 for sm_90.
        options: those of the launch.
        divisible: integers that 16 divides.

    Returns:
        Triton's compiled kernel, whose `asm` holds "ptx" and "cubin".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, type_) in enumerate(signature.items())
        if name in divisible or (isinstance(type_, str) and type_.startswith("*"))
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def code_of(compiled, name: str, dtype: torch.dtype) -> Kernel:
    """The machine code of a Triton kernel of the activation `name`."""
    from fused_act.backends.triton import tiles

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        ((kernel, function),) = disassemble(path).items()
    return Kernel(f"triton {name} {kernel}", *function, 32 * tiles.NUM_WARPS, dtype)


def cuda_kernels(library: Path, capability: int) -> dict[str, Function]:
    """Every kernel of the extension for sm_`capability`, by its C++ name."""
    functions = disassemble(library, "-arch", f"sm_{capability}")
    if not functions:
        raise Unavailable(f"{library} has no code for sm_{capability}")
    return dict(zip(demangle(functions), functions.values()))


def aten_kernels(library: Path, capability: int) -> dict[str, Function]:
    """ATen's vectorized kernels of the activations, by C++ name, out of a libtorch_cuda.so.

    A library without code for sm_89 has some for sm_86 or sm_80, which is what such a GPU runs.
    """
    kernels = "|".join(itertools.chain(*(facts.aten_symbols or () for facts in ALL)))
    elements = r"N\w+4HalfE|N\w+8BFloat16E|f"
    pattern = rf"(_Z\S+vectorized_elementwise_kernel\S+\d(?:{kernels})E\S+EUl(?:{elements})\S+):"
    held = {
        int(number)
        for number in re.findall(r"\.sm_(\d+)\.", run("cuobjdump", "-lelf", str(library)))
    }
    for older in sorted(held & set(range(capability // 10 * 10, capability + 1)), reverse=True):
        architecture = ["-arch", f"sm_{older}"]
        listed = run("cuobjdump", "-res-usage", *architecture, str(library))
        if names := set(re.findall(pattern, listed)):
            # By name: the library holds thousands of others.
            functions = disassemble(library, *architecture, "-fun", ",".join(names))
            return dict(zip(demangle(functions), functions.values()))
    raise Unavailable(f"{library} has none of ATen's activations for sm_{capability}")


def aten_kernel(
    kernels: dict[str, Function], facts: Facts, direction: str, dtype: torch.dtype
) -> Kernel:
    """The kernel that ATen launches for aligned tensors, out of what `aten_kernels` found."""
    forward, backward = facts.aten_symbols
    lambda_of = forward if direction == "forward" else backward
    element = re.escape(CUDA_TYPES[dtype])
    # For 16 bytes, which makes no accesses but on sm_90 and sm_100; elsewhere ATen takes the other.
    for width in (16 // dtype.itemsize, 4):
        pattern = rf"_kernel<{width}, .*::{lambda_of}\(.*\{{lambda\({element}[,)]"
        ((name, function),) = (
            (name, function) for name, function in kernels.items() if re.search(pattern, name)
        )
        if any(one.is_wide for one in function.instructions):
            return Kernel(name, *function, ATEN_THREADS, dtype)
    raise ValueError(f"{name}: no wide access")


def cuda_ptx(library: Path) -> str:
    """The PTX that the extension carries for GPUs to come."""
    return run("cuobjdump", "-ptx", str(library))


def block_index_uses(ptx: str) -> dict[str, list[str]]:
    """What each kernel of `ptx` does with its block index: the opcodes that take it, by kernel."""
    uses = {}
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        name = re.match(r"\w+", entry)[0]
        uses[name] = []
        for register in re.findall(r"mov\.u32\s+(%\w+), %ctaid\.x;", entry):
            uses[name] += re.findall(rf"^\s*(\S+)\s+%\w+,.*{register}\b", entry, flags=re.MULTILINE)
    return uses
