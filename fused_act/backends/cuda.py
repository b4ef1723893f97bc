"""The CUDA C++ backend: finds the extension that setup.py built from csrc/, checks it, loads it."""

from __future__ import annotations

from pathlib import Path

import torch

from fused_act import host, ops
from fused_act.dispatch import Backend, Kernels, gpu_unavailable, older
from fused_act.extensions import FOLDER, is_truncated, left_out

# The extension is built for LibTorch's stable ABI of 2.10 and so loads in any later torch.
MINIMUM_TORCH = (2, 10)
REBUILD = "reinstall with `FUSED_ACT_BUILD_CUDA=1 pip install --no-build-isolation .`"


def extension() -> Path | None:
    """The built extension, or None in a pure-Python install."""
    return next(FOLDER.glob("_C.*so"), None)


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here and what to do, or None if they can."""
    if extension() is None:
        reason = left_out("CUDA")
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
    is_installed=lambda: extension() is not None or left_out("CUDA") is not None,
    connect=host.connect,
)
