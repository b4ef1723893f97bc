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
from fused_act.activation import Activation
from fused_act.activations import ACTIVATIONS
from fused_act.backends import DTYPES

# The parameters that each activation with parameters is tested with; the others take none.
PARAMETERS = {"swish": [(1.0,), (1.702,), (-2.0,)]}

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """An activation with parameters: our function and torch's, both `f(x, inplace=False)`."""

    activation: Activation
    parameters: tuple[float, ...]
    function: Callable[..., Tensor]
    torch_function: Callable[..., Tensor]

    @property
    def name(self) -> str:
        return self.activation.name

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.parameters)])


def torch_swish(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    return F.silu(x, inplace=inplace) if beta == 1.0 else x * torch.sigmoid(beta * x)


TORCH_FUNCTIONS = {"mish": F.mish, "relu6": F.relu6, "swish": torch_swish}


def bind(function, activation: Activation, parameters: tuple[float, ...]):
    """`function` with its parameters fixed."""
    return functools.partial(function, **dict(zip(activation.parameters, parameters)))


CASES = [
    Case(
        activation,
        parameters,
        bind(getattr(fused_act, activation.name), activation, parameters),
        bind(TORCH_FUNCTIONS[activation.name], activation, parameters),
    )
    for activation in ACTIVATIONS
    for parameters in PARAMETERS.get(activation.name, [()])
]

# On a machine without a GPU the Triton kernels run in the interpreter, in a process of their own.
BACKENDS = [
    pytest.param("triton", marks=[] if INTERPRET else pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_backends = pytest.mark.parametrize("backend", BACKENDS)
all_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def random(*shape: int, **kwargs) -> Tensor:
    """Normal values, wide enough to reach both ends of ReLU6 and the tails of the others."""
    return 4 * torch.randn(*shape, **kwargs)


# Each makes a tensor of its layout from nothing but a dtype and a device.
LAYOUTS = {
    "contiguous": lambda **kwargs: random(4, 6, 5, 7, **kwargs),
    "channels_last": lambda **kwargs: random(4, 6, 5, 7, **kwargs).contiguous(
        memory_format=torch.channels_last
    ),
    "transposed": lambda **kwargs: random(33, 17, **kwargs).t(),
    "permuted": lambda **kwargs: random(3, 5, 7, 9, **kwargs).permute(2, 0, 3, 1),
    "gapped": lambda **kwargs: random(19, 22, **kwargs)[:, ::2],
    "gapped_permuted": lambda **kwargs: random(6, 10, 8, **kwargs)[:, ::2].permute(2, 0, 1),
    "expanded": lambda **kwargs: random(1, 13, **kwargs).expand(9, 13),
    "offset": lambda **kwargs: random(4099, **kwargs)[3:],
    "scalar": lambda **kwargs: 4 * torch.randn((), **kwargs),
    "one": lambda **kwargs: random(1, **kwargs),
    "empty": lambda **kwargs: random(3, 0, 5, **kwargs),
}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
