"""What tests of activations share whose kernels see a matrix: with weights, or mirrored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_act.dispatch import DTYPES
from tests.shared import accuracy
from tests.shared.cases import DEVICE
from tests.shared.layouts import random

# x and where the channels are; sizes around tiles, odd ones, one channel.
SHAPES = [
    *((), (1,), (5,), (4099,), (0,), (0, 4), (2, 0, 3), (3, 0)),
    *((7, 3), (33, 64), (130, 1000), (5, 1), (2, 3, 7), (2, 64, 49), (3, 5, 2)),
    *((2, 3, 4, 8), (1, 1, 40, 40), (2, 3, 32, 65), (1, 1000, 1, 1), (2, 64, 8, 8), (2, 2, 4097)),
]
# Around the ends of mask bytes and of tiles, which have 4,096 bytes.
COLUMNS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 48, 63, 1023, 1024, 1025, 2048, 2056, 4097)
PERMUTATIONS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x,
    "reversed": lambda x: (
        x.permute(tuple(range(x.dim()))[::-1]).contiguous().permute(tuple(range(x.dim()))[::-1])
    ),
    "gapped": lambda x: torch.stack([x, x], -1)[..., 0],
}
all_permutations = pytest.mark.parametrize("layout", PERMUTATIONS)


def shapes_and_dtypes(layout: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Every shape in a dtype, another one in each layout."""
    first = list(PERMUTATIONS).index(layout)
    return [(shape, DTYPES[(first + i) % 3]) for i, shape in enumerate(SHAPES)]


def inputs(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    per_channel: bool,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """x and its weight."""
    x = 4 * torch.randn(shape, device=DEVICE) if shape == () else random(*shape, device=DEVICE)
    count = shape[1] if per_channel and len(shape) > 1 else 1
    weight = torch.rand(count, device=DEVICE).to(weight_dtype)
    return PERMUTATIONS[layout](x.to(dtype)), weight


def check_gradients(case, x, weight, grad_output, y, grad_input, grad_weight) -> None:
    """Assert that results are near those in float64, the sums of a weight's gradient included."""
    wide = weight.double().reshape([-1] + [1] * max(0, x.dim() - 2)) if x.dim() else weight.double()
    wide = wide.reshape(()) if weight.numel() == 1 else wide
    exact = [
        function(x.double(), wide)
        for function in (case.facts.forward, case.facts.derivative, case.facts.weight_derivative)
    ]
    eps = torch.finfo(x.dtype).eps
    for result, expected in ((y, exact[0]), (grad_input, grad_output.double() * exact[1])):
        torch.testing.assert_close(result, expected.to(x.dtype), rtol=4 * eps, atol=4 * eps)
    added = grad_output.double() * exact[2]
    keep = [i for i in range(x.dim()) if i != 1]
    if weight.numel() == 1:
        total, size = added.sum().reshape(1), added.abs().sum().reshape(1)
    else:
        total, size = added.sum(keep), added.abs().sum(keep)
    # Rounding in fp32, of the terms and of sums in tiles.
    assert grad_weight.dtype is torch.float32
    assert ((grad_weight.double() - total).abs() <= 1e-5 * size + 1e-30).all()


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_as_torch(function, torch_function, x: Tensor, *make_grad_outputs) -> None:
    """Assert every bit of y, with and without grad, and of the gradient, in the strides of x."""
    x = x.detach().requires_grad_()
    y, expected = function(x), torch_function(x)
    assert_equal(y, expected)
    assert_equal(function(x.detach()), expected.detach())
    for make_grad_output in make_grad_outputs:
        grad_output = make_grad_output(y)
        ours, theirs = (
            torch.autograd.grad(z, x, grad_output, retain_graph=True)[0] for z in (y, expected)
        )
        assert ours.stride() == torch.empty_like(x).stride()
        assert_equal(ours, theirs)


def run_raw_ops(case, kernels: dict, x: Tensor) -> None:
    """Assert that forward and backward of the raw ops `kernels`, by name, are right."""
    name = case.name
    if case.facts.weight_derivative is not None:
        weight = torch.rand(x.size(1), device=x.device)
        kernels[name](x, weight)
        grad_output, y = torch.randn_like(x), kernels[name](x, weight)
        grads = kernels[f"{name}_backward"](grad_output, x, weight)
        check_gradients(case, x, weight, grad_output, y, *grads)
        return
    arguments, layout, backward = case.parameters, (), f"{name}_backward"
    kernels[name](x, *arguments)
    if f"{name}_with_mask" in kernels:
        y, saved = kernels[f"{name}_with_mask"](x, *arguments)
        layout = (list(x.stride()),)
    else:
        y = kernels[name](x, *arguments)
        saved = y if case.row.saves == "y" else x
        backward += "_from_output" * (saved is y)
    grad_output = torch.randn_like(y)
    grad = kernels[backward](grad_output, saved, *arguments, *layout)
    if y.shape == x.shape:
        accuracy.assert_near(case, "forward", y, x)
        accuracy.assert_near(case, "derivative", grad, x, grad_output, y=y)
    else:
        leaf = x.clone().requires_grad_()
        expected = case.facts.torch_function(leaf, *arguments)
        assert_equal(y, expected.detach())
        assert_equal(grad, torch.autograd.grad(expected, leaf, grad_output)[0])
