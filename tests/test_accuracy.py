"""Every 16-bit input, and fp32 in every binade: torch's fallback, the formula, every kernel.

The CUDA C++ functors run on the host. On a GPU both backends run, and all 2^32 inputs of fp32.
Without one the Triton kernels run in the interpreter: `TRITON_INTERPRET=1 pytest tests`.
"""

import pytest
import torch

import fused_act
from fused_act import dispatch
from tests.shared import accuracy
from tests.shared.cases import (
    ACCURACY_CASES,
    CASES,
    DEVICE,
    ELEMENTWISE,
    INTERPRET,
    OF_OUTPUT,
    all_accuracy_cases,
    all_backends,
    all_dtypes,
    both_16_bit_dtypes,
    elementwise_accuracy_cases,
    of_family,
)
from tests.shared.compiling import COMPILER
from tests.shared.matrices import assert_equal
from tests.shared.ulp import all_values

KINDS = ("forward", "derivative")
UP, DOWN = ((2, 1), (-2, -1))  # what is added to every 2^x and 1 / x, in ULP
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def gradient(function, x):
    """f(x) and the gradient for a grad_output of 1."""
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


# What runs where no kernel does.


@elementwise_accuracy_cases
@all_dtypes
def test_the_fallback_is_torchs_own(case, dtype):
    """So it is as accurate as torch, and exempt from the gates: every bit is the same."""
    x = accuracy.stratified_fp32(256) if dtype is torch.float32 else all_values(dtype)
    for ours, theirs in zip(gradient(case.function, x), gradient(case.torch_function, x)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


FUSED = [case for case in ELEMENTWISE if case.row.fuses(*case.parameters)]


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
    return {
        case: dict(zip(KINDS, (y.detach(), dy))) for case, y, dy in zip(FUSED, outputs, derivatives)
    }


def eager(x):
    """Every formula of `x` as torch ops compute it one by one."""
    return {
        case: {
            kind: getattr(case.row, kind)(x.float(), *case.parameters).to(x.dtype) for kind in KINDS
        }
        for case in FUSED
    }


@needs_compiler
@pytest.mark.parametrize("compute", [eager, compiled], ids=lambda compute: compute.__name__)
@all_dtypes
def test_formula(compute, dtype):
    x = accuracy.inputs(dtype)
    for case, results in compute(x).items():
        tolerances = dict.fromkeys(KINDS, accuracy.FORMULA_WITH_BETA) if case.parameters else None
        subject = f"formula, {compute.__name__}"
        accuracy.check_all(case, x, results, tolerances, subject, are_inputs=True)


@pytest.mark.parametrize("case", FUSED, ids=str)
@all_dtypes
def test_specials_of_the_formula(case, dtype):
    x = accuracy.specials(dtype)
    results = [getattr(case.row, kind)(x.float(), *case.parameters).to(dtype) for kind in KINDS]
    accuracy.check_specials(case, x, *results)


# The CUDA C++ functors and loops, on the host.


@all_accuracy_cases
@all_dtypes
@pytest.mark.exhaustive
def test_functors(case, dtype, host_of):
    """With correctly rounded 2^x and 1 / x."""
    x = accuracy.inputs(dtype, case)
    results = host_of(case).evaluate(x)
    accuracy.check_all(case, x, results, subject="CUDA functors", are_inputs=True)


# What is mirrored computes exactly.
APPROXIMATE = [case for case in ACCURACY_CASES if case.row.family != "mirrored"]


@pytest.mark.parametrize("case", APPROXIMATE, ids=str)
@all_dtypes
@pytest.mark.parametrize("errors", [UP, DOWN, (-2, 1), (2, -1)], ids=str)
def test_functors_with_the_errors_of_the_hardware(case, dtype, errors, host_of):
    """Up to what the PTX manual allows ex2.approx and rcp.approx."""
    host = host_of(case)
    host.library.set_errors(*errors)
    x = accuracy.inputs(dtype, case)
    accuracy.check_all(
        case, x, host.evaluate(x), accuracy.PERTURBED, "CUDA functors, perturbed", are_inputs=True
    )


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_mean_error_is_near_torchs(case, host_of):
    """Of torch's CPU op, region by region: it is at most a quarter more, in Swish.

    A region of a few dozen inputs says nothing.
    """
    x = accuracy.stratified_fp32()
    theirs = dict(zip(KINDS, gradient(case.torch_function, x)))
    results = host_of(case).evaluate(x)
    for kind, result in results.items():
        ours = accuracy.check(case, kind, x, result, y=results["forward"])
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


@elementwise_accuracy_cases
@all_dtypes
def test_functors_of_specials_in_every_lane(case, dtype, host_of):
    """In every lane of a vector, and at every place of a tail."""
    host = host_of(case)
    specials = accuracy.specials(dtype)
    assert len(specials) % 2 == 1
    count = 1 + (host.tile(dtype) + 8 * len(specials)) // len(specials)
    x = specials.repeat(count)
    accuracy.check_specials(case, x, *host.evaluate(x).values())


def test_the_host_stands_in_for_the_instructions(host_of):
    """ex2.approx.ftz and rcp.approx.ftz flush subnormals; the tests above rest on it."""
    library = host_of(CASES[0]).library
    assert library.run_exp2(-126.0) == 2.0**-126
    assert library.run_exp2(-126.5) == 0.0
    assert library.run_exp2(128.0) == float("inf")
    assert library.run_reciprocal(2.0**126) == 2.0**-126
    assert library.run_reciprocal(2.0**127) == 0.0
    assert library.run_reciprocal(2.0**-127) == float("inf")
    library.set_errors(2, -1)
    assert library.run_exp2(0.0) == 1.0 + 2 * 2.0**-23
    assert library.run_reciprocal(1.0) == 1.0 - 2.0**-24


# The kernels.


@pytest.fixture
def large_blocks(monkeypatch):
    """The interpreter takes its time for a block, whatever its size.

    Triton has none of more than 2^20 elements; one of weighted backward is twice as large.
    """
    if INTERPRET:
        from fused_act.backends.triton import elementwise, mirrored, weighted

        monkeypatch.setattr(elementwise, "block_size", lambda dtype: 2**20)
        monkeypatch.setattr(weighted, "block_size", lambda dtype: 2**19)
        monkeypatch.setattr(mirrored, "tile", lambda columns, dtype: (1, 2**15))


def through_kernels(case, backend, x):
    """The results of `accuracy.evaluate` by `backend`."""
    kernels = dispatch.BACKENDS[backend].ready().kernels[case.name]
    with fused_act.use_backend(backend):
        return accuracy.evaluate(case, x.to(DEVICE), kernels)


@all_accuracy_cases
@all_backends
@both_16_bit_dtypes
@pytest.mark.exhaustive
def test_every_16_bit_input(case, backend, dtype, large_blocks):
    x = accuracy.inputs(dtype)
    results = through_kernels(case, backend, x)
    accuracy.check_all(case, x, results, interpreted=INTERPRET, are_inputs=True)


@all_accuracy_cases
@all_backends
def test_fp32_in_every_binade(case, backend, large_blocks):
    x = accuracy.inputs(torch.float32, case)
    results = through_kernels(case, backend, x)
    accuracy.check_all(case, x, results, subject=f"{backend} kernels", are_inputs=True)


@pytest.mark.parametrize("case", OF_OUTPUT, ids=str)
@all_backends
@all_dtypes
def test_from_every_output(case, backend, dtype, large_blocks):
    """So in place too, where elsewhere the input is saved."""
    y = accuracy.outputs(case, dtype)
    kernels, tolerance = dispatch.BACKENDS[backend].ready().kernels[case.name], accuracy.DERIVATIVE
    if INTERPRET and dtype is torch.bfloat16:
        y, tolerance = y[y.abs() >= torch.finfo(dtype).tiny], accuracy.INTERPRETED_BF16
    on_device = y.to(DEVICE)
    derivative = kernels.backward_from_output(
        torch.ones_like(on_device), on_device, *case.parameters
    )
    accuracy.check_from_output(case, y, derivative.cpu(), tolerance)


def check_every_fp32_input(case, backends, chunks, chunk_size, part=0, parts=1):
    """Gather the errors of each backend, and of torch, chunk by chunk of consecutive bits.

    Of each `parts` inputs side by side it takes the one that `part` says.
    """
    errors = {
        (backend, kind): accuracy.Errors(case, kind, torch.float32, accuracy.tolerance_of(kind))
        for backend in (*backends, "torch")
        for kind in KINDS
    }
    for chunk in chunks:
        bits = (torch.arange(chunk_size, device=DEVICE) + chunk * chunk_size) * parts + part - 2**31
        x = bits.to(torch.int32).view(torch.float32)
        x = x[x.isfinite()]
        for backend in (*backends, "torch"):
            with fused_act.use_backend(backend):
                y, derivative = gradient(case.function, x)
            for kind, result in zip(KINDS, (y, derivative)):
                exact = accuracy.true_value(case, kind, x, y)
                errors[backend, kind].add(x, result, exact)
    for (backend, _), found in errors.items():
        which = "all" if parts == 1 else f"each {parts}th of all"
        accuracy.report(f"{backend}, {which} 2^32 inputs", found)
        if backend != "torch":
            found.check()


EIGHTHS = pytest.mark.parametrize("part", range(8), ids=lambda part: f"part{part}")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@EIGHTHS
def test_every_fp32_input(case, part):
    """In eight parts, of which `make gpu-test` runs one for each row."""
    check_every_fp32_input(case, ("triton", "cuda"), range(8), 2**26, part, 8)


@pytest.mark.interpreted
def test_every_fp32_input_gathers_chunks(monkeypatch, large_blocks):
    """Two chunks around -1, in the interpreter: the code that a GPU runs on all of them."""
    monkeypatch.setattr(accuracy, "REPORT", {})
    one = 0x3F800000 // 2**16
    check_every_fp32_input(CASES[0], ("triton",), (one - 1, one), 2**16)
    (maximum, mean, at, _, count) = accuracy.REPORT[
        "triton, all 2^32 inputs", CASES[0].name, "forward", "x >= -87"
    ]
    assert count == 2**17
    assert 0.5 < maximum < 4
    assert 0 < mean < 1
    assert -1.01 < at < -0.99


@elementwise_accuracy_cases
@all_backends
@all_dtypes
def test_specials_in_every_lane(case, backend, dtype, large_blocks):
    """In every lane of a vector, and at every place of a tail."""
    specials = accuracy.specials(dtype)
    x = specials.repeat(4096 // len(specials) + 8)
    results = through_kernels(case, backend, x)
    if not (INTERPRET and dtype is torch.bfloat16):
        accuracy.check_specials(case, x, *results.values())
        return
    finite = x.isfinite()
    at_finite = {kind: result[finite] for kind, result in results.items()}
    accuracy.check_all(case, x[finite], at_finite, interpreted=True)
    not_finite = (result[~finite] for result in results.values())
    accuracy.check_specials(case, x[~finite], *not_finite)


@of_family("mirrored")
@all_backends
@both_16_bit_dtypes
def test_mirrored_is_torchs_at_every_16_bit_value(case, backend, dtype):
    """NaN, infinities and zeros of both signs among them, in gradients too."""
    x = all_values(dtype).to(DEVICE).view(512, 128)
    if INTERPRET and dtype is torch.bfloat16:  # which mangles the subnormal ones
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
    # Where x is NaN both halves pass. The interpreter truncates their difference to bf16, but has
    # these exactly.
    weight = torch.tensor([1.0, -2.0, float("inf"), float("nan"), 0.0, -3.0, float("-inf")])
    with fused_act.use_backend(backend):
        grads = []
        for function in (case.function, case.torch_function):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            grad_output = weight.to(dtype).to(DEVICE).repeat(-(-y.numel() // 7))[: y.numel()]
            grads.append((y, *torch.autograd.grad(y, leaf, grad_output.view(y.shape))))
    for ours, theirs in zip(*grads):
        assert_equal(ours, theirs)


@of_family("mirrored")
@both_16_bit_dtypes
def test_mirrored_host_is_torchs_at_every_16_bit_value(case, dtype, host_of):
    x, host = all_values(dtype).view(512, 128), host_of(case)
    y, mask = x.new_empty(512, 2, 128), torch.empty(512, 2, 16, dtype=torch.uint8)
    host.forward(x, y, mask)
    leaf = x.clone().requires_grad_()
    expected = case.torch_function(leaf)
    assert_equal(y.flatten(1), expected.detach())
    grad_output = x.flip(0).repeat(1, 2)
    grad = torch.empty_like(x)
    host.backward(grad_output, mask, grad)
    assert_equal(grad, torch.autograd.grad(expected, leaf, grad_output)[0])
