"""What an NVIDIA H200 measured, as tables and sentences of README.md and the pages behind it.

Every figure comes out of a file under benchmarks/results/nvidia-h200. What is quoted of speed.csv
is what `benchmarks.speed_results.quotable` lets through.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from benchmarks.environment import read_csv
from benchmarks.networks import TRAINING, BesideTorch, beside_torch, read

H200 = Path(__file__).parent.parent / "benchmarks" / "results" / "nvidia-h200"
BEFORE = H200 / "91e1619"
COMMIT = "f6fece5"  # whose kernels speed.csv and kernels_alone.csv are of
ACTIVATIONS = {"mish": "Mish", "swish": "Swish", "relu6": "ReLU6"}
LARGE, LARGEST = 2**28, 2**31  # bytes of a tensor
DIRECTIONS = ("forward", "backward")
KERNELS = {"Triton": "triton", "CUDA C++": "cuda", "ATen": "aten"}


def table(header: tuple, lines: list[tuple]) -> str:
    from tabulate import tabulate

    return tabulate(lines, header, "github", disable_numparse=True)


def percent(share: float) -> str:
    return f"{100 * share:.0f}"


def speed(api: str, size: int) -> dict[tuple[str, ...], dict]:
    """Rows of contiguous tensors of so many bytes, by activation, dtype, direction, provider.

    `make gpu-edges` writes those of the largest tensors into a file of their own.
    """
    from benchmarks.plot import tensor_bytes
    from benchmarks.speed_results import quotable

    return {
        tuple(row[key] for key in ("activation", "dtype", "direction", "provider")): row
        for path in (H200 / "speed.csv", H200 / "speed_edges.csv")
        if path.exists()
        for row in read_csv(path)
        if quotable(row)
        and (row["api"], row["layout"]) == (api, "contiguous")
        and tensor_bytes(row) == size
    }


def summary() -> str:
    """What was gained and what was lost, in sentences."""
    kernels, ratios = speed("kernel", LARGE), network_ratios()

    def ratio(activation: str, direction: str, provider: str = "cuda") -> str:
        case = activation, "bf16", direction
        ours, theirs = (float(kernels[(*case, by)]["median"]) for by in (provider, "aten"))
        return f"{ours / theirs:.2f}"

    of_copy = [
        float(row["share_of_copy"])
        for (_, _, direction, provider), row in kernels.items()
        if provider in ("cuda", "triton") and direction in DIRECTIONS
    ]
    fused = {net: ratios[net, "fused"] for net in NETWORKS if (net, "fused") in ratios}
    lost = {net: each for net, each in fused.items() if each.time > 1}
    costs = json.loads((BEFORE / "overhead.json").read_text())

    def cost(provider: str) -> str:
        """Times torch's, of all three activations."""
        found = [
            costs[f"{provider} {name} fwd+bwd"] / costs[f"torch {name} fwd+bwd"]
            for name in ("mish", "silu", "relu6")
        ]
        return f"{min(found):.1f} to {max(found):.1f}"

    instructions = {
        (row["provider"], row["direction"]): row
        for path in ("aten.csv", "ours.csv")
        for row in read_csv(H200.parent / "machine_code" / path)
        if (row["activation"], row["dtype"], row["capability"]) == ("mish", "bfloat16", "90")
    }

    def count(provider: str, column: str = "instructions_per_element") -> str:
        counts = (instructions[provider, direction][column] for direction in DIRECTIONS)
        return " and ".join(f"{float(each):.0f}" for each in counts)

    row = kernels["mish", "bf16", "forward", "cuda"]
    machine = f"{row['gpu']} (driver {row['driver']}, torch {row['torch']}, Triton {row['triton']}"
    mobilenet = fused["mobilenet_v2 relu6"]
    paragraphs = (
        f"**Why.** Mish in PyTorch takes {count('aten')} instructions for an element of a 16-bit "
        f"tensor, forward and backward; the memory of an H200 leaves time for "
        f"{count('cuda', 'budget')}. Ours takes {count('cuda')}. ReLU6 in PyTorch saves its whole "
        "input for backward, even in place; one bit an element is enough.",
        f"**Measured** on one {machine}, {row['date'][:10]}, commit {COMMIT}), in tensors of "
        f"{LARGE // 2**20} MiB: all three run at {percent(min(of_copy))} to "
        f"{percent(max(of_copy))} % of the speed of a copy of the same bytes, in Triton and in "
        f"CUDA C++. In bf16 Mish takes {ratio('mish', 'forward')} of the time of ATen's forward "
        f"and {ratio('mish', 'backward')} backward, Swish {ratio('swish', 'forward')} and "
        f"{ratio('swish', 'backward')}, ReLU6 backward {ratio('relu6', 'backward')}. Through "
        f"autograd, in tensors of {LARGEST // 2**30} GiB, Mish reaches {public_shares('cuda')} % "
        "of a copy forward and backward, what `torch.compile` makes of torch's own "
        f"{public_shares('compile(aten)')} %, the formula as papers write it "
        f"{public_shares('naive')} %. MobileNetV2 with ReLU6 and batches of 256 trains in "
        f"{mobilenet.time:.2f} of the time and {mobilenet.memory:.2f} of the memory.",
        f"**And lost.** {slower(lost)}A call "
        f"with its backward costs the host {cost('cuda')} times what torch's own costs it, in "
        f"Triton {cost('triton')} times, so small tensors take longer, unless a CUDA graph leaves "
        "the host out. ReLU6 forward, which writes its bits too, takes "
        f"{ratio('relu6', 'forward')} times ATen's time in bf16. These calls went through Python. "
        "Since then a host extension in C++ makes them, and a call costs what torch's own op "
        "costs: measured on a CPU, and not yet on a GPU. Other GPUs have not been measured: what "
        "is said of them is predicted.",
    )
    return "\n\n".join(textwrap.fill(each, 110, break_on_hyphens=False) for each in paragraphs)


