"""Sizes, offsets, strides, guard bands: the kernel path on tensors of every shape and layout.

On a GPU both backends run. Without one the Triton kernels run in the interpreter:
`TRITON_INTERPRET=1 pytest tests/test_layouts.py -m "not gpu"`.
"""

import functools

import pytest
import torch

from fused_act import ops
from fused_act.backends import triton
from fused_act.families import elementwise, raw_op
from tests import accuracy
from tests.cases import (
    BACKENDS,
    CASES,
    DEVICE,
    GRAD_LAYOUTS,
    INTERPRET,
    LARGE,
    LAYOUTS,
    SIZES,
    Guarded,
    all_backends,
    all_cases,
    all_dtypes,
    all_layouts,
)

pytestmark = pytest.mark.usefixtures("forced")


def steps(x):
    """The strides that something steps by: torch's ops differ in those of sizes 0 and 1."""
    return [step for size, step in zip(x.shape, x.stride()) if size > 1] if x.numel() else []


def check(case, x, *make_grad_outputs):
    """y, with and without grad, and grad_input: values, and torch's strides."""
    x = x.detach().requires_grad_()
    expected = case.torch_function(x.detach())
    y, inference = case.function(x), case.function(x.detach())
    for result in (y.detach(), inference):
        assert result.shape == expected.shape
        assert steps(result) == steps(expected)
        accuracy.assert_near(case, "forward", result, x)
    for make_grad_output in make_grad_outputs:
        grad_output = make_grad_output(y)
        (grad_input,) = torch.autograd.grad(y, x, grad_output, retain_graph=True)
        assert grad_input.stride() == torch.empty_like(x).stride()
        accuracy.assert_near(case, "derivative", grad_input, x, grad_output)


@all_cases
@all_backends
@all_dtypes
@all_layouts
def test_layouts(case, backend, dtype, layout):
    """Every layout of x, each with every layout of grad_output."""
    x = LAYOUTS[layout](dtype=dtype, device=DEVICE)
    before = x.clone()
    check(case, x, *GRAD_LAYOUTS.values())
    assert torch.equal(x, before)


@all_cases
@all_backends
@all_dtypes
def test_sizes_and_offsets(case, backend, dtype):
    """Every size, at every storage offset; at one of them in the interpreter, which sees none."""
    for size in SIZES:
        for offset in [size % 9] if INTERPRET else range(9):
            x = 4 * torch.randn(size + offset, device=DEVICE).to(dtype)[offset:]
            check(case, x, torch.randn_like)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
@all_backends
def test_a_large_odd_size(case, backend):
    check(case, 4 * torch.randn(LARGE, device=DEVICE).bfloat16(), torch.randn_like)


@all_cases
@all_backends
def test_negative_bit_views(case, backend):
    """Their data_ptr() leads to values of the other sign."""
    x = torch.randn(9, dtype=torch.complex64, device=DEVICE).conj().imag
    assert x.is_neg()
    accuracy.assert_near(case, "forward", case.function(x), x.resolve_neg())
    leaf = torch.randn(9, device=DEVICE, requires_grad=True)
    grad_output = torch.randn(9, dtype=torch.complex64, device=DEVICE).conj().imag
    (grad,) = torch.autograd.grad(case.function(leaf), leaf, grad_output)
    accuracy.assert_near(case, "derivative", grad, leaf, grad_output.resolve_neg())


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_one_by_one_images_are_not_copied(backend):
    """channels_last and contiguous differ there in strides that nothing steps by."""
    from fused_act.backends.triton.tiles import with_layout_of

    contiguous = torch.randn(3, 5, 1, 1, device=DEVICE)
    channels_last = contiguous.as_strided((3, 5, 1, 1), (5, 1, 5, 5))
    assert with_layout_of(channels_last, contiguous) is contiguous
    other = torch.randn(5, 3, 1, 1, device=DEVICE).transpose(0, 1)
    copy = with_layout_of(contiguous, other)
    assert copy.stride() == contiguous.stride()
    assert torch.equal(copy, other)


@all_cases
@all_backends
@all_dtypes
def test_nothing_outside_out_is_written(case, backend, dtype):
    forward_out = ops.kernels(f"fused_act_{backend}")[case.name].forward_out
    for size in SIZES:
        x = 4 * torch.randn(size, device=DEVICE).to(dtype)
        out = Guarded(size, dtype, offset=size % 9, device=DEVICE)
        forward_out(x, *case.parameters, out=out.inside)
        accuracy.assert_near(case, "forward", out.inside, x)
        out.assert_untouched_outside()


@all_cases
@pytest.mark.parametrize("backend", BACKENDS[:1])
@all_dtypes
def test_nothing_outside_an_allocation_is_written(case, backend, dtype, monkeypatch):
    """y, mask and grad_input, which the Triton backend allocates, each between guard bands."""
    allocated = []

    def empty_strided(size, stride, dtype, device):
        numel = torch.Size(size).numel()
        allocated.append(Guarded(numel, dtype, device=device))
        return allocated[-1].inside.as_strided(size, stride, allocated[-1].inside.storage_offset())

    def empty_like(x):
        stride = torch.empty_like(x, device="meta").stride()
        return empty_strided(x.shape, stride, x.dtype, x.device)

    class Torch:
        """torch, as what allocates sees it, with guarded allocations."""

        __getattr__ = staticmethod(functools.partial(getattr, torch))

    guarded = Torch()
    guarded.empty_like, guarded.empty_strided = empty_like, empty_strided
    guarded.empty = lambda size, dtype, device: empty_strided(size, (1,), dtype, device)
    monkeypatch.setattr(raw_op, "torch", guarded)
    monkeypatch.setattr(elementwise, "torch", guarded)
    kernels = triton.implementations(case.activation)
    for size in SIZES:
        x = 4 * torch.randn(size, device=DEVICE).to(dtype)
        grad_output = torch.randn_like(x)
        layout, backward = (), f"{case.name}_backward"
        if case.activation.saves == "mask":
            y, saved = kernels[f"{case.name}_with_mask"](x, *case.parameters)
            layout = ([1],)
        else:
            y = kernels[case.name](x, *case.parameters)
            saved = y if case.activation.saves == "y" else x
            backward += "_from_output" * (saved is y)
        grad = kernels[backward](grad_output, saved, *case.parameters, *layout)
        accuracy.assert_near(case, "forward", y, x)
        accuracy.assert_near(case, "derivative", grad, x, grad_output)
    assert len(allocated) == len(SIZES) * (3 if case.activation.saves == "mask" else 2)
    for output in allocated:
        output.assert_untouched_outside()
