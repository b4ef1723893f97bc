"""What `speed` times: tensors in several layouts, calls on them, and the bytes these must move."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.providers import DEVICE, DTYPES
from fused_act.dispatch import Kernels
from fused_act.families.base import Row
from tests.shared.facts import FACTS

BYTES = """\
Bytes an element of x, of `s` bytes, that have to be moved:
  inference, forward   2 s     (read x, write y);  forward with a mask of bits   + 1/8
  backward             3 s     (read grad_output and x, write grad_input);  from a mask   2 s + 1/8
Of CReLU, whose y and grad_output are twice as long, 3 s, + 1/4, 4 s and 3 s + 1/4. Weights are few.
"""


def channels_last(*shape: int, **options) -> Tensor:
    if len(shape) == 1:
        shape = shape[0] // 256, 16, 4, 4
    return torch.empty(shape, memory_format=torch.channels_last, **options).normal_()


def odd(*shape: int, **options) -> Tensor:
    """No multiple of 16 elements, and no row of it either."""
    return torch.randn(*shape[:-1], shape[-1] // 16 * 16 - 1, **options)


def misaligned(*shape: int, **options) -> Tensor:
    return torch.randn(math.prod(shape) + 1, **options)[1:].view(shape)


# Tensors of a shape, or of about its number of elements.
LAYOUTS = {
    "contiguous": torch.randn,
    "channels_last": channels_last,
    "odd": odd,
    "misaligned": misaligned,
}


def with_channels(numel: int) -> tuple[int, int, int, int]:
    """A shape of images with up to 256 channels of up to 1024 pixels, rounded down."""
    channels = max(1, min(256, numel // 64))
    pixels = min(1024, numel // channels)
    return numel // (channels * pixels), channels, pixels // 16, 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """What all providers compute, so that their times can be compared."""

    activation: Row
    dtype: str
    size: int
    layout: str

    def x(self, device: torch.device | str = DEVICE) -> Tensor:
        return self.tensor(1, device)

    def tensors(self) -> tuple[Tensor, ...]:
        """x, grad_output and the weight, if there is one."""
        x, grad_output = self.x(), self.tensor(self.widens())
        options = {"dtype": x.dtype, "device": x.device}
        channels = x.size(1) if x.dim() > 1 else 1
        return x, grad_output, *providers.weights(self.activation, channels, **options)

    def tensor(self, widens: int, device: torch.device | str = DEVICE) -> Tensor:
        """Args: widens: how many times the channels of x it has."""
        shape = (self.size,)
        if self.activation.family != "elementwise":
            images, channels, *pixels = with_channels(self.size)
            shape = images, widens * channels, *pixels
        return LAYOUTS[self.layout](*shape, dtype=DTYPES[self.dtype], device=device)

    def widens(self) -> int:
        return FACTS[self.activation.name].widens

    def numel(self) -> int:
        return self.x("meta").numel()

    def bytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    def directions(self) -> list[str]:
        """Inference is the same kernel as forward where no mask is written."""
        inference = ["inference"] if self.activation.Function.saves == "mask" else []
        return [*inference, "forward", "backward", "forward+backward"]


def bytes_moved(
    direction: str, dtype: torch.dtype, numel: int, has_mask: bool, widens: int = 1
) -> int:
    """Args: widens: how many elements of y there are for one of x."""
    x, y = numel * dtype.itemsize, widens * numel * dtype.itemsize
    mask = (widens * numel + 7) // 8
    forward = x + y + (mask if has_mask else 0)
    backward = y + x + (mask if has_mask else x)
    return {
        "inference": x + y,
        "forward": forward,
        "backward": backward,
        "forward+backward": forward + backward,
    }[direction]


def copy_call(bytes_: int, x: Tensor, *others: Tensor) -> Callable[[], Tensor]:
    """A copy that reads half of `bytes_` and writes the other half."""
    source = torch.randint(256, (bytes_ // 2,), dtype=torch.uint8, device=x.device)
    return partial(torch.empty_like(source).copy_, source)


def kernel_call(
    kernels: Kernels,
    parameters: tuple[float, ...],
    direction: str,
    x: Tensor,
    grad_output: Tensor,
    *weights: Tensor,
) -> Callable[[], object]:
    """The ops behind one direction, below autograd."""
    parameters = *weights, *parameters
    saved, layout = x, ()
    if kernels.forward_with_mask is not None and direction != "inference":
        op = kernels.forward_with_mask
        if kernels.forward_with_mask_out is not None:
            op = partial(kernels.forward_with_mask_out, out=torch.empty_like(x))
        found = op(x, *parameters)
        saved, layout = found[1] if isinstance(found, tuple) else found, (x.stride(),)
    elif kernels.forward_out is not None:
        op = partial(kernels.forward_out, out=torch.empty_like(x))
    else:
        op = kernels.forward
    forward = partial(op, x, *parameters)
    backward = kernels.backward
    if backward is None:
        saved, backward = kernels.forward(x, *parameters), kernels.backward_from_output
    if direction in ("inference", "forward"):
        return forward
    backward = partial(backward, grad_output, saved, *parameters, *layout)
    return backward if direction == "backward" else lambda: (forward(), backward())


def with_fp32_weights(make: Callable[..., Callable]) -> Callable[..., Callable]:
    """As our raw ops take them."""
    return lambda x, grad_output, *weights: make(x, grad_output, *map(Tensor.float, weights))


def public_call(
    function: Callable[..., Tensor],
    direction: str,
    x: Tensor,
    grad_output: Tensor,
    *weights: Tensor,
) -> Callable[[], object]:
    """One direction of `function` as a user runs it."""
    if direction == "inference":
        return partial(function, x, *weights)
    leaves = [each.detach().requires_grad_() for each in (x, *weights)]
    if direction == "backward":
        y = function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, grad_output, retain_graph=True)
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad_output)
    return partial(function, *leaves)


def offers(kernels: Kernels, direction: str) -> bool:
    """Whether the ops of one direction are all there."""
    forward = kernels.forward is not None
    backward = kernels.backward is not None or kernels.backward_from_output is not None
    return {"backward": backward, "forward+backward": forward and backward}.get(direction, forward)
