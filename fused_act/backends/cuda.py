"""The CUDA C++ backend: finds the extension that setup.py built from csrc/, checks it, loads it."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

from fused_act import ops
from fused_act.dispatch import Backend, Kernels, gpu_unavailable, older

# The extension is built for LibTorch's stable ABI of 2.10 and so loads in any later torch.
MINIMUM_TORCH = (2, 10)
REBUILD = "reinstall with `FUSED_ACT_BUILD_CUDA=1 pip install --no-build-isolation .`"


def extension() -> Path | None:
    """The built extension, or None in a pure-Python install."""
    return next(Path(__file__).parent.parent.glob("_C.*so"), None)


def left_out() -> str | None:
    """Why the build left the extension out though nvcc was there, if it did; see setup.py."""
    note = Path(__file__).parent.parent / "left_out.txt"
    return note.read_text() if note.exists() else None


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here and what to do, or None if they can."""
    if extension() is None:
        reason = left_out()
        if reason is not None:
            return (
                f"the build left the CUDA extension out though nvcc was there: {reason}; {REBUILD}"
            )
        return f"this install has no CUDA extension; where nvcc is, {REBUILD}"
    # Before it is loaded: an older torch lacks symbols, and then the loader may abort the process.
    if older(torch.__version__, MINIMUM_TORCH):
        expected = ".".join(map(str, MINIMUM_TORCH))
        return f"the extension needs torch {expected} or newer, this is torch {torch.__version__}"
    try:
        load()
    except OSError as error:
        # torch names the file alone; what is wrong with it, the loader said.
        return f"the extension does not load ({error.__cause__ or error}); {REBUILD}"
    return gpu_unavailable()


def is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section headers do, which come last.

    The loader maps what is not there, and touching it kills the process (SIGBUS).
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False  # the loader says so itself
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    end: int = offset + size * count
    return path.stat().st_size < end


def load() -> dict[str, Kernels]:
    """Load the extension, which gives the raw ops their kernels. Raises OSError if it is broken."""
    path = extension()
    assert path is not None  # `unavailable` has looked
    if is_truncated(path):
        raise OSError(f"{path} is truncated")
    torch.ops.load_library(str(path))
    return ops.kernels("fused_act_cuda")


BACKEND = Backend(
    name="cuda",
    unavailable=unavailable,
    load=load,
    device_types=("cuda",),
    is_installed=lambda: extension() is not None or left_out() is not None,
)
