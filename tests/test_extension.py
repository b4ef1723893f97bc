"""The built extension: what it links, what it exports, and that a CPU build of torch loads it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fused_act.activations import FAMILIES, ROWS
from fused_act.backends import cuda

ROOT = Path(__file__).parent.parent

built = pytest.mark.skipif(cuda.extension() is None, reason="needs the CUDA extension")


def readelf(*flags):
    return subprocess.run(
        ["readelf", *flags, str(cuda.extension())], check=True, capture_output=True, text=True
    ).stdout


@built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_links_torch_but_not_its_cuda_part():
    """A dropped libtorch would leave the stream symbol null on a GPU machine."""
    needed = re.findall(r"\(NEEDED\).*\[(\S+)\]", readelf("-d"))
    assert "libtorch.so" in needed
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name or "c10" in name or "python" in name]


@built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_takes_only_stable_symbols():
    undefined = re.findall(r"(GLOBAL|WEAK)\s+DEFAULT\s+UND\s+(\S+)", readelf("-W", "--dyn-syms"))
    bindings = {name.partition("@")[0]: binding for binding, name in undefined}
    assert bindings["aoti_torch_get_current_cuda_stream"] == "WEAK"
    mangled = [name for name in bindings if re.search(r"(2at|3c10|5torch)\d", name)]
    assert mangled == []
    assert not [name for name in bindings if name.startswith("Py")]


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_needs_no_newer_torch_than_is_asked_for():
    """The audit knows in which torch each symbol of the stable ABI came."""
    audit = pytest.importorskip("torch_abi_audit.inspect", reason="needs torch-abi-audit")
    found = audit.inspect_extension(cuda.extension()).torch
    assert found.stable, found.unstable_symbols
    assert found.unknown_shim_symbols == ()
    assert tuple(map(int, found.min_torch_version.split(".")))[:2] <= cuda.MINIMUM_TORCH, (
        found.version_defining_symbols
    )


@built
def test_loads_on_any_torch_and_implements_every_op():
    cuda.load()
    for row in ROWS.values():
        for op in row.raw_ops().values():
            name = f"fused_act_cuda::{op.name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


@built
def test_refuses_cpu_tensors_clearly():
    cuda.load()
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"mish: expected a tensor on cuda.*got cpu"):
        torch.ops.fused_act_cuda.mish(x)
    with torch.inference_mode(), pytest.raises(NotImplementedError, match="'CPU' backend"):
        torch.ops.fused_act_cuda.mish(torch.zeros(3))


@built
def test_unavailable_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert "no CUDA GPU" in cuda.unavailable()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_guards_its_device(family):
    """A kernel launches on the current device; where one GPU is, nothing else shows it."""
    source = (ROOT / "csrc" / f"{family}_ops.cuh").read_text()
    implementations = set(re.findall(r"TORCH_BOX\(&O::(?:template )?(\w+)", source))
    assert implementations
    for name in implementations:
        body = re.search(rf"  static [^;{{}}]* {name}\(.*?\n  }}\n", source, re.DOTALL)[0]
        assert "const DeviceGuard guard(" in body, name
