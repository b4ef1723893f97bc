"""Tensors of every size and layout, and guarded memory to write into."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.shared import accuracy
from tests.shared.cases import DEVICE

# Around the ends of vectors, mask bytes and tiles: 4,096 and 8,192 elements are tiles.
SIZES = [*range(71), 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8193]
LARGE = 2**20 + 1


class Guarded:
    """Memory for an output, `inside`, between bands that nobody may write.

    Args:
        offset: elements that `inside` begins behind an aligned address.
    """

    BAND, VALUE = 4096, 77

    def __init__(self, numel: int, dtype: torch.dtype, offset: int = 0, device: str = "cpu"):
        start = self.BAND + offset
        self.buffer = torch.full((start + numel + self.BAND,), self.VALUE, dtype=dtype).to(device)
        self.inside = self.buffer[start : start + numel]

    def assert_untouched_outside(self) -> None:
        start = self.inside.storage_offset()
        end = start + self.inside.numel()
        assert (self.buffer[:start] == self.VALUE).all()
        assert (self.buffer[end:] == self.VALUE).all()


def unpack_mask(mask: Tensor, numel: int) -> Tensor:
    """The first `numel` bits of a mask; asserts that those behind them are 0."""
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.flatten().bool()
    assert not bits[numel:].any()
    return bits[:numel]


def passes(case, x: Tensor) -> Tensor:
    """What the mask of a case says of `x`: whether its derivative there is that at 1."""
    derivative, one = case.facts.derivative, torch.ones((), dtype=torch.float64)
    return derivative(x.double(), *case.parameters) == derivative(one, *case.parameters)


def random(*shape: int, **kwargs) -> Tensor:
    """Normal values, wide enough to reach both ends of ReLU6 and the tails of the others."""
    return 4 * torch.randn(*shape, **kwargs)


def strided(shape, stride, **kwargs) -> Tensor:
    """A tensor of any stride, on memory that just holds it."""
    last = sum((size - 1) * step for size, step in zip(shape, stride))
    return random(last + 1, **kwargs).as_strided(shape, stride)


# Each makes a tensor of its layout from nothing but a dtype and a device.
LAYOUTS = {
    "contiguous": lambda **kwargs: random(4, 6, 5, 7, **kwargs),
    "channels_last": lambda **kwargs: random(4, 6, 5, 7, **kwargs).contiguous(
        memory_format=torch.channels_last
    ),
    "channels_last_3d": lambda **kwargs: random(2, 3, 4, 5, 3, **kwargs).contiguous(
        memory_format=torch.channels_last_3d
    ),
    "transposed": lambda **kwargs: random(33, 17, **kwargs).t(),
    "permuted": lambda **kwargs: random(3, 5, 7, 9, **kwargs).permute(2, 0, 3, 1),
    "gapped": lambda **kwargs: random(19, 22, **kwargs)[:, ::2],
    "gapped_rows": lambda **kwargs: random(19, 23, **kwargs)[1::3, 2:-1],
    "gapped_permuted": lambda **kwargs: random(6, 10, 8, **kwargs)[:, ::2].permute(2, 0, 1),
    "expanded": lambda **kwargs: random(1, 13, **kwargs).expand(9, 13),
    "expanded_inside": lambda **kwargs: random(9, 1, 5, **kwargs).expand(9, 13, 5),
    "overlapping": lambda **kwargs: strided((11, 6), (2, 1), **kwargs),
    "offset": lambda **kwargs: random(4099, **kwargs)[3:],
    "one_by_one_images": lambda **kwargs: strided((3, 5, 1, 1), (5, 1, 5, 5), **kwargs),
    "scalar": lambda **kwargs: 4 * torch.randn((), **kwargs),
    "one": lambda **kwargs: random(1, **kwargs),
    "empty": lambda **kwargs: random(0, **kwargs),
    "empty_expanded": lambda **kwargs: random(1, 0, **kwargs).expand(2, 0),
    "empty_inside": lambda **kwargs: random(3, 0, 5, **kwargs).transpose(0, 2),
}
# Those of one element or none, where little can go wrong.
TINY = ("scalar", "one", "empty", "empty_expanded", "empty_inside")
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(layout: str, dtype: torch.dtype) -> Tensor:
    """A tensor of a layout, where the kernels run."""
    return LAYOUTS[layout](dtype=dtype, device=DEVICE)


# What autograd may hand in for an output y, whatever the layout of y.
GRAD_LAYOUTS = {
    "of_y": torch.randn_like,
    "transposed": lambda y: torch.randn(y.shape[::-1], dtype=y.dtype, device=y.device).permute(
        tuple(range(y.dim()))[::-1]
    ),
    "gapped": lambda y: torch.randn(*y.shape, 3, dtype=y.dtype, device=y.device)[..., 1],
    "expanded_by_sum": lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape),
    "expanded_inside": lambda y: torch.randn(
        [1, *y.shape[1:]][: y.dim()], dtype=y.dtype, device=y.device
    ).expand(y.shape),
}


def steps(x: Tensor) -> list[int]:
    """The strides that something steps by: torch's ops differ in those of sizes 0 and 1."""
    return [step for size, step in zip(x.shape, x.stride()) if size > 1] if x.numel() else []


def check(case, x: Tensor, *make_grad_outputs) -> None:
    """Assert values near torch's in float64, and strides: of y, without grad too, and of gradients.

    A mirrored y is dense in the order of x, which torch gives up; what its strides are is tested
    apart.
    """
    x = x.detach().requires_grad_()
    arguments = case.arguments(x.detach())
    wide = x.detach().double().requires_grad_()
    wide_arguments = [each.double() if isinstance(each, Tensor) else each for each in arguments]
    if case.row.family == "mirrored" and x.dim() == 0:
        with pytest.raises(RuntimeError, match="zero-dimensional"):  # torch's error
            case.facts.function(x, *arguments)
        return
    expected = case.facts.torch_function(wide, *wide_arguments)
    y = case.facts.function(x, *arguments)
    eps = torch.finfo(x.dtype).eps
    rounded = expected.detach().to(x.dtype)
    for result in (y.detach(), case.facts.function(x.detach(), *arguments)):
        assert result.shape == expected.shape
        if result.shape == x.shape:
            assert steps(result) == steps(expected)
        torch.testing.assert_close(result, rounded, rtol=4 * eps, atol=4 * eps)
    for make_grad_output in make_grad_outputs:
        grad_output = make_grad_output(y)
        ours, theirs = (
            torch.autograd.grad(z, leaf, grad_output.to(z.dtype), retain_graph=True)[0]
            for z, leaf in ((y, x), (expected, wide))
        )
        assert ours.stride() == torch.empty_like(x).stride()
        if case.saves == "y":  # of which backward knows nothing else, and it is rounded
            theirs = accuracy.true_value(case, "derivative", x, y) * grad_output.double()
        largest = max(1.0, grad_output.abs().max().item()) if grad_output.numel() else 1.0
        torch.testing.assert_close(ours, theirs.to(x.dtype), rtol=4 * eps, atol=4 * eps * largest)
