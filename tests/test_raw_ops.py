"""The raw ops of each backend: what they compute and return, and what they refuse.

On a GPU both backends run, without one the Triton kernels in the interpreter.
"""

import contextlib
import itertools

import pytest
import torch

from fused_act.activations import ROWS
from fused_act.families.mirrored import Mirrored
from tests.shared import accuracy, matrices
from tests.shared.cases import (
    BACKENDS,
    DEVICE,
    all_backends,
    all_dtypes,
    elementwise_rows,
    kernels,
    of_family,
)
from tests.shared.layouts import make

pytestmark = pytest.mark.usefixtures("forced")


@elementwise_rows
@all_backends
def test_raw_ops_refuse_autograd(case, backend):
    x = torch.randn(3, device=DEVICE, requires_grad=True)
    table = kernels(backend, case)
    with pytest.raises(RuntimeError, match=f"call fused_act.{case.name}"):
        table.forward(x, *case.parameters)
    with torch.no_grad():
        accuracy.assert_near(case, "forward", table.forward(x, *case.parameters), x)
    x = x.detach()
    with pytest.raises(RuntimeError, match=f"call fused_act.{case.name}"):
        torch.func.jvp(lambda x: table.forward(x, *case.parameters), (x,), (x,))


@elementwise_rows
@all_backends
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_raw_backward_checks_its_arguments(case, backend, mode):
    """Under Autograd, and in inference mode below it, where each backend checks by itself."""
    x = torch.randn(4, 6, device=DEVICE)
    table = kernels(backend, case)
    backward = table.backward or table.backward_from_output
    if case.row.saves == "mask":
        y, mask = table.forward_with_mask(x, *case.parameters)
        assert mask.shape == (3,)
        stride = list(y.stride())
        wrong = [
            (y.double(), mask, stride),
            (y, mask.float(), stride),
            (y, mask[:2], stride),
            (y, torch.zeros(6, dtype=torch.uint8, device=DEVICE)[::2], stride),
            (y, mask, [6]),
            (y, mask, [7, 1]),
            (y, mask, [3, 2]),  # overlapping, in as much memory as there is
            (y, mask, [-6, 1]),
        ]
    else:
        wrong = [
            (torch.randn(4, 5, device=DEVICE), x),
            (torch.randn(1, 6, device=DEVICE), x),
            (torch.randn(6, 4, device=DEVICE), x),
            (torch.randn(8, 6, device=DEVICE), x),
            (torch.randn(4, 6, device=DEVICE, dtype=torch.float16), x),
        ]
    errors = (TypeError, ValueError) if mode is contextlib.nullcontext else Exception
    for grad_output, saved, *layout in wrong:
        with mode(), pytest.raises(errors, match=r"(_backward\w*|fused_act): expected"):
            backward(grad_output, saved, *case.parameters, *layout)


@elementwise_rows
@all_backends
def test_raw_backward_refuses_mixed_devices(case, backend):
    x = torch.randn(4, 6, device=DEVICE)
    saved, layout = x.to("meta"), ()
    if case.row.saves == "mask":
        saved, layout = torch.empty(3, dtype=torch.uint8, device="meta"), ([6, 1],)
    table = kernels(backend, case)
    backward = table.backward or table.backward_from_output
    with pytest.raises(ValueError, match=rf"{case.name}_backward\w*: expected .* on "):
        backward(x, saved, *case.parameters, *layout)


@elementwise_rows
@all_backends
def test_raw_out_op(case, backend):
    table = kernels(backend, case)
    x = torch.randn(5, 7, device=DEVICE)
    for out in (torch.empty(5, 7, device=DEVICE), torch.empty(7, 5, device=DEVICE).t()):
        version = out._version
        assert table.forward_out(x, *case.parameters, out=out) is None
        assert out._version > version
        accuracy.assert_near(case, "forward", out, x)
    gapped = torch.full((5, 14), 77.0, device=DEVICE)
    table.forward_out(x, *case.parameters, out=gapped[:, ::2])
    accuracy.assert_near(case, "forward", gapped[:, ::2], x)
    assert (gapped[:, 1::2] == 77).all()
    buffer = torch.linspace(-3, 8, 12291, device=DEVICE)
    before = buffer[:-1].clone()
    table.forward_out(buffer[:-1], *case.parameters, out=buffer[1:])
    accuracy.assert_near(case, "forward", buffer[1:], before)
    for wrong, error in (
        (torch.empty(5, 6, device=DEVICE), ValueError),
        (torch.empty(5, 7, device=DEVICE, dtype=torch.float16), TypeError),
    ):
        with pytest.raises(error, match=f"{case.name}.out: expected"):
            table.forward_out(x, *case.parameters, out=wrong)


