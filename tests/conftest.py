"""Skips the GPU tests, visibly, where there is no GPU; every test starts with `auto` selected."""

import pytest
import torch

import fused_act
from benchmarks import environment
from tests import accuracy, host_kernels


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


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
def forced(request, automatic_backend):
    """Forces the backend that a test is parametrized with, if it is."""
    if "backend" not in request.fixturenames:
        yield
        return
    with fused_act.use_backend(request.getfixturevalue("backend")):
        yield


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
