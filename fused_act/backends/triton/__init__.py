"""The Triton backend: one forward and one backward kernel a family, which take a row's pair.

With TRITON_INTERPRET=1 in the environment the same code runs on CPU tensors, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import tempfile
import textwrap
from collections.abc import Callable
from typing import Any

from fused_act import host, ops
from fused_act.activations import ROWS
from fused_act.dispatch import Backend, Kernels, gpu_unavailable, older
from fused_act.families.base import Row

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
    if INTERPRET:
        return None
    reason = gpu_unavailable()
    if reason is not None:
        return (
            f"{reason}; with TRITON_INTERPRET=1 set before Python starts, the kernels run on CPU "
            "tensors, slowly"
        )
    try:
        start()
    except Exception as error:  # whatever Triton, its plugins or the system raise
        text = textwrap.shorten(str(error), 300)
        return (
            f"triton does not start ({type(error).__name__}: {text}); it needs a C compiler (gcc, "
            "clang or the one that CC names) with Python's headers, libcuda.so.1, and a cache "
            "folder that it may write to (TRITON_CACHE_DIR)"
        )
    return None


def start() -> None:
    """Start Triton, as the first launch would, while another backend can still be taken.

    It compiles its access to the driver, once for each cache, and asks for the GPU. Nothing of it
    touches a stream, so a CUDA graph may be being captured.
    """
    import triton

    # That access may be in the cache already, and our kernels not.
    os.makedirs(triton.knobs.cache.dir, exist_ok=True)
    with tempfile.TemporaryFile(dir=triton.knobs.cache.dir):
        pass
    triton.runtime.driver.active.get_current_target()


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
    for row in ROWS.values():
        for device_type in DEVICE_TYPES:
            ops.implement("fused_act_triton", device_type, implementations(row))
    return ops.kernels("fused_act_triton")


def implementations(row: Row) -> dict[str, Callable[..., Any]]:
    """The implementation of each raw op of `row`, by name."""
    launches = importlib.import_module(f"{__name__}.{row.family}").launches(row)
    return {
        op.name: functools.partial(run, op.name, op.check, op.allocate, launches[field])
        for field, op in row.raw_ops().items()
    }


def run(
    name: str,
    check: Callable[..., None],
    allocate: Callable[..., Any],
    launch: Callable[..., None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The implementation of each raw op: check the arguments, allocate the outputs, launch."""
    check(name, None, *args, **kwargs)
    outputs = allocate(*args, **kwargs)
    launch(outputs, *args, **kwargs)
    return outputs


BACKEND = Backend(
    name="triton",
    unavailable=unavailable,
    load=load,
    device_types=DEVICE_TYPES,
    connect=host.connect,
)
