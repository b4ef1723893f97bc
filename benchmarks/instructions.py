"""Instructions, registers and accesses of every kernel, and the share of memory speed they allow.

    python -m benchmarks instructions [--capabilities 90 100] [--libtorch-cuda PATH]

All is read in machine code; no GPU is needed. Ours are the Triton kernels, compiled ahead of time,
and those of the built extension; ATen's come out of the libtorch_cuda.so of a CUDA build of torch.

The share is predicted. While memory moves the bytes of one element, `bytes / bandwidth` seconds,
each of an SM's four schedulers can issue one instruction a clock for 32 threads, and the SM can
start 16 special functions (MUFU). So an element may take

    budget = 128 * SMs * clock * bytes / bandwidth

instructions, an eighth of them MUFU: on an H200 31 for 4 bytes, 47 for 6. A kernel that takes fewer
is predicted to run as fast as a copy of its bytes, one that takes more at budget / instructions of
that. Latency is not in this: other warps hide it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import environment, options
from fused_act import __version__
from fused_act.backends.cuda import REBUILD, extension
from tests.shared import kernels, machine_code
from tests.shared.facts import FACTS
from tests.shared.kernels import Variant
from tests.shared.machine_code import Kernel, Unavailable


class GPU(NamedTuple):
    """What the prediction takes of a GPU; `warps` is how many an SM holds."""

    name: str
    bandwidth: float
    sms: int
    clock: float
    warps: int


# By capability. Bandwidths are what a copy reaches: measured on an H200 it is nine tenths of the
# data sheet's, and the others are taken to be alike. Clocks are boost clocks.
GPUS = {
    80: GPU("A100", 0.9 * 2.039e12, 108, 1.41e9, 64),
    86: GPU("RTX 3090", 0.9 * 0.936e12, 82, 1.695e9, 48),
    89: GPU("RTX 4090", 0.9 * 1.008e12, 128, 2.52e9, 48),
    90: GPU("H200", 4.3e12, 132, 1.98e9, 64),
    100: GPU("B200", 0.9 * 8e12, 148, 1.965e9, 64),
    120: GPU("RTX 5090", 0.9 * 1.792e12, 170, 2.407e9, 48),
}
SCHEDULERS, WARP = 4, 32
MUFU_PER_CLOCK = 16
REGISTERS_PER_SCHEDULER = 2**14


def warps_per_sm(kernel: Kernel, gpu: GPU) -> int:
    """Warps that an SM holds, as far as the kernel's registers let it."""
    registers = -(-kernel.registers // 8) * 8 * WARP  # of a warp; they are given out by eights
    warps = min(gpu.warps, SCHEDULERS * (REGISTERS_PER_SCHEDULER // registers))
    return warps - warps % (kernel.threads // WARP)  # whole blocks


# Those of a matrix whose columns have the weights are much like those whose rows have them.
VARIANTS = [
    (variant, dtype)
    for variant, dtype in itertools.product(kernels.VARIANTS, machine_code.CUDA_TYPES)
    if not variant.by_column
]
Found = Iterator[tuple[Variant, torch.dtype, Kernel]]


def bytes_per_element(variant: Variant, dtype: torch.dtype) -> float:
    """What one element of x moves, or of its gradient."""
    mask = FACTS[variant.row.name].widens / 8 if variant.masked else 0
    return dtype.itemsize * (variant.inputs + variant.outputs) + mask


def triton_kernels(capability: int) -> Found:
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed; install it with `pip install triton`")
    for variant, dtype in VARIANTS:
        yield variant, dtype, kernels.triton_kernel(variant, dtype, capability)


def cuda_kernels(capability: int) -> Found:
    if extension() is None:
        raise Unavailable(f"this install has no CUDA extension; where nvcc is, {REBUILD}")
    functions = machine_code.cuda_kernels(extension(), capability)
    for variant, dtype in VARIANTS:
        yield variant, dtype, kernels.cuda_kernel(functions, variant, dtype, capability)


def aten_kernels(library: Path, capability: int) -> Found:
    functions = machine_code.aten_kernels(library, capability)
    plain = ((variant._replace(masked=False), dtype) for variant, dtype in VARIANTS)
    for variant, dtype in dict.fromkeys(plain):
        facts = FACTS[variant.row.name]
        if facts.aten_symbols is not None:
            kernel = machine_code.aten_kernel(functions, facts, variant.direction, dtype)
            yield variant, dtype, kernel


def torch_version(library: Path) -> str:
    """The version of the torch that a libtorch_cuda.so lies in, or "" where no version.py tells."""
    path = library.parent.parent / "version.py"
    text = path.read_text() if path.exists() else ""
    match = re.search(r"__version__ = '(.+)'", text)
    return match[1] if match else ""


def row(
    provider: str,
    version: str,
    capability: int,
    gpu: GPU,
    variant: Variant,
    dtype: torch.dtype,
    kernel: Kernel,
) -> dict:
    bytes_ = bytes_per_element(variant, dtype)
    budget = WARP * SCHEDULERS * gpu.sms * gpu.clock * bytes_ / gpu.bandwidth
    mufu_budget = budget * MUFU_PER_CLOCK / (WARP * SCHEDULERS)
    instructions = variant.outputs * kernel.per_element()
    mufu = variant.outputs * kernel.per_element("MUFU")
    warps = warps_per_sm(kernel, gpu)
    in_flight = sum(kernel.loads_in_flight()) // 8
    return {
        "capability": capability,
        "provider": provider,
        "version": version,
        "activation": variant.row.name,
        "direction": f"{variant.direction} with mask" if variant.masked else variant.direction,
        "dtype": str(dtype).removeprefix("torch."),
        "instructions_per_element": instructions,
        "mufu_per_element": mufu,
        "loads": " ".join(map(str, kernel.accesses("LDG"))),
        "stores": " ".join(map(str, kernel.accesses("STG"))),
        "bytes_in_flight_per_thread_and_input": in_flight // variant.inputs,
        "registers": kernel.registers,
        "spills": kernel.spills(),
        "warps_per_sm": warps,
        "kib_in_flight_per_sm": in_flight * WARP * warps / 1024,
        "bytes_per_element": bytes_,
        "gpu_of_budget": gpu.name,
        "bandwidth": gpu.bandwidth,
        "sms": gpu.sms,
        "clock": gpu.clock,
        "budget": budget,
        "predicted_share": min(1.0, budget / instructions, mufu_budget / mufu if mufu else 1.0),
    }


COLUMNS = (
    "kernel",
    "provider",
    "instructions",
    "MUFU",
    "loads, bits",
    "stores, bits",
    "registers",
    "spills",
    "warps",
    "bytes in flight",
    "KiB of an SM",
    "budget",
    "predicted share",
)


def cells(found: dict) -> tuple[str, ...]:
    return (
        f"{found['activation']} {found['direction']}, {found['dtype']}",
        found["provider"],
        f"{found['instructions_per_element']:.1f}",
        f"{found['mufu_per_element']:.1f}",
        found["loads"],
        found["stores"],
        str(found["registers"]),
        str(found["spills"]),
        str(found["warps_per_sm"]),
        str(found["bytes_in_flight_per_thread_and_input"]),
        f"{found['kib_in_flight_per_sm']:.0f}",
        f"{found['budget']:.0f}",
        f"{found['predicted_share']:.2f}",
    )


def print_results(rows: list[dict], gpus: dict[int, GPU]) -> None:
    kernel = itemgetter("activation", "direction", "dtype")
    order = list(dict.fromkeys(map(kernel, rows)))
    for capability, gpu in gpus.items():
        found = [row for row in rows if row["capability"] == capability]
        if found:
            found.sort(key=lambda row: order.index(kernel(row)))  # providers under each other
            print(
                f"\nsm_{capability}, for an element; budget and share of {gpu.name}: {gpu.sms} SMs "
                f"at {gpu.clock / 1e9:.2f} GHz, {gpu.bandwidth / 1e12:.2f} TB/s (predicted)\n"
            )
            print(environment.table(COLUMNS, map(cells, found)))


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--capabilities",
        type=int,
        nargs="+",
        choices=GPUS,
        default=list(GPUS),
        metavar="N",
        help="90 for sm_90; default: %(default)s",
    )
    parser.add_argument(
        "--libtorch-cuda",
        type=Path,
        metavar="PATH",
        help="libtorch_cuda.so of a CUDA build of torch: counts ATen's kernels, too",
    )
    # What is given holds for all capabilities.
    parser.add_argument("--bandwidth", type=positive, metavar="BYTES", help="per second, of a copy")
    parser.add_argument("--sms", type=options.count, metavar="N", help="SMs of the GPU")
    parser.add_argument("--clock", type=positive, metavar="HZ", help="of the SMs")
    options.add_results(parser, "machine_code")


def find_rows(providers: dict, gpus: dict[int, GPU], problems: list[str]) -> Iterator[dict]:
    """The rows of what there is; what is missing is added to `problems`."""
    work = list(itertools.product(providers.items(), gpus.items()))
    for (provider, (version, find)), (capability, gpu) in environment.progress(work, len(work)):
        try:
            for found in find(capability):
                yield row(provider, version, capability, gpu, *found)
        except Unavailable as error:
            problems.append(f"{provider}: {error}")


def main(arguments: argparse.Namespace) -> list[dict]:
    given = {name: getattr(arguments, name) for name in ("bandwidth", "sms", "clock")}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        given["name"] = "a GPU as given"
    gpus = {capability: GPUS[capability]._replace(**given) for capability in arguments.capabilities}
    files = {
        "ours": {
            "triton": (environment.installed_version("triton"), triton_kernels),
            "cuda": (__version__, cuda_kernels),
        }
    }
    if library := arguments.libtorch_cuda:
        aten = functools.partial(aten_kernels, library)
        files["aten"] = {"aten": (torch_version(library), aten)}
    environment.print_environment()
    rows, problems = [], []
    for name, providers in files.items():
        found = find_rows(providers, gpus, problems)
        rows += environment.write_csv(arguments.results / f"{name}.csv", found)
    print_results(rows, gpus)
    for problem in dict.fromkeys(problems):
        print(f"instructions: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)
    return rows
