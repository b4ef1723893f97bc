"""The tables and figures of the README and of other pages, and where each comes from.

python -m tests.readme    # writes them into the pages anew
"""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

from benchmarks.environment import read_csv
from fused_act.activations import FAMILIES
from tests import measured
from tests.shared import faults
from tests.shared.accuracy import DERIVATIVE, FORWARD

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def rows(path: str) -> list[dict[str, str]]:
    return read_csv(RESULTS / path)


def compiled() -> str:
    """How the time of compiled code compares with that of torch's own."""
    from tabulate import tabulate

    measured = rows("cpu/compile.csv")
    ratios = {
        tuple(row[key] for key in ("function", "case", "direction", "dtype")): float(row["ratio"])
        for row in measured
    }

    def cell(*case: str) -> str:
        if (*case, "fp32") not in ratios:
            return ""
        return " / ".join(f"{ratios[(*case, dtype)]:.2f}" for dtype in ("fp32", "bf16"))

    columns = dict.fromkeys((row["case"], row["direction"]) for row in measured)
    lines = [
        (function, *(cell(function, *column) for column in columns))
        for function in dict.fromkeys(row["function"] for row in measured)
    ]
    header = ("", *(", ".join(column).replace("+", " + ") for column in columns))
    return tabulate(lines, header, "github", disable_numparse=True)


def overhead() -> str:
    """What a call adds on the host, in ranges over functions, modules, in place or not."""
    from tabulate import tabulate

    measured = rows("cpu/overhead.csv")
    directions = ["no grad", "forward", "forward and backward", "8 in a row", "35 blocks"]

    def cell(path: str, direction: str, column: str = "added_us", sign: str = "+") -> str:
        added = [
            float(row[column])
            for row in measured
            if (row["path"], row["direction"]) == (path, direction)
            if row["call"] not in OF_OTHER_FAMILIES
        ]
        return f"{min(added):{sign}.1f} to {max(added):{sign}.1f}" if added else ""

    def line(what: str, path: str, *options: str) -> tuple[str, ...]:
        return (what, *(cell(path, direction, *options) for direction in directions))

    (added_by_import,) = (
        float(row["added_us"]) for row in measured if row["call"] == "import torch, fused_act"
    )
    lines = [
        line("torch's own op takes", "host extension", "reference_us", ""),
        line("in C++, with torch's own kernel", "host extension"),
        line("in C++, an op of ours", "host extension, ops.cu"),
        line("in Python, with torch's own kernel", "python"),
        line("in Python, an op of ours", "python, ops.cu"),
        line("where no kernel runs", "fallback"),
        line("compiled", "compiled"),
        ("`import fused_act` after `import torch`", f"{added_by_import / 1000:.0f} ms"),
    ]
    return tabulate(lines, ("µs", *directions), "github", disable_numparse=True)


# Of overhead.csv: what is not beside an op of torch's own, or has a weight.
OF_OTHER_FAMILIES = ("PReLU()", "Swish(learnable=True)", "CReLU(-1)")


def other_calls() -> str:
    """What calls of the other families, a block of `rematerialize` and Triton's launch take."""
    from tabulate import tabulate

    found = {(row["path"], row["call"], row["direction"]): row for row in rows("cpu/overhead.csv")}
    lines = []
    for call in OF_OTHER_FAMILIES:
        for direction in ("no grad", "forward and backward"):
            cpp, python = (
                found[f"{way}, ops.cu", call, direction] for way in ("host extension", "python")
            )
            reference = float(cpp["reference_us"])
            lines.append(
                (
                    f"`{call}`, {direction}",
                    f"`{cpp['reference']}` {reference:.1f}",
                    f"{float(cpp['added_us']):+.1f}",
                    f"{float(python['added_us']):+.1f}",
                )
            )
    for options, name in (("", "rematerialize()"), ("-norm", "rematerialize(norm=True)")):
        for call in ("mish", "relu6"):
            cpp, python = (
                found[f"{way}, ops.cu", call, f"35 blocks, rematerialize{options}"]
                for way in ("host extension", "python")
            )
            lines.append(
                (
                    f"`{name}`, a block with {call}",
                    f"the block without {float(cpp['reference_us']):.0f}",
                    f"{float(cpp['added_us']):+.1f}",
                    f"{float(python['added_us']):+.1f}",
                )
            )
    ours, triton = (
        found["triton, stub driver", call, "launch"] for call in ("Launcher", "kernel[grid]")
    )
    lines.append(
        (
            "a Triton launch, ours",
            f"the launch alone {float(ours['reference_us']):.1f}",
            "",
            f"{float(ours['added_us']):+.1f}",
        )
    )
    lines.append(
        ("a Triton launch, `kernel[grid]`", "the same", "", f"{float(triton['added_us']):+.1f}")
    )
    headers = ("µs", "beside", "in C++", "in Python")
    return tabulate(lines, headers, "github", disable_numparse=True)


