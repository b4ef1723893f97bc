"""`python -m fused_act`: the versions, the GPU, and which backends can run here."""

import platform

import torch

from fused_act import __version__, dispatch, host
from fused_act.backends import triton


def gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def main() -> None:
    print(f"fused_act  {__version__}")
    print(f"python     {platform.python_version()}")
    print(f"torch      {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})")
    print(f"triton     {triton.version() or 'not installed'}")
    print(f"GPU        {gpu()}")
    extension = host.extension()
    print(f"host path  {f'Python: {extension}' if isinstance(extension, str) else 'C++'}")
    print("backends, best first:")
    reasons = {name: backend.unavailable() for name, backend in dispatch.BACKENDS.items()}
    for name, reason in reasons.items():
        print(f"  {name:8} {'available' if reason is None else f'not available: {reason}'}")
    if reasons["cuda"] is not None and reasons["triton"] is None and not triton.INTERPRET:
        print("auto takes triton: with cuda, see above, calls take the host a fraction of the time")


if __name__ == "__main__":
    main()
