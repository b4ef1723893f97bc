"""What the benchmarks run on, and where their numbers go: device, versions, CSV files, tables."""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fused_act import __version__
from fused_act.backends.triton import INTERPRET

ROOT = Path(__file__).parent


def default_device() -> torch.device:
    """The first CUDA GPU, where the kernels run, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()} (CPU, {threads} thread{'s' if threads > 1 else ''})"


def cpu_name() -> str:
    """The marketing name where Linux tells it; `platform` knows the architecture only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@functools.cache
def environment() -> dict[str, str]:
    """The columns that say where a number comes from; empty where there is nothing to say."""
    on_gpu = torch.cuda.is_available() and not INTERPRET
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": installed_version("triton") + (" (interpreter)" if INTERPRET else ""),
        "fused_act": __version__,
        "commit": output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def output(*command: str) -> str:
    """The first line that `command` prints, or "" where it is missing or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return finished.stdout.partition("\n")[0].strip()


def print_environment() -> None:
    print(", ".join(f"{key} {value}" for key, value in environment().items() if value))


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    folder = re.sub(r"\W+", "-", environment()["gpu"].lower()) or "cpu"
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        default=ROOT / "results" / folder,
        help="where the CSV file goes; default: benchmarks/results/<name of the GPU, or cpu>",
    )


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write `rows`, each with the environment behind it; the columns are all that rows have."""
    columns = [*dict.fromkeys(key for row in rows for key in row), *environment()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | environment() for row in rows)
    print(f"\n{len(rows)} rows in {path}")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """`lines` under `header`, separated by tabs where tabulate is not installed."""
    lines = list(lines)
    try:
        from tabulate import tabulate
    except ImportError:
        return "\n".join("\t".join(cells) for cells in (header, *lines))
    aligned = ["left", *["right"] * (len(header) - 1)]
    return tabulate(lines, header, "plain", colalign=aligned, disable_numparse=True)