def instructions() -> str:
    """Instructions for an element of a bf16 tensor on sm_90."""
    from tabulate import tabulate

    counted = [
        row
        for path in ("machine_code/aten.csv", "machine_code/ours.csv")
        for row in rows(path)
        if (row["capability"], row["dtype"]) == ("90", "bfloat16")
    ]

    def cell(activation: str, provider: str) -> str:
        found = {
            row["direction"]: float(row["instructions_per_element"])
            for row in counted
            if (row["activation"], row["provider"]) == (activation, provider)
        }
        # In training: if there is a kernel with a mask, it is that one.
        kernels = [
            ("forward with mask", "forward"),
            ("backward with mask", "backward", "backward from output"),
        ]
        counts = [next((found[one] for one in each if one in found), None) for each in kernels]
        return " / ".join(f"{count:.1f}" for count in counts) if None not in counts else ""

    providers = {"ATen, torch 2.11": "aten", "Triton": "triton", "CUDA C++": "cuda"}
    lines = [
        (f"`{activation.name}`", *(cell(activation.name, by) for by in providers.values()))
        for activation in FAMILIES["elementwise"]
    ]
    return tabulate(lines, ("forward / backward", *providers), "github", disable_numparse=True)


def memory() -> str:
    """What rematerialize saves and takes in training steps, as shares of torch's."""
    from tabulate import tabulate

    def shares(path: str, activation: str, provider: str, method: str) -> dict[str, str]:
        found = [
            row
            for row in rows(path)
            if row["activation"] == activation and row["inplace"] == "False"
        ]
        base = {
            row["case"]: row for row in found if row["provider"] == "aten" and not row["method"]
        }

        def share(row: dict, column: str) -> str:
            return f"{float(row[column]) / float(base[row['case']][column]):.0%}"

        return {
            row["case"]: " / ".join(share(row, each) for each in ("saved_bytes", "ms") if row[each])
            for row in found
            if (row["provider"], row["method"]) == (provider, method)
        }

    columns = {
        "Mish, `rematerialize()`": ("cpu", "mish", "fallback", "rematerialize"),
        "Mish, `rematerialize(norm=True)`": ("cpu", "mish", "fallback", "rematerialize-norm"),
        "Mish, checkpoint of each block": ("cpu", "mish", "aten", "checkpoint"),
        "ReLU6 kernel, bits": ("cpu_interpreter", "relu6", "triton", ""),
        "with `rematerialize(norm=True)`": (
            *("cpu_interpreter", "relu6", "triton"),
            "rematerialize-norm",
        ),
    }
    found = [shares(f"{folder}/memory.csv", *contender) for folder, *contender in columns.values()]
    lines = [(case, *(each[case] for each in found)) for case in found[2]]
    return tabulate(lines, ("bytes / time", *columns), "github", disable_numparse=True)


def errors() -> str:
    """The gates on the errors in ULP, and the largest errors of torch's own ops on a CPU."""
    from tabulate import tabulate

    # Of the others learnable Swish is no op of torch's, and PReLU is exact.
    own = {row.name for row in FAMILIES["elementwise"]}
    measured = [
        row
        for row in rows("cpu/accuracy.csv")
        if row["provider"] == "aten" and row["activation"] in own
    ]

    def torchs(low: bool, region: str) -> str:
        largest = []
        for kind in ("forward", "derivative"):
            found = [
                row
                for row in measured
                if row["kind"] == kind
                and region in row["region"]
                and (row["dtype"] != "fp32") is low
            ]
            worst = max(found, key=lambda row: float(row["max_ulp"]))
            largest.append(
                f"{float(worst['max_ulp']):.3g} ({worst['activation']} {worst['dtype']} "
                f"at {float(worst['worst_input']):.4g})"
            )
        return " / ".join(largest)

    near_root = f"{DERIVATIVE.low_near_root:g} within 0.03 of its zero"
    absolute = f"2^{math.log2(DERIVATIVE.absolute):g} absolute around its zero"
    lines = [
        (
            "fp16, bf16, subnormals included",
            f"{FORWARD.low:g}",
            f"{DERIVATIVE.low:g}; {near_root}",
            torchs(True, ""),
        ),
        (
            "fp32, x >= -87",
            f"{FORWARD.full:g}",
            f"{DERIVATIVE.full:g}; {absolute}",
            torchs(False, ">="),
        ),
        ("fp32, x < -87", f"{FORWARD.tail:g}", f"{DERIVATIVE.tail:g}", torchs(False, "<")),
    ]
    header = ("", "forward", "derivative", "torch on a CPU, forward / derivative")
    return tabulate(lines, header, "github", disable_numparse=True)


