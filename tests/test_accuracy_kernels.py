"""Every 16-bit input, and fp32 in every binade, through the kernels of each backend.

On a GPU both backends run, and all 2^32 inputs of fp32. Without one the Triton kernels run in the
interpreter: `TRITON_INTERPRET=1 pytest tests/test_accuracy_kernels.py -m "not gpu"`.
"""

import pytest
import torch

import fused_act
from benchmarks import oracle
from fused_act import dispatch
from tests import accuracy
from tests.cases import (
    CASES,
    DEVICE,
    INTERPRET,
    OF_OUTPUT,
    all_accuracy_cases,
    all_backends,
    all_dtypes,
    both_16_bit_dtypes,
)

KINDS = ("forward", "derivative")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """The interpreter takes its time for a block, whatever its size: let it take 2^20 elements."""
    if INTERPRET:
        from fused_act.backends.triton import elementwise

        monkeypatch.setattr(elementwise, "block_size", lambda dtype: 2**20)


def pair(case, backend, x):
    """f(x) and f'(x) by `backend`."""
    x = x.detach().to(DEVICE).requires_grad_()
    with fused_act.use_backend(backend):
        y = case.function(x)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@all_accuracy_cases
@all_backends
@both_16_bit_dtypes
def test_every_16_bit_input(case, backend, dtype):
    x = oracle.all_finite(dtype)
    results = pair(case, backend, x)
    if INTERPRET and dtype is torch.bfloat16:
        accuracy.check_interpreted_bf16(case, x, *results)
        return
    for kind, result in zip(KINDS, results):
        accuracy.check(case, kind, x, result, y=results[0])


@all_accuracy_cases
@all_backends
def test_fp32_in_every_binade(case, backend):
    x = accuracy.stratified_fp32()
    results = pair(case, backend, x)
    for kind, result in zip(KINDS, results):
        accuracy.check(case, kind, x, result, subject=f"{backend} kernels", y=results[0])


@pytest.mark.parametrize("case", OF_OUTPUT, ids=str)
@all_backends
@all_dtypes
def test_from_every_output(case, backend, dtype):
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


def check_every_fp32_input(case, backends, chunks, chunk_size):
    """Gather the errors of each backend, and of torch, chunk by chunk of consecutive bits."""
    errors = {
        (backend, kind): accuracy.Errors(
            case,
            kind,
            torch.float32,
            accuracy.FORWARD if kind == "forward" else accuracy.DERIVATIVE,
        )
        for backend in (*backends, "torch")
        for kind in KINDS
    }
    for chunk in chunks:
        bits = torch.arange(chunk_size, device=DEVICE) + (chunk * chunk_size - 2**31)
        x = bits.to(torch.int32).view(torch.float32)
        x = x[x.isfinite()]
        results = {backend: pair(case, backend, x) for backend in (*backends, "torch")}
        for i, kind in enumerate(KINDS):
            for backend, found in results.items():
                exact = accuracy.true_value(case, kind, x, found[0])
                errors[backend, kind].add(x, found[i], exact)
    for (backend, _), found in errors.items():
        accuracy.report(f"{backend}, all 2^32 inputs", found)
        if backend != "torch":
            found.check()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_fp32_input(case):
    check_every_fp32_input(case, ("triton", "cuda"), range(64), 2**26)


@pytest.mark.skipif(not INTERPRET, reason="for Triton's interpreter")
def test_every_fp32_input_gathers_chunks(monkeypatch):
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


@all_accuracy_cases
@all_backends
@all_dtypes
def test_specials_in_every_lane(case, backend, dtype):
    """In every lane of a vector, and at every place of a tail."""
    specials = accuracy.specials(dtype)
    x = specials.repeat(4096 // len(specials) + 8)
    y, derivative = pair(case, backend, x)
    if not (INTERPRET and dtype is torch.bfloat16):
        accuracy.check_specials(case, x, y, derivative)
        return
    finite = x.isfinite()
    accuracy.check_interpreted_bf16(case, x[finite], y[finite], derivative[finite])
    accuracy.check_specials(case, x[~finite], y[~finite], derivative[~finite])
