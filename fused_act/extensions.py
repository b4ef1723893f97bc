"""The extensions that setup.py builds: where they are, what they are called, why one is missing.

setup.py takes the name of the host extension from here, so this file imports nothing of ours.
"""

from __future__ import annotations

import re
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def host_name() -> str | None:
    """The name of the host extension for this torch, or None if torch does not tell its commit.

    The full C++ API changes from torch to torch without a warning. So the name carries the version
    and the commit, and another torch looks for another name.
    """
    commit = getattr(torch.version, "git_version", None)
    if not commit or commit == "Unknown":
        return None
    version = re.sub(r"\W", "_", torch.__version__.partition("+")[0])
    kind = "_debug" if torch.version.debug else ""
    return f"_host_torch_{version}_{commit[:12]}{kind}"


def host_path(name: str) -> Path | None:
    """The file of the host extension for this Python, or None.

    Python's own finders are not asked: that of an editable install finds in its folder what another
    copy of the package lacks.
    """
    paths = (FOLDER / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def built_hosts() -> dict[str, str]:
    """The host extensions that are here, for whatever torch and Python: name to torch's version."""
    names = (path.name.partition(".")[0] for path in FOLDER.glob("_host_torch_*.so"))
    versions = {name: re.match(r"_host_torch_(\w+)_[0-9a-f]{12}", name) for name in names}
    return {name: found[1].replace("_", ".") for name, found in versions.items() if found}


def left_out(extension: str) -> str | None:
    """Why the build left out the extension, "CUDA" or "host", if it wrote that down; see setup.py.

    pip shows nothing of what a build prints.
    """
    note = FOLDER / f"left_out_{extension.lower()}.txt"
    return note.read_text() if note.exists() else None


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