def family() -> str:
    """What each activation is like, and what it costs."""
    from tabulate import tabulate

    def pair(row: dict, prefix: str, digits: str) -> str:
        cells = [row[f"{prefix}_{direction}"] for direction in ("forward", "backward")]
        return " / ".join(f"{float(cell):{digits}}" for cell in cells)

    def paper(text: str) -> str:
        return re.sub(r"^(.*), arXiv:(\S+)$", r"[\1](https://arxiv.org/abs/\2)", text)

    lines = [
        (
            row["activation"],
            row["kinks"].replace(" ", ", "),
            row["range"],
            row["monotonic"],
            row["mean_output"],
            row["saturates"],
            f"{pair(row, 'triton', '.1f')}, {pair(row, 'cuda', '.1f')}",
            pair(row, "moved", "g"),
            f"{float(row['saved']):g}",
            f"{float(row['time_torch']):.1f}",
            paper(row["paper"]),
        )
        for row in rows("cpu/activations.csv")
    ]
    header = (
        *("", "kinks at", "range", "monotonic", "mean output", "saturates"),
        *("instructions: Triton, CUDA", "bytes moved", "bytes saved", "time on a CPU", "paper"),
    )
    return tabulate(lines, header, "github", disable_numparse=True)


def training() -> str:
    """What each activation brings in training, and what it costs."""
    from tabulate import tabulate

    from benchmarks.training import spread, summaries

    measured = rows("cpu/training.csv")
    numbers = ("epoch", "loss", "accuracy", "ms", "saved_mb", "parameters")
    found = summaries([row | {each: float(row[each]) for each in numbers} for row in measured])
    lines = [
        (
            name,
            f"{statistics.mean(each.accuracies):.2f} ± {spread(each.accuracies):.2f}",
            f"{statistics.mean(each.losses):.5f} ± {spread(each.losses):.5f}",
            f"{each.ms / found['ReLU6'].ms:.2f}",
            f"{each.saved_mb:.2f}",
            f"{each.parameters:,.0f}",
        )
        for name, each in found.items()
    ]
    header = ("", "test accuracy, %", "training loss", "time a step", "MB saved", "parameters")
    return tabulate(lines, header, "github", disable_numparse=True)


TABLES = {
    "summary": measured.summary,
    "speed": measured.large,
    "networks": measured.networks,
    "family": family,
    "training": training,
    "accuracy": errors,
    "instructions": instructions,
    "memory": memory,
    "compile": compiled,
    "overhead": overhead,
    "other calls": other_calls,
    "faults": faults.table,
    "broken installs": faults.installs,
}


# All that is written, by page.
PAGES = {
    README: TABLES,
    RESULTS / "nvidia-h200" / "README.md": {
        "speed": measured.large,
        "alternatives": measured.alternatives,
        "small tensors": measured.small_tensors,
        "weighted and mirrored": measured.weighted_and_mirrored,
        "networks": measured.networks,
        "host": measured.host,
        "accuracy": measured.accuracy,
    },
    ROOT / "benchmarks" / "TUNING.md": {
        "first variants": measured.first_variants,
        "second variants": measured.second_variants,
        "mirrored variants": measured.mirrored_variants,
        "weighted variants": measured.weighted_variants,
        "triton variants": measured.triton_variants,
    },
}


def between(name: str, text: str) -> tuple[int, int]:
    """Where the table `name` begins and ends in a page."""
    begin = f"<!-- {name}: written by python -m tests.readme -->\n"
    return text.index(begin) + len(begin), text.index(f"<!-- end of {name} -->")


def main() -> None:
    for page, tables in PAGES.items():
        text = page.read_text()
        for name, table in tables.items():
            start, end = between(name, text)
            text = text[:start] + table() + "\n" + text[end:]
        page.write_text(text)
        print(f"wrote {', '.join(tables)} into {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