def slower(lost: dict[str, BesideTorch]) -> str:
    """The networks that lost time, in a sentence; nothing where there are none."""
    if not lost:
        return ""
    medians, least = [each.time for each in lost.values()], [each.least for each in lost.values()]
    return (
        "A network that waits for the host trains slower than before: in "
        f"{min(medians):.2f} to {max(medians):.2f} times torch's time by the median step, "
        f"{min(least):.2f} to {max(least):.2f} by the fastest "
        f"({'; '.join(NETWORKS[net] for net in lost)}). "
    )


def large() -> str:
    """Speed of the kernels as a share of a copy of the same bytes, and their time beside ATen's."""
    found = speed("kernel", LARGE)

    def share(*case: str) -> float:
        return float(found[case]["share_of_copy"])

    def ratio(activation: str, dtype: str, direction: str) -> float:
        ours, theirs = (found[activation, dtype, direction, by] for by in ("cuda", "aten"))
        return float(ours["median"]) / float(theirs["median"])

    lines = []
    for activation, name in ACTIVATIONS.items():
        for dtype in ("bf16", "fp16", "fp32"):
            cells = [
                " / ".join(percent(share(activation, dtype, each, by)) for each in DIRECTIONS)
                for by in KERNELS.values()
            ]
            ratios = " / ".join(f"{ratio(activation, dtype, each):.2f}" for each in DIRECTIONS)
            lines.append((f"{name}, {dtype}", *cells, ratios))
    return table(("forward / backward", *KERNELS, "time, CUDA C++ to ATen"), lines)


def public_shares(provider: str, activation: str = "mish", between: str = " and ") -> str:
    """Of the largest bf16 tensors: a copy's time as a share, forward and backward, in percent."""
    found = speed("public", LARGEST)
    rows = (found[activation, "bf16", direction, provider] for direction in DIRECTIONS)
    return between.join(percent(float(row["share_of_copy"])) for row in rows)


def alternatives() -> str:
    """All that a user could pick, through autograd, in time beside a copy of the same bytes."""
    providers = ("triton", "cuda", "compile(fused_act)", "aten", "compile(aten)", "naive")

    lines = [
        (name, *(public_shares(by, activation, " / ") for by in providers))
        for activation, name in ACTIVATIONS.items()
    ]
    return table(("forward / backward", *providers), lines)


