"""What users build and install: sdist, wheels, and the wheel in a clean virtual environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fused_act
from fused_act import extensions
from tests.shared import compiling

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


pytestmark = pytest.mark.full


def copy_of_sources(folder):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, folder / "source", ignore=ignored)


def run(*command, **options):
    """Run `command`; what it prints, errors included. Fails the test if it fails."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    finished = subprocess.run([str(part) for part in command], check=False, **options)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def pip_wheel(tmp_path, **environment):
    """Build a wheel of a copy of the sources and return pip's output and the wheel."""
    source = copy_of_sources(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "-w", str(tmp_path), str(source)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "FUSED_ACT_BUILD_HOST": "0"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result, next(tmp_path.glob("*.whl"), None)


def test_pure_wheel(tmp_path):
    result, wheel = pip_wheel(tmp_path, FUSED_ACT_BUILD_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fused_act/activations/mish.py" in names
    assert "fused_act/py.typed" in names
    assert not [
        name
        for name in names
        if (name.endswith((".so", ".txt")) and "dist-info" not in name)
        or name.startswith(("tests", "csrc"))
    ]


def test_build_without_nvcc_says_what_it_left_out(tmp_path):
    nowhere = str(tmp_path / "no_cuda")  # hides an nvcc that is here
    result, wheel = pip_wheel(tmp_path, CUDA_HOME=nowhere)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout + result.stderr
    assert "building without the CUDA extension: nvcc is neither" in said
    assert wheel.name.endswith("py3-none-any.whl")
    demanded, _ = pip_wheel(tmp_path / "again", FUSED_ACT_BUILD_CUDA="1", CUDA_HOME=nowhere)
    assert demanded.returncode != 0
    assert "was demanded but nvcc is neither" in demanded.stdout + demanded.stderr


@pytest.mark.parametrize("variable", ["FUSED_ACT_BUILD_CUDA", "FUSED_ACT_BUILD_HOST"])
def test_wrong_build_setting_is_named(tmp_path, variable):
    result, _ = pip_wheel(tmp_path, **{variable: "yes"})
    assert result.returncode != 0
    assert f"{variable}: expected 0, 1 or auto, got 'yes'" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/c++", "there is no C++ compiler"), ("false", "it does not compile for torch")],
)
def test_build_without_the_host_extension_says_why(tmp_path, compiler, reason):
    settings = {"FUSED_ACT_BUILD_CUDA": "0", "CXX": compiler}
    result, wheel = pip_wheel(tmp_path, **settings, FUSED_ACT_BUILD_HOST="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"building without the host extension: {reason}" in result.stdout + result.stderr
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("fused_act/left_out_host.txt").decode().startswith(reason)
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    demanded, _ = pip_wheel(tmp_path / "again", **settings, FUSED_ACT_BUILD_HOST="1")
    assert demanded.returncode != 0


def test_isolated_build(tmp_path):
    """`python -m build` as it comes: an isolated build has no torch, and must not fetch one."""
    pytest.importorskip("build", reason="needs build")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "setuptools", "wheel"]
    if subprocess.run([*fetch, "-d", tmp_path], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs a package registry")
    said = run(sys.executable, "-m", "build", "-o", tmp_path, copy_of_sources(tmp_path))
    reason = "torch cannot be imported" if NVCC else "nvcc is neither"
    assert f"building without the CUDA extension: {reason}" in said
    assert "building without the host extension: torch cannot be imported" in said
    (wheel,) = tmp_path.glob("fused_act-*.whl")
    assert wheel.name == f"fused_act-{fused_act.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        for kind in ("cuda", "host"):
            note, noted = f"fused_act/left_out_{kind}.txt", kind == "host" or NVCC is not None
            assert (note in archive.namelist()) is noted
            assert not noted or archive.read(note) == b"torch cannot be imported by the build"
    with tarfile.open(tmp_path / f"fused_act-{fused_act.__version__}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {
        *("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"),
        *(
            "csrc/register.cu",
            "csrc/math.cuh",
            "csrc/host/module.cpp",
            "csrc/tensors.h",
            "fused_act/py.typed",
            "fused_act/families/base.py",
            "fused_act/backends/triton/__init__.py",
        ),
        *("tests/shared/facts.py", "tests/shared/host/elementwise.cpp", "benchmarks/speed.py"),
    }
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that this machine makes: with the extensions whose compilers are here."""
    pytest.importorskip("build", reason="needs build")
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder)
    one_architecture = os.environ | {
        "TORCH_CUDA_ARCH_LIST": "9.0"
    }  # compiles in a sixth of the time
    run(*command, copy_of_sources(folder), env=one_architecture)
    return next(folder.glob("*.whl"))


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_build_where_nvcc_is(tmp_path):
    """One wheel for every Python from 3.10 on, and for every torch."""
    settings = {"FUSED_ACT_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    _, wheel = pip_wheel(tmp_path, **settings, PATH=os.environ["PATH"])
    assert wheel.name.startswith(f"fused_act-{fused_act.__version__}-cp310-abi3-linux_")
    assert extensions_in(wheel) == ["fused_act/_C.abi3.so"]


@pytest.mark.skipif(compiling.COMPILER is None, reason="needs a C++ compiler")
def test_build_where_a_compiler_is(wheel):
    """For this Python alone, and with a name that another torch does not look for."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"fused_act-{fused_act.__version__}-{python}-{python}-linux_")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    cuda = ["fused_act/_C.abi3.so"] if NVCC else []
    assert extensions_in(wheel) == [*cuda, f"fused_act/{extensions.host_name()}{suffix}"]


@pytest.mark.skipif(compiling.COMPILER is None, reason="needs a C++ compiler")
def test_a_later_build_packs_nothing_of_an_earlier_one(tmp_path):
    source = copy_of_sources(tmp_path)
    build = (sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path)
    no_cuda = os.environ | {"FUSED_ACT_BUILD_CUDA": "0"}
    for host in ("1", "0"):
        run(*build, cwd=source, env=no_cuda | {"FUSED_ACT_BUILD_HOST": host, "CXX": "g++ -O0"})
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    assert extensions_in(wheel) == []


def extensions_in(wheel) -> list[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return sorted(name for name in names if name.endswith((".so", ".txt")) and "info" not in name)


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """The Python of a new virtual environment that has the wheel, torch, and nothing else."""
    if torch.version.cuda is not None:
        pytest.skip("needs a CPU build of torch; to install another one would fetch gigabytes")
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    version = torch.__version__.partition("+")[0]
    run(python, "-m", "pip", "install", "-q", f"torch=={version}", wheel)
    return python


USE = """
import importlib.util, pathlib, torch, fused_act
assert "site-packages" in fused_act.__file__
assert [name for name in ("numpy", "triton") if importlib.util.find_spec(name)] == []
x = torch.linspace(-3, 9, 7, requires_grad=True)
for function in (fused_act.mish, fused_act.silu, fused_act.relu6):
    function(x).sum().backward()
model = fused_act.replace_activations(torch.nn.Sequential(torch.nn.Mish()))
assert torch.equal(model(x), torch.nn.functional.mish(x))
"""


def test_installed_with_torch_alone(wheel, clean_python, tmp_path):
    run(clean_python, "-I", "-W", "ignore:Failed to initialize NumPy", "-c", USE, cwd=tmp_path)
    run(clean_python, "-m", "pip", "check")
    report = run(clean_python, "-I", "-m", "fused_act", cwd=tmp_path)
    has_cuda = "fused_act/_C.abi3.so" in extensions_in(wheel)
    lacks = "torch sees no CUDA GPU" if has_cuda else "this install has no CUDA extension"
    path = "Python" if compiling.COMPILER is None else "C++"
    assert f"host path  {path}" in report
    assert f"cuda     not available: {lacks}" in report
    assert "triton   not available: triton is not installed" in report


def test_types_of_the_installed_package(clean_python, tmp_path):
    """mypy reads them from there, which takes py.typed, and not from the sources."""
    pytest.importorskip("mypy", reason="needs mypy")
    shutil.copy(ROOT / "tests" / "typed_usage.py", tmp_path)
    command = (sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache")
    said = run(*command, "--python-executable", clean_python, "typed_usage.py", cwd=tmp_path)
    assert "Success: no issues found in 1 source file" in said