@elementwise_rows
@all_backends
@all_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gapped_permuted", "scalar"])
def test_opcheck(case, backend, dtype, layout):
    x = make(layout, dtype)
    table, parameters = kernels(backend, case), case.parameters
    y = torch.zeros_like(x)
    grad_output = torch.randn(y.shape[::-1], dtype=dtype, device=DEVICE)
    grad_output = grad_output.permute(tuple(range(y.dim()))[::-1])
    calls = [
        (table.forward, (x, *parameters), {}),
        (table.forward_out, (x, *parameters), {"out": y}),
    ]
    if case.row.saves == "mask":
        mask = table.forward_with_mask(x, *parameters)[1]
        calls += [
            (table.forward_with_mask, (x, *parameters), {}),
            (table.forward_with_mask_out, (x, *parameters), {"out": y}),
            (table.backward, (grad_output, mask, *parameters, list(y.stride())), {}),
        ]
    if case.row.saves == "x":
        calls += [(table.backward, (grad_output, x, *parameters), {})]
    if table.backward_from_output is not None:
        calls += [(table.backward_from_output, (grad_output, y, *parameters), {})]
    for op, args, kwargs in calls:
        torch.library.opcheck(op, args, kwargs)


@of_family("weighted")
@all_backends
def test_weighted_opcheck(case, backend):
    table = kernels(backend, case)
    for layout, per_channel in itertools.product(matrices.PERMUTATIONS, (False, True)):
        x, weight = matrices.inputs((3, 4, 5), layout, torch.float32, per_channel)
        torch.library.opcheck(table.forward, (x, weight))
        torch.library.opcheck(table.backward, (torch.randn_like(x), x, weight))
        with pytest.raises(RuntimeError, match="has no derivative; call fused_act"):
            table.forward(x, weight.requires_grad_())


@of_family("weighted")
@all_backends
def test_weighted_raw_ops_refuse_what_kernels_cannot_take(case, backend):
    op = kernels(backend, case).forward
    x = torch.randn(2, 3, 4, device=DEVICE)
    for weight, error, text in (
        (torch.ones(4, device=DEVICE), ValueError, r"shape \(1,\) or \(3,\)"),
        (torch.ones(3, 1, device=DEVICE), ValueError, r"got \(3, 1\)"),
        (torch.ones(3, device=DEVICE).double(), TypeError, "float32, got torch.float64"),
        (torch.ones(3, device="meta"), ValueError, "weight on"),
    ):
        with pytest.raises(error, match=text):
            op(x, weight)


@of_family("mirrored")
@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gapped_permuted"])
def test_mirrored_opcheck(case, backend, layout):
    table, x = kernels(backend, case), make(layout, torch.bfloat16)
    dense = torch.empty_like(x)
    y, mask = table.forward_with_mask(x, -2)
    grad_output = torch.randn(y.shape[::-1], dtype=y.dtype, device=DEVICE)
    grad_output = grad_output.permute(tuple(range(y.dim()))[::-1])
    torch.library.opcheck(table.forward, (x, -2))
    torch.library.opcheck(table.forward_with_mask, (x, -2))
    torch.library.opcheck(table.backward, (grad_output, mask, -2, list(dense.stride())))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_mirrored_driver_takes_another_activation(backend):
    """It knows none by name; csrc/register.cu has no other for the CUDA driver."""
    from fused_act.backends import triton

    row = Mirrored(name="mirrored", spelling="MirroredReLU6", derived_from=ROWS["relu6"])
    run = triton.implementations(row)
    x = (6 * torch.randn(5, 3, 11, device=DEVICE)).requires_grad_()
    expected = row.torch_forward(x, 2)
    matrices.assert_equal(run["mirrored"](x.detach(), 2), expected.detach())
    y, mask = run["mirrored_with_mask"](x.detach(), 2)
    matrices.assert_equal(y, expected.detach())
    grad_output = torch.randn_like(y)
    (grad,) = torch.autograd.grad(expected, x, grad_output)
    matrices.assert_equal(run["mirrored_backward"](grad_output, mask, 2, list(x.stride())), grad)


@of_family("mirrored")
@all_backends
def test_mirrored_raw_ops_check_their_arguments(case, backend):
    table = kernels(backend, case)
    x = torch.randn(4, 6, device=DEVICE)
    y, mask = table.forward_with_mask(x, 1)
    for args, error, match in (
        (
            (x, 2),
            IndexError,
            rf"{case.name}: expected dim between -2 and 1, got 2 for shape \(4, 6\)",
        ),
        ((x[0, 0], 0), IndexError, "expected dim x with dimensions, got 0"),
        ((x.double(), 1), TypeError, "expected float16, bfloat16 or float32"),
    ):
        with pytest.raises(error, match=match):
            table.forward(*args)
    stride = [6, 1]
    for args, error, match in (
        ((y[:, 1:], mask, 1, stride), ValueError, "of even size along dim 1, got 11"),
        ((y, mask, 2, stride), IndexError, "expected dim between"),
        ((y, mask.float(), 1, stride), TypeError, "expected mask to be uint8"),
        ((y, mask.flatten(), 1, stride), ValueError, r"mask of shape \(4, 2, 1\)"),
        ((y, mask[:3], 1, stride), ValueError, r"mask of shape \(4, 2, 1\)"),
        ((y, mask.to("meta"), 1, stride), ValueError, "expected mask on"),
        ((y, mask, 1, [12, 1]), ValueError, r"dense tensor of shape \(4, 6\)"),
        ((y, mask, 1, [1]), ValueError, r"dense tensor of shape \(4, 6\)"),
    ):
        with pytest.raises(error, match=match):
            table.backward(*args)
    with pytest.raises(RuntimeError, match=rf"call fused_act\.{case.name}"):
        table.forward(x.requires_grad_(), 1)