NETWORKS = {
    "mobilenet_v2 relu6": "MobileNetV2, ReLU6, batch 256",
    "mobilenet_v2 bs8": "MobileNetV2, ReLU6, batch 8",
    "resnet50 mish": "ResNet50 with Mish, batch 128",
    "csp mish": "CSP network with Mish, batch 128",
    "cspdarknet53 mish": "CSPDarknet53 with Mish, batch 64",
    "efficientnet_b0 silu": "EfficientNet-B0, SiLU, batch 128",
    "llama 4x2048 silu": "Llama, 4 layers of 2048, SiLU",
}
MODES = {
    "fused": "`replace_activations`",
    "fused triton": "with Triton",
    "fused remat": "+ `rematerialize()`",
    "fused remat norm": "… `(norm=True)`",
    "checkpoint": "torch, checkpoints",
}


def network_ratios(
    paths: tuple[Path, ...] = (BEFORE / "networks.csv", H200 / "networks.csv"),
) -> dict[tuple[str, str], BesideTorch]:
    """Training steps beside torch's in the same file, by network and mode: the newest there are.

    Args:
        paths: the files, the newest last.
    """
    found = {}
    for path in paths:
        found |= {
            (net, mode): ratios
            for (net, direction, mode), ratios in beside_torch(read(path)).items()
            if direction == TRAINING and mode != "torch"
        }
    return found


def networks() -> str:
    """Training steps of whole networks beside torch's own: time, and memory of a step."""
    found = network_ratios()

    def cell(net: str, mode: str) -> str:
        if (net, mode) not in found:
            return ""
        ratios = found[net, mode]
        return f"{ratios.time:.2f} ({ratios.least:.2f}), {ratios.memory:.2f}"

    nets = [net for net in NETWORKS if any((net, mode) in found for mode in MODES)]
    modes = [mode for mode in MODES if any((net, mode) in found for net in nets)]
    lines = [(NETWORKS[net], *(cell(net, mode) for mode in modes)) for net in nets]
    return table(("time (least), memory", *(MODES[mode] for mode in modes)), lines)


def host() -> str:
    """What one call costs the host, of 4,096 elements, in microseconds."""
    found = json.loads((BEFORE / "overhead.json").read_text())
    kinds = {"no grad": "nograd", "forward": "grad fwd", "forward and backward": "fwd+bwd"}
    torch_names = {"mish": "mish", "swish": "silu", "relu6": "relu6"}
    lines = [
        (
            f"{name}, {kind}",
            *(
                f"{found[f'{by} {torch_names[each]} {key}']:.0f}"
                for by in ("torch", "cuda", "triton")
            ),
        )
        for each, name in ACTIVATIONS.items()
        for kind, key in kinds.items()
    ]
    return table(("µs a call", "torch", "CUDA C++", "Triton"), lines)


def small() -> dict[tuple[str, int], dict[str, float]]:
    """Microseconds of a kernel alone, by op and log2 of the size, then by provider."""
    found = {}
    for row in read_csv(H200 / "kernels_alone.csv"):
        if row["section"] == "small":
            op, _, size = row["op"].partition(" 2^")
            found.setdefault((op, int(size)), {})[row["provider"]] = 1000 * float(row["ms"])
    return found


# Forward writes a mask, in training.
MASKED = {("relu6", "triton"), ("relu6", "cuda")}


def small_tensors() -> str:
    """Kernels alone, 200 in a CUDA graph."""
    found = small()
    sizes = sorted({size for _, size in found})
    lines = []
    for activation, name in ACTIVATIONS.items():
        for title, by in KERNELS.items():
            forward = f"{activation}_f" + ("m" if (activation, by) in MASKED else "")
            cells = [
                " / ".join(f"{found[op, size][by]:.2f}" for op in (forward, f"{activation}_b"))
                for size in sizes
            ]
            lines.append((f"{name}, {title}", *cells))
    return table(("µs, forward / backward", *(f"2^{size}" for size in sizes)), lines)


MATRIX = {"prelu": "PReLU", "learnable_swish": "Swish, learnable", "crelu": "CReLU"}


