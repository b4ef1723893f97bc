"""Broken installs: each imports, computes as torch does, and says once what is wrong and helps.

Each runs in a process of its own, with a copy of the package. There torch is told that it has a
GPU; all else that goes wrong goes wrong by itself.
"""

import re

import pytest

from fused_act import dispatch
from tests.shared.broken_installs import CASES, Install, driver_environment, nothing


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return driver_environment(tmp_path_factory.mktemp("driver"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("breaks", "cuda_reason", "triton_reason"),
    [pytest.param(*case[:3], id=case.breaks.__name__, marks=case.needs) for case in CASES],
)
def test_broken_install(tmp_path, driver, breaks, cuda_reason, triton_reason):
    install = Install(tmp_path, driver)
    breaks(install)
    report = install.report()
    assert report["file"] == str(tmp_path / "fused_act" / "__init__.py")
    assert report["equal"]
    assert report["warned_on_cpu"] == []
    assert report["selected"] == ("triton" if triton_reason is None else "torch")
    # A pure-Python install that has Triton is as it should be.
    assert len(report["warned"]) == (breaks is not nothing)
    for name, reason in (("cuda", cuda_reason), ("triton", triton_reason)):
        if reason is None:
            assert name not in report["errors"]
            continue
        reason = f"not available: {reason}"
        assert re.match(f"use_backend: '{name}' is {reason}", report["errors"][name])
        assert all(re.search(f"'{name}' is {reason}", text) for text in report["warned"])
        assert re.search(f"  {name:8} {reason}", report["printed"])


@pytest.mark.parametrize(
    ("version", "older"),
    [
        ("3.5.1+git1234", True),
        ("2.10", True),
        ("3.6.0+git1234", False),
        ("3.6.0a0", False),
        ("3.10.0", False),
        ("main", False),
        ("", False),
    ],
)
def test_versions_compare_as_numbers(version, older):
    assert dispatch.older(version, (3, 6)) is older
