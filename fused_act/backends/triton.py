"""The Triton backend: one forward kernel and one backward kernel, which take an activation's pair.

With TRITON_INTERPRET=1 in the environment the same code runs on CPU tensors, without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

from fused_act import ops
from fused_act.activations import ACTIVATIONS
from fused_act.backends import Backend, Kernels, gpu_unavailable

MINIMUM = (3, 6)
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# The interpreter exists to run the kernels on CPU tensors.
DEVICE_TYPES = ("cuda", "cpu") if INTERPRET else ("cuda",)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here and what to do, or None if they can."""
    if version() is None:
        return "triton is not installed; install it with `pip install triton`"
    if tuple(map(int, version().split(".")[:2])) < MINIMUM:
        expected = ".".join(map(str, MINIMUM))
        return f"triton {version()} is too old; install {expected} or newer"
    reason = None if INTERPRET else gpu_unavailable()
    return reason and (
        f"{reason}; set TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, on "
        "CPU tensors"
    )


def version() -> str | None:
    """Triton's version, or None if it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, or from source
        if importlib.util.find_spec("triton") is None:
            return None
        import triton

        return triton.__version__


def load() -> dict[str, Kernels]:
    """Import Triton (90 ms, so not before it is needed) and give the raw ops their kernels."""
    from fused_act.backends import triton_kernels

    for activation in ACTIVATIONS:
        for name, implementation in triton_kernels.implementations(activation).items():
            for device_type in DEVICE_TYPES:
                ops.TRITON_LIBRARY.impl(name, implementation, device_type.upper())
    return ops.kernels("fused_act_triton")


BACKEND = Backend(
    name="triton",
    unavailable=unavailable,
    load=load,
    device_types=DEVICE_TYPES,
)