def weighted_and_mirrored() -> str:
    """GB/s of what has to be moved, as a share of a copy's or of an addition's."""
    found = {
        (row["op"], row["dtype"], row["provider"]): float(row["gbps"])
        for row in read_csv(H200 / "kernels_alone.csv")
        if row["section"] == "matrix"
    }

    def cell(name: str, layout: str, dtype: str, provider: str) -> str:
        forward = f"{name}_{layout}_f" + ("m" if name == "crelu" and provider != "naive" else "")
        ops = [forward, f"{name}_{layout}_b"]
        shares = [
            percent(found[op, dtype, provider] / found[op, dtype, "copy"])
            for op in ops
            if (op, dtype, provider) in found
        ]
        return " / ".join(shares)

    layouts = {"row": "contiguous", "col": "channels_last"}
    lines = [
        (
            f"{title}, {layout_title}, {dtype_title}",
            *(cell(name, layout, dtype, by) for by in ("triton", "cuda", "aten", "naive")),
        )
        for name, title in MATRIX.items()
        for layout, layout_title in layouts.items()
        for dtype, dtype_title in (("bfloat16", "bf16"), ("float32", "fp32"))
    ]
    return table(("forward / backward", "Triton", "CUDA C++", "ATen", "naive"), lines)


def accuracy() -> str:
    """The largest errors on the GPU, in ULP of the true value."""
    found = json.loads((BEFORE / "accuracy.json").read_text())
    kinds = {"mish": "Mish", "silu": "Swish", "relu6": "ReLU6"}
    providers = {"torch": "torch", "CUDA C++": "cuda", "Triton": "triton"}
    lines = [
        (
            f"{title}, {dtype}",
            *(
                " / ".join(f"{error:.3g}" for error in found[f"{name} {dtype} {by}"][:2])
                for by in providers.values()
            ),
        )
        for name, title in kinds.items()
        for dtype in ("float16", "bfloat16", "float32")
    ]
    return table(("forward / derivative", *providers), lines)


def variants(
    paths: list[str], names: dict[str, str], ops: dict[str, str], relative: bool = True
) -> str:
    """The speed of each variant of the kernels, in each run that has it.

    Args:
        paths: a file for each run.
        names: what the files call a variant, or `cuda_3:base` for that of one run, and the title.
        ops: title, and op and dtype.
        relative: in % of torch's copy, or addition, in the same run; else in GB/s.
    """
    rows = {}
    for path in paths:
        found = read_csv(H200 / path)
        copies = {
            (row["op"], row["dtype"]): float(row["gbps"])
            for row in found
            if row["variant"] == "COPY"
        }
        for row in found:
            kernel = row["op"], row["dtype"]
            scale = 100 / copies[kernel] if relative else 1.0
            for name in (row["variant"], f"{Path(path).stem}:{row['variant']}"):
                rows.setdefault((name, *kernel), []).append(scale * float(row["gbps"]))
    digits = ".1f" if relative else ",.0f"
    lines = [
        (
            title,
            *(
                ", ".join(f"{each:{digits}}" for each in rows.get((name, *op.split()), []))
                for op in ops.values()
            ),
        )
        for name, title in names.items()
    ]
    return table(("% of a copy" if relative else "GB/s", *ops), lines)


ELEMENTWISE = {
    "Mish bf16": "mish_f bfloat16",
    "backward": "mish_b bfloat16",
    "Swish bf16": "swish_f bfloat16",
    "backward ": "swish_b bfloat16",
    "ReLU6 fp32, mask": "relu6_fm float32",
    "backward  ": "relu6_bm float32",
}


def first_variants() -> str:
    """Those around the kernels of 91e1619."""
    names = {
        "base": "as built: 256 threads x 32 bytes, ordered loads, 40 registers backward",
        "plain_r40": "plain loads",
        "plain_r48": "plain loads, 48 registers",
        "plain_r64": "plain loads, 64 registers",
        "relax_r32": "ordered loads, 32 registers",
        "t128": "128 threads",
        "t512": "512 threads",
        "t256_b64": "64 bytes a thread",
        "t128_b128": "128 threads x 128 bytes",
        "t256_b16": "16 bytes a thread",
        "t256_b16_plain": "16 bytes a thread, plain loads",
        "b16_r32": "16 bytes a thread, 32 registers",
        "t128_b16": "128 threads x 16 bytes",
        "t512_b16": "512 threads x 16 bytes",
        "ld_cs": "`ld.cs`",
        "ld_na": "`ld.L1::no_allocate`",
        "ld_nc": "`ld.nc`",
        "ld_ef": "`ld` with `evict_first`",
        "st_cs": "`st.cs`",
        "tma8192_s1": "bulk copies in and out, tiles of 8 KiB",
        "ATEN": "ATen",
    }
    return variants(["91e1619/cuda_variants.csv"], names, ELEMENTWISE, relative=False)


