"""The Triton backend: one forward kernel and one backward kernel, which take an activation's pair.

With TRITON_INTERPRET=1 in the environment the same code runs on CPU tensors, without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from fused_act import ops
from fused_act.activations import ACTIVATIONS
from fused_act.backends import Backend, Kernels

MINIMUM = (3, 6)
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# The interpreter exists to run the kernels on CPU tensors.
DEVICE_TYPES = ("cuda", "cpu") if INTERPRET else ("cuda",)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here and what to do, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with `pip install triton`"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < MINIMUM:
        expected = ".".join(map(str, MINIMUM))
        return f"triton {version} is too old; install {expected} or newer"
    if not INTERPRET and not torch.cuda.is_available():
        return (
            "torch sees no CUDA GPU; set TRITON_INTERPRET=1 before Python starts to run the "
            "kernels, slowly, on CPU tensors"
        )
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
