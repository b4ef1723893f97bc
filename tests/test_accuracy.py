"""Every 16-bit input, and fp32 in every binade: the fallback, the formula, the CUDA functors.

The Triton kernels, and all kernels on a GPU, are in test_accuracy_kernels.py.
"""

import functools

import pytest
import torch

from benchmarks import oracle
from tests import accuracy
from tests.cases import ACCURACY_CASES, OF_OUTPUT, PARAMETERS, all_accuracy_cases, all_dtypes, cases
from tests.host_kernels import COMPILER

KINDS = ("forward", "derivative")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@functools.cache
def exact(case, kind, dtype):
    return accuracy.true_value(case, kind, accuracy.inputs(dtype))


def check(case, kind, result, y, tolerance=None, subject=None):
    x, expected = accuracy.inputs(result.dtype), None
    if case.activation.saves != "y":
        expected = exact(case, kind, result.dtype)
    return accuracy.check(case, kind, x, result, tolerance, subject, expected, y)


def gradient(function, x):
    """f(x) and the gradient for a grad_output of 1."""
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@all_accuracy_cases
@all_dtypes
def test_the_fallback_is_torchs_own(case, dtype):
    """So it is as accurate as torch, and exempt from the gates: every bit is the same."""
    x = accuracy.stratified_fp32(256) if dtype is torch.float32 else oracle.all_values(dtype)
    for ours, theirs in zip(gradient(case.function, x), gradient(case.torch_function, x)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


FUSED = [case for case in ACCURACY_CASES if case.activation.fuses(*case.parameters)]


def test_only_what_inductor_does_worse_emits_its_formula():
    assert {case.name for case in FUSED} == {"mish", "swish"}
    assert 1.0 not in [case.parameters[0] for case in FUSED if case.name == "swish"]


def compiled(x):
    """Every formula of `x` as Inductor computes it: f and f', in one graph for all of them."""
    inputs = [x.clone().requires_grad_() for _ in FUSED]

    @torch.compile(fullgraph=True)
    def all_of(inputs):
        return [case.function(x) for case, x in zip(FUSED, inputs)]

    torch._dynamo.reset()
    outputs = all_of(inputs)
    derivatives = torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
    return {case: (y, dy) for case, y, dy in zip(FUSED, outputs, derivatives)}


def eager(x):
    """Every formula of `x` as torch ops compute it one by one."""
    return {
        case: tuple(
            formula(x.float(), *case.parameters).to(x.dtype)
            for formula in (case.activation.forward, case.activation.derivative)
        )
        for case in FUSED
    }


@needs_compiler
@pytest.mark.parametrize("compute", [eager, compiled], ids=lambda compute: compute.__name__)
@all_dtypes
def test_formula(compute, dtype):
    for case, results in compute(accuracy.inputs(dtype)).items():
        for kind, result in zip(KINDS, results):
            tolerance = accuracy.FORMULA_WITH_BETA if case.parameters else None
            check(case, kind, result, results[0], tolerance, f"formula, {compute.__name__}")


@all_accuracy_cases
@all_dtypes
def test_functors(case, dtype, host_of):
    """The CUDA C++ functors on the host, with correctly rounded 2^x and 1 / x."""
    results = host_of(case).pair(accuracy.inputs(dtype))
    for kind, result in results.items():
        check(case, kind, result, results["forward"], subject="CUDA functors")


@all_accuracy_cases
@all_dtypes
# In ULP, up to what the PTX manual allows ex2.approx and rcp.approx.
@pytest.mark.parametrize("errors", [(2, 1), (-2, 1), (2, -1), (-2, -1)], ids=str)
def test_functors_with_the_errors_of_the_hardware(case, dtype, errors, host_of):
    host = host_of(case)
    host.library.set_errors(*errors)  # added to every 2^x and 1 / x
    results = host.pair(accuracy.inputs(dtype))
    for kind, result in results.items():
        tolerance = accuracy.PERTURBED[kind]
        check(case, kind, result, results["forward"], tolerance, "CUDA functors, perturbed")


@pytest.mark.parametrize("case", cases(PARAMETERS), ids=str)
def test_the_mean_error_is_near_torchs(case, host_of):
    """Of torch's CPU op, region by region: it is at most a quarter more, in Swish.

    A region of a few dozen inputs says nothing.
    """
    x = accuracy.stratified_fp32()
    theirs = dict(zip(KINDS, gradient(case.torch_function, x)))
    results = host_of(case).pair(x)
    for kind, result in results.items():
        ours = check(case, kind, result, results["forward"])
        torchs = accuracy.Errors(case, kind, x.dtype, accuracy.FORWARD)
        torchs.add(x, theirs[kind], accuracy.true_value(case, kind, x, theirs["forward"]))
        for where, region in ours.regions.items():
            if region.count > 100:
                assert region.mean <= 1.25 * torchs.regions[where].mean, where


@pytest.mark.parametrize("case", OF_OUTPUT, ids=str)
@all_dtypes
def test_functors_of_the_output(case, dtype, host_of):
    """Every output there can be. So in place too, where elsewhere the input is saved."""
    y = accuracy.outputs(case, dtype)
    accuracy.check_from_output(case, y, host_of(case).derivative_from_output(y))


def test_the_host_stands_in_for_the_instructions(host_libraries):
    """ex2.approx.ftz and rcp.approx.ftz flush subnormals; the tests above rest on it."""
    library = host_libraries["mish"]
    assert library.run_exp2(-126.0) == 2.0**-126
    assert library.run_exp2(-126.5) == 0.0
    assert library.run_exp2(128.0) == float("inf")
    assert library.run_reciprocal(2.0**126) == 2.0**-126
    assert library.run_reciprocal(2.0**127) == 0.0
    assert library.run_reciprocal(2.0**-127) == float("inf")
    library.set_errors(2, -1)
    try:
        assert library.run_exp2(0.0) == 1.0 + 2 * 2.0**-23
        assert library.run_reciprocal(1.0) == 1.0 - 2.0**-24
    finally:
        library.set_errors(0, 0)


@pytest.mark.parametrize("case", FUSED, ids=str)
@all_dtypes
def test_specials_of_the_formula(case, dtype):
    x = accuracy.specials(dtype)
    derivative = case.activation.derivative(x.float(), *case.parameters).to(dtype)
    y = case.activation.forward(x.float(), *case.parameters).to(dtype)
    accuracy.check_specials(case, x, y, derivative)


@all_accuracy_cases
@all_dtypes
def test_specials_in_every_lane(case, dtype, host_of):
    """In every lane of a vector, and at every place of a tail."""
    host = host_of(case)
    specials = accuracy.specials(dtype)
    assert len(specials) % 2 == 1
    count = 1 + (host.tile(dtype) + 8 * len(specials)) // len(specials)
    x = specials.repeat(count)
    accuracy.check_specials(case, x, *host.pair(x).values())
