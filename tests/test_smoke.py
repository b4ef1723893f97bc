"""Every row on every path that runs here, and each compiler once: `make check`."""

import pytest
import torch

import fused_act
from fused_act.activations import FAMILIES, ROWS
from tests.shared import accuracy, kernels
from tests.shared.cases import (
    ACCURACY_CASES,
    ALL_CASES,
    DEVICE,
    all_backends,
    all_rows,
)
from tests.shared.compiling import COMPILER
from tests.shared.layouts import GRAD_LAYOUTS, LAYOUTS, check

pytestmark = pytest.mark.smoke


def results(function):
    """The output and a gradient."""
    x = torch.linspace(-7, 9, 36, device=DEVICE).view(4, 9).requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.sin().sum(), x)[0]


@all_rows
@pytest.mark.parametrize("way", ["auto", "torch", "Function"])
def test_without_kernels(case, way):
    with fused_act.use_backend("torch" if way == "torch" else "auto"):
        ours = results(case.apply if way == "Function" else case.function)
    for found, expected in zip(ours, results(case.torch_function)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@all_rows
@all_backends
@pytest.mark.usefixtures("forced")
def test_kernels(case, backend):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for layout in ("contiguous", "gapped_permuted"):
            x = LAYOUTS[layout](dtype=dtype, device=DEVICE)
            check(case, x, GRAD_LAYOUTS["of_y"], GRAD_LAYOUTS["gapped"])


# One with parameters of each row.
ONE_OF_EACH = list({case.name: case for case in reversed(ACCURACY_CASES)}.values())[::-1]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_cuda_loops_on_the_host(case, host_of):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.linspace(-9, 9, 1001).to(dtype)
        accuracy.check_all(case, x, host_of(case).evaluate(x))


def test_inductor():
    """All rows in one graph."""
    if COMPILER is None:
        pytest.skip("Inductor needs a C++ compiler")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def all_of(x):
        return [case.function(x) for case in ALL_CASES]

    x = torch.linspace(-7, 9, 36).view(4, 9).requires_grad_()
    ys, expected = all_of(x), [case.torch_function(x) for case in ALL_CASES]
    grads = (torch.autograd.grad([y.sin().sum() for y in each], x)[0] for each in (ys, expected))
    torch.testing.assert_close(ys, expected)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


FIRST = {variant.row.name: variant for variant in reversed(kernels.VARIANTS)}


@pytest.mark.parametrize("row", ROWS)
def test_triton_compiles(row):
    pytest.importorskip("triton")
    kernel = kernels.triton_kernel(FIRST[row], torch.bfloat16, 90)
    assert kernel.accesses("STG")
    assert kernel.spills() == 0


def test_every_family_has_its_smoke():
    assert {case.row.family for case in ALL_CASES} == FAMILIES.keys()
    assert {case.name for case in ONE_OF_EACH} == FIRST.keys() == ROWS.keys()
