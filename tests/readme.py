"""The tables that the README shows, and where each comes from.

python -m tests.readme    # writes them into the README anew
"""

from __future__ import annotations

import csv
from pathlib import Path

from tests import faults

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def rows(path: str) -> list[dict[str, str]]:
    with (RESULTS / path).open(newline="") as file:
        return list(csv.DictReader(file))


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
    """What a call adds on the host, in ranges over functions and modules."""
    from tabulate import tabulate

    measured = rows("cpu/overhead.csv")

    def cell(path: str, grad: bool, reference: str) -> str:
        added = [
            float(row["added_us"])
            for row in measured
            if row["path"] == path
            and row["requires_grad"] == str(grad)
            and reference in row["reference"]
        ]
        return f"{min(added):.1f} to {max(added):.1f}" if added else ""

    (added_by_import,) = (float(row["added_us"]) for row in measured if row["path"] == "import")
    lines = [
        (what, cell(path, False, reference), cell(path, True, reference))
        for what, path, reference in (
            ("a call on a CPU, beside torch's own", "fallback", ""),
            ("a compiled call on a CPU, beside torch's own", "compiled", ""),
            ("a call of a kernel, beside the kernel alone", "kernels", "kernel alone"),
            ("the same, beside the shortest Function that calls it", "kernels", "Function"),
        )
    ]
    lines.append(
        ("`import fused_act` after `import torch`", f"{added_by_import / 1000:.0f} ms", "")
    )
    return tabulate(lines, ("µs", "no grad", "grad"), "github", disable_numparse=True)


TABLES = {
    "compile": compiled,
    "overhead": overhead,
    "faults": faults.table,
    "broken installs": faults.installs,
}


def between(name: str, text: str) -> tuple[int, int]:
    """Where the table `name` begins and ends in the README."""
    begin = f"<!-- {name}: written by python -m tests.readme -->\n"
    return text.index(begin) + len(begin), text.index(f"<!-- end of {name} -->")


def main() -> None:
    text = README.read_text()
    for name, table in TABLES.items():
        start, end = between(name, text)
        text = text[:start] + table() + "\n" + text[end:]
    README.write_text(text)
    print(f"wrote {', '.join(TABLES)} into {README.name}")


if __name__ == "__main__":
    main()
