"""The tables that the tests run over: activations with their parameters, backends, layouts."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_act
from fused_act.activations import FAMILIES
from fused_act.activations.swish import torch_learnable
from fused_act.dispatch import DTYPES
from fused_act.families.base import Row
from fused_act.families.elementwise import Elementwise

# One activation for each way through the code, by what it saves, out of place and in place, and by
# its parameters; and those that are taken. The accuracy is tested of all activations.
REPRESENTATIVES = ("mish", "swish", "relu6", "sigmoid", "leaky_relu", "selu")
PARAMETERS = {"swish": [(1.0,), (1.702,)], "leaky_relu": [(0.1,)]}
# More of them for the accuracy: beta * x overflows for the largest, underflows for the smallest;
# 1e30 is the largest with a formula.
ACCURACY_PARAMETERS = {
    "swish": [
        *PARAMETERS["swish"],
        *((-2.0,), (0.5,), (8.0,), (-1e30,), (2.3e38,), (-2.3e38,), (1e-40,)),
    ],
    "leaky_relu": [(0.01,), (-0.5,), (0.0,), (3.0,)],
}

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """An activation with parameters: our function and torch's, both `f(x, inplace=False)`."""

    activation: Row
    parameters: tuple[float, ...]
    function: Callable[..., Tensor]
    torch_function: Callable[..., Tensor]

    @property
    def name(self) -> str:
        return self.activation.name

    def apply(self, x: Tensor) -> Tensor:
        """The Function by itself."""
        weight = (weight_of(x),) if self.activation.family == "weighted" else ()
        return self.activation.Function.apply(x, *weight, *self.parameters)

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.parameters)])


def torch_swish(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    if beta == 1.0:
        return F.silu(x, inplace=inplace)
    gate = torch.sigmoid(beta * x)
    return x.mul_(gate) if inplace else x * gate


TORCH_FUNCTIONS = {
    "mish": F.mish,
    "relu6": F.relu6,
    "swish": torch_swish,
    "sigmoid": lambda x, inplace=False: torch.sigmoid_(x) if inplace else torch.sigmoid(x),
    "tanh": lambda x, inplace=False: torch.tanh_(x) if inplace else torch.tanh(x),
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "selu": F.selu,
}


def bind(function, activation: Elementwise, parameters: tuple[float, ...]):
    """`function` with its parameters fixed."""
    return functools.partial(function, **dict(zip(activation.parameters, parameters)))


def cases(parameters_by_name: dict[str, list[tuple[float, ...]]]) -> list[Case]:
    return [
        Case(
            activation,
            parameters,
            bind(getattr(fused_act, activation.name), activation, parameters),
            bind(TORCH_FUNCTIONS[activation.name], activation, parameters),
        )
        for activation in FAMILIES["elementwise"]
        for parameters in parameters_by_name.get(activation.name, [()])
    ]


def weight_of(x: Tensor) -> Tensor:
    """A weight that depends on `x`, for whatever differentiates with respect to `x`."""
    return (0.3 + 0.01 * x.sum()).to(x.dtype).reshape(1)


def of_weight(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`f(x, inplace=False)` of an activation with a weight, which has no way to work in place."""
    return lambda x, inplace=False: function(x, weight_of(x))


def torch_crelu(x: Tensor, dim: int = 1) -> Tensor:
    return torch.cat([F.relu(x), F.relu(-x)], dim)


# f(x, weight), ours and torch's.
WEIGHTED_FUNCTIONS = {
    "prelu": (fused_act.prelu, F.prelu),
    "learnable_swish": (fused_act.swish, torch_learnable),
}
CASES_OF_OTHERS = [
    *(Case(row, (), *map(of_weight, WEIGHTED_FUNCTIONS[row.name])) for row in FAMILIES["weighted"]),
    *(
        Case(
            row,
            (-1,),
            lambda x, inplace=False: fused_act.crelu(x, -1),
            lambda x, inplace=False: torch_crelu(x, -1),
        )
        for row in FAMILIES["mirrored"]
    ),
]

CASES = [case for case in cases(PARAMETERS) if case.name in REPRESENTATIVES]
# Of every row there is.
ALL_CASES = [*cases(PARAMETERS), *CASES_OF_OTHERS]
ACCURACY_CASES = cases(ACCURACY_PARAMETERS)
OF_OUTPUT = [case for case in ACCURACY_CASES if case.activation.saves_inplace == "y"]

# On a machine without a GPU the Triton kernels run in the interpreter, in a process of their own.
BACKENDS = [
    pytest.param("triton", marks=[] if INTERPRET else pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_rows = pytest.mark.parametrize("case", ALL_CASES, ids=str)
all_accuracy_cases = pytest.mark.parametrize("case", ACCURACY_CASES, ids=str)
all_backends = pytest.mark.parametrize("backend", BACKENDS)
all_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
both_16_bit_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float16", "bfloat16"])


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


def passes(case: Case, x: Tensor) -> Tensor:
    """What the mask of a case says of `x`."""
    return (x > 0) & (x < (6 if case.name == "relu6" else float("inf")))


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
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)

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
