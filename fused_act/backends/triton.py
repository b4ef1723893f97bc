"""The Triton backend: one forward kernel and one backward kernel, which take an activation's pair.

With TRITON_INTERPRET=1 in the environment the same code runs on CPU tensors, without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os

from fused_act import ops
from fused_act.activations import ACTIVATIONS
from fused_act.backends import Backend, Kernels, gpu_unavailable, older

MINIMUM = (3, 6)
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# The interpreter exists to run the kernels on CPU tensors.
DEVICE_TYPES = ("cuda", "cpu") if INTERPRET else ("cuda",)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here and what to do, or None if they can."""
    found = version()
    if found is None:
        return "triton is not installed; install it with `pip install triton`"
    if older(found, MINIMUM):
        expected = ".".join(map(str, MINIMUM))
        return f"triton {found} is too old; install {expected} or newer"
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
        with contextlib.suppress(ImportError):
            import triton

            return getattr(triton, "__version__", None)  # any folder of that name can be imported
        return None


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
