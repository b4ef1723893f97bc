"""What is compared: the kernels of both backends and everything that a user could pick instead."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

import fused_act
from benchmarks.environment import default_device
from fused_act import backends, ops
from fused_act.activation import Activation
from fused_act.backends import Kernels
from fused_act.backends.triton import INTERPRET

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Who asks for Triton's interpreter wants the kernels on CPU tensors.
DEVICE = torch.device("cpu") if INTERPRET else default_device()

# The parameters that an activation is compared with; the others take none.
PARAMETERS = {"swish": (1.0,)}

# What papers and model files write. Each operation is a kernel and saves what its gradient needs.
NAIVE = {
    "mish": lambda x: x * torch.tanh(torch.nn.functional.softplus(x)),
    "swish": lambda x: x * torch.sigmoid(x),
    "relu6": lambda x: x.clamp(min=0).clamp(max=6),
}


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute the activations.

    Args:
        name: what tables call it.
        function: `function(activation, inplace)` is the differentiable `x -> y`, as users call it,
            or None if there is none. It is to be called while `backend` is selected.
        is_ours: it is what fused_act is for, and not what a user could pick instead.
        kernels: the raw ops of an activation, without autograd, if they are all there is to it.
        backend: what `fused_act.use_backend` is to select.
        compiles: it is `torch.compile` of `function`; see `prepare`.
    """

    name: str
    function: Callable[[Activation, bool], Callable[[Tensor], Tensor] | None]
    is_ours: bool = False
    kernels: Callable[[Activation], Kernels] | None = None
    backend: str = "auto"
    compiles: bool = False

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        return None if self.backend == "auto" else backends.get(self.backend).unavailable()

    def selected(self) -> fused_act.use_backend:
        return fused_act.use_backend(self.backend)

    def prepare(self, function: Callable) -> Callable:
        """`function`, which may be more than the activation, as this provider's user runs it.

        Compiled code shares one cache, which after 8 entries falls back to eager, so it is emptied
        here. Static shapes are what Inductor is best at. A graph break is an error, not a slower
        result.
        """
        if not self.compiles:
            return function
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)


def parameters(activation: Activation) -> tuple[float, ...]:
    return PARAMETERS.get(activation.name, ())


def fused(activation: Activation, inplace: bool) -> Callable[[Tensor], Tensor]:
    function, arguments = getattr(fused_act, activation.name), parameters(activation)
    return lambda x: function(x, *arguments, inplace=inplace)


def aten(activation: Activation, inplace: bool) -> Callable[[Tensor], Tensor]:
    function, arguments = activation.torch_forward, parameters(activation)
    return lambda x: function(x, *arguments, inplace=inplace)


def naive(activation: Activation, inplace: bool) -> Callable[[Tensor], Tensor] | None:
    return None if inplace else NAIVE.get(activation.name)


def raw_ops(namespace: str) -> Callable[[Activation], Kernels]:
    return lambda activation: ops.kernels(namespace)[activation.name]


PROVIDERS = (
    Provider("triton", fused, True, raw_ops("fused_act_triton"), backend="triton"),
    Provider("cuda", fused, True, raw_ops("fused_act_cuda"), backend="cuda"),
    Provider("compile(fused_act)", fused, True, compiles=True),
    Provider("aten", aten, kernels=lambda activation: activation.eager),
    Provider("compile(aten)", aten, compiles=True),
    Provider("naive", naive),
)


def available() -> list[Provider]:
    """The providers that can run here; says why the others cannot."""
    found = []
    for provider in PROVIDERS:
        reason = provider.unavailable()
        if reason is None:
            found.append(provider)
        else:
            print(f"without {provider.name}: {reason}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)


def error_text(error: Exception) -> str:
    """One line for the row of a provider that failed."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def print_errors(rows: list[dict]) -> None:
    errors = Counter((row["provider"], row["error"]) for row in rows if row["error"])
    for (provider, error), count in errors.items():
        print(f"{provider} failed in {count} rows: {error}")
