"""What the benchmarks run on, and where their numbers go: device, versions, CSV files, tables."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

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


def on_gpu() -> bool:
    """Whether the kernels run on a GPU; Triton's interpreter takes CPU tensors."""
    return torch.cuda.is_available() and not INTERPRET


@functools.cache
def environment() -> dict[str, str]:
    """The columns that say where a number comes from; empty where there is nothing to say."""
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu() else "",
        **nvidia_smi(
            driver="driver_version",
            sm_clock_max_mhz="clocks.max.sm",
            memory_clock_max_mhz="clocks.max.memory",
            power_limit_w="power.limit",
        ),
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


def clocks() -> dict[str, str]:
    """The columns that say how fast the GPU runs now: one that is hot or short of power slows."""
    return nvidia_smi(sm_clock_mhz="clocks.current.sm", memory_clock_mhz="clocks.current.memory")


def nvidia_smi(**fields: str) -> dict[str, str]:
    """What nvidia-smi says of the GPU in use, by column; "" for what it does not know."""
    values = []
    if on_gpu():
        # CUDA_VISIBLE_DEVICES gives the GPU another number, but not another uuid.
        uuid = torch.cuda.get_device_properties(0).uuid
        query = f"--query-gpu={','.join(fields.values())}"
        line = output("nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits")
        values = [value.strip() for value in line.split(",")]
    if len(values) != len(fields):
        values = [""] * len(fields)
    return {column: "" if "[" in value else value for column, value in zip(fields, values)}


def output(*command: str) -> str:
    """The first line that `command` prints, or "" where it is missing or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return finished.stdout.partition("\n")[0].strip()


def print_environment() -> None:
    print(", ".join(f"{key} {value}" for key, value in environment().items() if value))


def device_folder() -> str:
    """The folder of benchmarks/results for what is measured here."""
    on_cpu = "cpu_interpreter" if INTERPRET else "cpu"
    return re.sub(r"\W+", "-", environment()["gpu"].lower()) or on_cpu


def write_csv(path: Path, rows: Iterable[dict]) -> list[dict]:
    """Write each row as it comes, with the environment behind it, and return them all.

    They go to `<name>.partial.csv`, which takes the place of `path` when the last one is there. So
    a run that ends early leaves what it has measured, and an older result as it was.
    """
    partial = path.with_suffix(f".partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("a", newline="")  # an older one is kept until there is a first row
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        refuse(f"cannot write {path.name} ({reason}); choose another --results")
    written, columns, writer = [], {}, None
    try:
        with file:
            for row in rows:
                if writer is None or row.keys() - columns.keys():
                    columns |= row
                    writer = csv.DictWriter(file, [*columns, *environment()], lineterminator="\n")
                    file.truncate(0)
                    writer.writeheader()
                    writer.writerows(earlier | environment() for earlier in written)
                writer.writerow(row | environment())
                file.flush()
                written.append(row)
    except BaseException:
        if written:
            print(f"\nended early: {len(written)} rows in {partial}", file=sys.stderr)
        raise
    finally:
        if partial.stat().st_size == 0:
            partial.unlink()
    if written:
        replaces = ", in place of an older file" if path.exists() else ""
        os.replace(partial, path)
        print(f"\n{len(written)} rows in {path}{replaces}")
    return written


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(main: Callable[[], Sequence[dict]]) -> NoReturn:
    """Run a command, which returns its rows, and exit with a status that scripts can use.

    0: all is well; 1: something failed, as Python and the column `error` say; 2: what was asked for
    cannot be done; 130: interrupted.
    """
    try:
        rows = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(any(row.get("error") for row in rows))


def refuse(reason: str) -> NoReturn:
    """End with one line and the status of what cannot be done."""
    print(reason, file=sys.stderr)
    sys.exit(2)


def progress(cases: Iterable, total: int) -> Iterable:
    """`cases` with a progress bar, where tqdm is installed and stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, total=total, unit="case", leave=False, disable=None)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """`lines` under `header`, separated by tabs where tabulate is not installed."""
    lines = list(lines)
    try:
        from tabulate import tabulate
    except ImportError:
        return "\n".join("\t".join(cells) for cells in (header, *lines))
    aligned = ["left", *["right"] * (len(header) - 1)]
    return tabulate(lines, header, "plain", colalign=aligned, disable_numparse=True)
