"""Skips the GPU tests, visibly, where there is no GPU; every test starts with `auto` selected."""

import functools
import importlib
import importlib.util
import os
import re
import signal
from pathlib import Path

import pytest
import torch

import fused_act
from benchmarks import environment
from fused_act.backends import triton
from tests import accuracy, host_kernels


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_report_header():
    """Which Triton runs: `make test` takes two."""
    return f"torch {torch.__version__}, triton {triton.version()}"


def pytest_sessionfinish(session):
    """With pytest-xdist the tests run in other processes than the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["accuracy"] = list(accuracy.REPORT.items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for key, found in getattr(node, "workeroutput", {}).get("accuracy", []):
        accuracy.add_to_report(key, found)


def pytest_terminal_summary(terminalreporter):
    if not accuracy.REPORT:
        return
    terminalreporter.section("fp32 errors in ULP, of the worst parameters in each region")
    header = ("of", "", "", "region", "max", "mean", "at x =", "parameters", "inputs")
    rows = [
        (*key, f"{maximum:.4g}", f"{mean:.3g}", f"{at:.7g}", parameters, str(count))
        for key, (maximum, mean, at, parameters, count) in sorted(accuracy.REPORT.items())
    ]
    terminalreporter.write_line(environment.table(header, rows))


@pytest.fixture(autouse=True)
def automatic_backend():
    torch.manual_seed(0)
    with fused_act.use_backend("auto"):
        yield


@pytest.fixture
def one_thread():
    """For models so small that two threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, as in a shell; a job in the background may have begun with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers", reason="needs transformers, of the extra 'zoo'")


@pytest.fixture(scope="session")
def timm():
    """timm, beside a torchvision whose extension does not load: there is none for a CPU build.

    Without its ops, torchvision fails to register what else it has for them. timm calls none.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm, which `make test` runs in a virtual environment of its own")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
        text = (Path(folder) / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "DEF")
        for op in re.findall(r'@.*register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', text):
            library.define(f"{op}(...) -> ...")
    return importlib.import_module("timm")


@pytest.fixture
def forced(request, automatic_backend):
    """Forces the backend that a test is parametrized with, if it is."""
    if "backend" not in request.fixturenames:
        yield
        return
    with fused_act.use_backend(request.getfixturevalue("backend")):
        yield


@pytest.fixture
def ours(automatic_backend, case, way, inplace):
    """An activation as users call it, its Function alone, or of the backend that `way` names."""
    if way == "Function":
        yield case.apply
        return
    with fused_act.use_backend(way):
        yield functools.partial(case.function, inplace=inplace)


@pytest.fixture
def theirs(case, inplace):
    return functools.partial(case.torch_function, inplace=inplace)


@pytest.fixture(scope="session")
def host_libraries(tmp_path_factory):
    if host_kernels.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    return host_kernels.build(tmp_path_factory.mktemp("host_kernels"))


@pytest.fixture
def host_of(host_libraries):
    """Makes the `Host` of a case; resets the errors that a test has set."""
    yield lambda case: host_kernels.Host(host_libraries[case.name], case)
    for library in host_libraries.values():
        library.set_errors(0, 0)