def second_variants() -> str:
    """Those around 256 threads x 16 bytes, in up to three runs."""
    first = {
        "old": "version 1",
        "b32": "two accesses a thread",
        "t128": "128 threads",
        "t512": "512 threads",
        "w32_t128": "128 threads, two accesses each",
        "cuda_1:base": "256 threads x 16 bytes",
        "blocks8": "compiled for 8 blocks an SM",
        "blocks7": "compiled for 7 backward",
        "blocks6": "compiled for 6",
        "cuda_3:base": "compiled for 6 backward: version 2",
        "blocks5": "compiled for 5 backward",
        "blocks4": "compiled for 4 backward",
        "smem7": "limited to 7 blocks an SM by shared memory",
        "smem6": "limited to 6 by shared memory",
        "smem5": "limited to 5 by shared memory",
    }
    paths = [f"variants/cuda_{run}.csv" for run in (1, 2, 3)]
    return variants(paths, first, ELEMENTWISE)


def triton_variants() -> str:
    """Those of the elementwise Triton kernels: of 91e1619, then without volatile loads."""
    ops = {
        "Mish bf16": "mish_f bfloat16",
        "backward": "mish_b bfloat16",
        "Swish bf16": "swish_f bfloat16",
        "backward ": "swish_b bfloat16",
    }
    names = {
        "triton_variants:base": "version 1: 4 warps x 32 bytes, 40 registers",
        "r32": "version 1, 32 registers",
        "r64": "version 1, 64 registers",
        "b64": "version 1, 64 bytes a thread, 64 registers",
        "plain": "plain loads",
        "triton_1:base": "plain loads, version 2",
        "plain_r48": "plain loads, 48 registers",
        "r48": "version 2, 48 registers",
        "plain_r64": "plain loads, 64 registers",
        "plain_none": "plain loads, no ceiling",
        "none": "version 2, no ceiling",
        "triton_1:w2": "version 2, 2 warps",
        "triton_1:w8": "version 2, 8 warps",
        "w8_b16": "version 2, 8 warps x 16 bytes",
    }
    return variants(["91e1619/triton_variants.csv", "variants/triton_1.csv"], names, ops)


WEIGHTED = {
    f"{title} {direction}, {layout_title}": f"{name}_{layout}_{direction[0]} bfloat16"
    for name, title in (("prelu", "PReLU"), ("lswish", "Swish"))
    for layout, layout_title in (("row", "rows"), ("col", "columns"))
    for direction in DIRECTIONS
}


def weighted_variants() -> str:
    """CUDA C++: bytes of a thread and blocks an SM that a kernel is compiled for."""
    names = {
        "old": "32 bytes, 3 (80 registers): version 1",
        "weighted_b16": "16 bytes, 3",
        "weighted_b32_2": "32 bytes, 2",
        "weighted_b32_4": "32 bytes, 4",
        "weighted_b64": "64 bytes, 3",
        "weighted_b64_2": "64 bytes, 2",
        "weighted_b64_4": "64 bytes, 4 (64 registers)",
        "weighted_f4": "64 bytes, 4, forward too: version 2",
        "weighted_f5": "64 bytes, 5, forward too",
        "weighted_b128_2": "128 bytes, 2",
        "weighted_t128_b64": "128 threads x 64 bytes, 6",
        "ATEN": "ATen",
    }
    paths = [f"variants/cuda_{run}.csv" for run in (1, 2, 3)]
    return variants(paths, names, WEIGHTED)


def mirrored_variants() -> str:
    names = {
        "old": "runs of 8 elements, two of 16 bits a thread",
        "mirrored_b16": "one run of 8 elements a thread",
        "cuda_2:base": "one access of 16 bytes of x a thread",
    }
    ops = {
        f"{title} {dtype}": f"crelu_{direction} {long}"
        for dtype, long in (("bf16", "bfloat16"), ("fp32", "float32"))
        for direction, title in (("f", "inference"), ("fm", "forward"), ("bm", "backward"))
    }
    return variants([f"variants/cuda_{run}.csv" for run in (1, 2)], names, ops)
