"""On a CPU, and for everything unusual, results and gradients are torch's own, bit for bit."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fused_act
from tests.shared import matrices
from tests.shared.cases import DEVICE, all_dtypes, elementwise_rows, of_family
from tests.shared.layouts import LAYOUTS, all_layouts


def gradients(function, x, weight):
    """y, dy and ddy: the second derivative through a cubed gradient, so that it is not 0."""
    x = x.detach().requires_grad_()
    y = function(x)
    (first,) = torch.autograd.grad(y, x, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), x)
    return y, first, second


@elementwise_rows
@all_dtypes
@all_layouts
def test_bits_are_torchs(case, dtype, layout):
    x = LAYOUTS[layout](dtype=dtype)
    weight = torch.randn_like(x)
    for ours, theirs in zip(
        gradients(case.function, x, weight), gradients(case.torch_function, x, weight)
    ):
        # torch's own second derivative of mish overflows to NaN in fp16.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert ours.stride() == theirs.stride()


@elementwise_rows
@pytest.mark.parametrize("dtype", [torch.float64])
def test_other_dtypes_are_torchs(case, dtype):
    x = torch.randn(64, dtype=dtype, requires_grad=True)
    assert torch.equal(case.function(x), case.torch_function(x))
    for function in (case.function, lambda x: case.row.Function.apply(x, *case.parameters)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_gradient_of_complex_swish():
    x = torch.randn(9, dtype=torch.complex128, requires_grad=True)
    for beta in (1.0, 1.702):
        assert torch.autograd.gradcheck(fused_act.SwishFunction.apply, (x, beta))
    assert torch.autograd.gradgradcheck(fused_act.SwishFunction.apply, (x, 1.702))


@elementwise_rows
def test_specials_are_torchs(case):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3.4e38, -3.4e38])
    torch.testing.assert_close(
        case.function(x), case.torch_function(x), rtol=0, atol=0, equal_nan=True
    )


@elementwise_rows
def test_inplace_is_torchs(case):
    for requires_grad in (False, True):
        x = torch.randn(33, requires_grad=requires_grad)
        ours, theirs = x * 1, x * 1
        version = ours._version
        result = case.function(ours, inplace=True)
        assert result is ours
        assert ours._version > version
        expected = case.torch_function(theirs, inplace=False)
        assert torch.equal(ours, expected)
        if requires_grad:
            (grad,) = torch.autograd.grad(result.sum(), x)
            torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])
    leaf = torch.randn(3, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        case.function(leaf, inplace=True)
    assert torch.equal(leaf, before)


def test_tensor_subclass_reaches_torchs_own_op():
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    assert type(fused_act.mish(torch.randn(3).as_subclass(Logged))) is Logged
    assert F.mish in seen


def test_meta_and_fake_tensors():
    assert fused_act.mish(torch.empty(3, 4, device="meta")).shape == (3, 4)
    with torch._subclasses.FakeTensorMode():
        assert fused_act.relu6(torch.empty(3, 4, device="cuda")).device.type == "cuda"


@of_family("weighted")
def test_weighted_bits_are_torchs(case):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype, shape in itertools.product(dtypes, matrices.SHAPES):
        if DEVICE == "cuda" and dtype is not torch.float64:
            continue
        x, weight = matrices.inputs(shape, "contiguous", dtype, True, dtype)
        x.requires_grad_()
        weight.requires_grad_()
        y, expected = case.facts.function(x, weight), case.row.torch_forward(x, weight)
        assert torch.equal(y, expected)
        grads = (torch.autograd.grad(each.sum(), (x, weight)) for each in (y, expected))
        assert all(map(torch.equal, *grads))


@of_family("mirrored")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_mirrored_function(case, requires_grad):
    """As the function, and its second derivative is right."""
    apply = case.row.Function.apply
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=requires_grad)
    matrices.assert_equal(apply(x, -1), case.facts.torch_function(x, -1))
    if requires_grad:
        torch.autograd.gradcheck(apply, (x, 1))
        torch.autograd.gradgradcheck(apply, (x, 1))


@of_family("mirrored")
def test_mirrored_transforms_get_torchs_ops(case):
    x = torch.randn(3, 4)

    def results(function):
        def along_0(x):
            return function(x, 0)

        jacobian, vector = torch.func.jacrev(along_0)(x), torch.func.jvp(along_0, (x,), (x,))
        return torch.func.vmap(along_0)(x), jacobian, *vector

    for function in (case.facts.function, case.row.Function.apply):
        for ours, theirs in zip(results(function), results(case.facts.torch_function)):
            matrices.assert_equal(ours, theirs)
