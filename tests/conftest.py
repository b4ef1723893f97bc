"""Skips the GPU tests, visibly, where there is no GPU; every test starts with `auto` selected."""

import pytest
import torch

import fused_act


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def automatic_backend():
    torch.manual_seed(0)
    with fused_act.use_backend("auto"):
        yield
