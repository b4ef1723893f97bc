"""Which tests run here and in which tier; every test starts with the backend `auto`.

tests/tiers.py says what the tiers are and puts most cases into theirs.
"""

import collections
import functools
import gc
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
from fused_act import dispatch, host
from fused_act.backends import triton
from tests import tiers
from tests.shared import accuracy, compiling, cpu_ops, host_kernels
from tests.shared.cases import INTERPRET, ON_HOST

pytest_plugins = ["tests.outcomes"]

# Why tests are left out here, by the marker that says what they need. Thousands of skipped tests
# would hide those that are skipped for another reason.
MISSING = {
    "gpu": None if torch.cuda.is_available() else "need a CUDA GPU",
    "timm": None if importlib.util.find_spec("timm") else "need timm, see `make test-all`",
}
LEFT_OUT: collections.Counter[str] = collections.Counter()


def pytest_addoption(parser):
    parser.addoption(
        "--without-host-extension",
        action="store_true",
        help="let Python do what the host extension does, as where it is not built",
    )


def pytest_configure(config):
    if config.option.without_host_extension:
        host.extension = lambda: "left out by --without-host-extension"
    if getattr(config.option, "dist", None) == "loadscope":
        config.option.loadscopereorder = False  # groups start in the order of their tests


def pytest_ignore_collect(collection_path, config):
    """With `-m smoke` or `-m timm`, skip the files that never name this marker.

    To import them takes time, and fails in the environment of timm.
    """
    marker = config.option.markexpr
    if marker in ("smoke", "timm") and collection_path.suffix == ".py":
        return True if f"mark.{marker}" not in collection_path.read_text() else None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    reasons = [reason_to_leave_out(item) for item in items]
    LEFT_OUT.update(filter(None, reasons))
    config.hook.pytest_deselected(items=[item for item, why in zip(items, reasons) if why])
    items[:] = [item for item, why in zip(items, reasons) if not why]
    tiers.mark_full(items)
    tiers.mark_overlapping(items)
    tiers.order(items)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadscope` a process runs a whole group of tests, see tests/tiers.py.

    pytest-xdist's own groups, `--dist loadgroup`, are ignored in silence where pytest is of
    version 9.2: it has renamed what pytest-xdist 3.8 writes them into.
    """
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return tiers.group_of(nodeid)

        def remove_node(self, node):
            """Return the test that a process died of, and leave the rest of its groups to others.

            pytest-xdist 3.8 lets the next process run that test again, which dies of it, too.
            """
            groups = self.assigned_work[node]
            died_of = None
            for group in groups.values():
                for test, is_done in group.items():
                    if not is_done and died_of is None:
                        died_of, group[test] = test, True
            for name in [name for name, group in groups.items() if all(group.values())]:
                del groups[name]
            super().remove_node(node)
            return died_of

        def schedule(self):
            is_late = self.collection is not None  # a process that takes the place of another
            super().schedule()
            if is_late:  # of a group of one test a process waits for a second one, or for the end
                super().schedule()

    return Groups(config, log)


def reason_to_leave_out(item) -> str | None:
    for marker, reason in MISSING.items():
        if reason is not None and item.get_closest_marker(marker):
            return reason
    if bool(item.get_closest_marker("interpreted")) != INTERPRET:
        return f"run {'without' if INTERPRET else 'in'} Triton's interpreter"
    return None


def pytest_runtest_setup(item):
    """Frees the memory that torch caches before and after a huge test, which may need it."""
    if tiers.is_huge(item.nodeid):
        gc.collect()
        torch.cuda.empty_cache()


def pytest_runtest_teardown(item):
    pytest_runtest_setup(item)


def pytest_report_header():
    """Which Triton runs, of which `make test-all` takes two, and what the host path is."""
    extension = host.extension()
    path = f"Python ({extension})" if isinstance(extension, str) else "C++"
    return f"torch {torch.__version__}, triton {triton.version()}, host path: {path}"


def pytest_sessionfinish(session):
    """With pytest-xdist the tests run in other processes than the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["accuracy"] = list(accuracy.REPORT.items())
        session.config.workeroutput["left out"] = dict(LEFT_OUT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    output = getattr(node, "workeroutput", {})
    for key, found in output.get("accuracy", []):
        accuracy.add_to_report(key, found)
    LEFT_OUT.update(output.get("left out", {}) if not LEFT_OUT else {})  # all collect the same


def pytest_terminal_summary(terminalreporter):
    for reason, count in LEFT_OUT.items():
        terminalreporter.write_line(f"{count} tests left out: they {reason}")
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
def ours(request, automatic_backend, case, way, inplace):
    """An activation as users call it, its Function alone, or of the backend that `way` names.

    Where `way` says so C++ takes calls of it, or hands them back in a test marked `declined`.
    """
    if way == "Function":
        yield case.apply
        return
    if way in ON_HOST:
        if compiling.COMPILER is None:
            pytest.skip("needs a C++ compiler")
        with ON_HOST[way]() as counter:
            yield functools.partial(case.function, inplace=inplace)
        if counter is not None:
            may_decline = request.node.get_closest_marker("declined") is not None
            assert counter.taken > 0 or (may_decline and counter.declined > 0)
        return
    with fused_act.use_backend(way):
        yield functools.partial(case.function, inplace=inplace)


@pytest.fixture
def host_calls(ours, case, way):
    """Counts the calls in C++ of the backend of kernels that `way` names; fails if there are none.

    It counts nothing for rows and ways that never go through C++.
    """
    backend = dispatch.BACKENDS.get(way)
    if backend is None or case.name not in backend.paths:
        yield None
        return
    with cpu_ops.counted(backend) as counter:
        yield counter
    assert counter.taken > 0


@pytest.fixture
def theirs(case, inplace):
    return functools.partial(case.torch_function, inplace=inplace)


@pytest.fixture
def host_of():
    """Gives the host build of a case; resets the errors that a test has set."""
    if compiling.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    made = []

    def make(case):
        made.append(host_kernels.host(case))
        return made[-1]

    yield make
    for each in made:
        if hasattr(each.library, "set_errors"):
            each.library.set_errors(0, 0)
