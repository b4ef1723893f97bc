"""What is compared: the kernels of both backends and everything that a user could pick instead."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

import fused_act
from benchmarks.environment import default_device
from fused_act import dispatch, ops
from fused_act.activations import ROWS
from fused_act.backends.triton import INTERPRET
from fused_act.dispatch import Kernels
from fused_act.families.base import Row
from tests.shared import facts
from tests.shared.facts import FACTS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Who asks for Triton's interpreter wants the kernels on CPU tensors.
DEVICE = torch.device("cpu") if INTERPRET else default_device()

# What is compared unless others are asked for: what the package is made for, and one row of each
# other family, of which weights have two.
FEATURED = tuple(ROWS[name] for name in facts.FEATURED)
DEFAULT = (*FEATURED, *(ROWS[name] for name in ("prelu", "learnable_swish", "crelu")))


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute the activations.

    Args:
        name: what tables call it.
        function: `function(activation, inplace)` is the differentiable `x -> y`, as users call it,
            or None if there is none. A weight, if the activation has one, follows `x`; see
            `weights`. It is to be called while `backend` is selected.
        is_ours: it is what fused_act is for, and not what a user could pick instead.
        kernels: the raw ops of an activation, without autograd, if there are any; None in place of
            those that are missing.
        backend: what `fused_act.use_backend` is to select.
        compiles: it is `torch.compile` of `function`; see `compile`.
        package: what has to be imported for it.
    """

    name: str
    function: Callable[[Row, bool], Callable[..., Tensor] | None]
    is_ours: bool = False
    kernels: Callable[[Row], Kernels] | None = None
    backend: str = "auto"
    compiles: bool = False
    package: str | None = None

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        if self.package is not None:
            try:
                importlib.import_module(self.package)
            except Exception as error:  # a package may raise anything where it does not fit
                return error_text(error)
        return None if self.backend == "auto" else dispatch.BACKENDS[self.backend].unavailable()

    def selected(self) -> fused_act.use_backend:
        return fused_act.use_backend(self.backend)

    def compile(self, function: Callable) -> Callable:
        """`function`, which may be more than the activation, as this provider's user runs it.

        Static shapes are what Inductor is best at. A graph break is an error, not a slower result.
        """
        if not self.compiles:
            return function
        return torch.compile(function, fullgraph=True, dynamic=False)

    def prepare(self, function: Callable) -> Callable:
        """`compile`, where nothing that was compiled before is needed any more.

        Compiled code shares one cache, which after 8 entries falls back to eager, so it is emptied.
        """
        if self.compiles:
            torch.compiler.reset()
        return self.compile(function)


def parameters(activation: Row) -> tuple[float, ...]:
    return FACTS[activation.name].defaults


def weights(activation: Row, channels: int = 1, **options) -> tuple[Tensor, ...]:
    """The weight that follows `x`, if there is one, with the value that its module begins with.

    Args:
        options: its dtype and its device.
    """
    values = FACTS[activation.name].weights
    return (torch.full((channels,), values[0], **options),) if values else ()


def with_defaults(
    activation: Row, function: Callable[..., Tensor], inplace: bool
) -> Callable[..., Tensor] | None:
    """`function` of x and the weight alone, or None where it does not work in place."""
    arguments = parameters(activation)
    if not hasattr(activation, "InplaceFunction"):
        return None if inplace else lambda x, *weights: function(x, *weights, *arguments)
    return lambda x: function(x, *arguments, inplace=inplace)


def fused(activation: Row, inplace: bool) -> Callable[..., Tensor] | None:
    return with_defaults(activation, FACTS[activation.name].function, inplace)


def aten(activation: Row, inplace: bool) -> Callable[..., Tensor] | None:
    """torch's own op, or the definition in its ops: there is none for learnable Swish and CReLU."""
    return with_defaults(activation, activation.torch_forward, inplace)


def naive(activation: Row, inplace: bool) -> Callable[..., Tensor] | None:
    return None if inplace else FACTS[activation.name].naive


def aten_kernels(activation: Row) -> Kernels:
    if activation.family != "elementwise":
        # There their backward is several ops; autograd runs them in the rows of public functions.
        return Kernels(activation.torch_forward)
    return activation.eager._replace(forward_out=FACTS[activation.name].aten_out)


def flag_gems_kernels(activation: Row) -> Kernels:
    gems = importlib.import_module("flag_gems.ops")
    forward, backward = (getattr(gems, name, None) for name in FACTS[activation.name].flag_gems)
    # They have no parameters to take: Swish is SiLU there.
    return Kernels(
        forward and (lambda x, *parameters: forward(x)),
        None,
        backward and (lambda grad_output, x, *parameters: backward(grad_output, x)),
    )


def raw_ops(namespace: str) -> Callable[[Row], Kernels]:
    return lambda activation: ops.kernels(namespace)[activation.name]


PROVIDERS = (
    Provider("triton", fused, True, raw_ops("fused_act_triton"), backend="triton"),
    Provider("cuda", fused, True, raw_ops("fused_act_cuda"), backend="cuda"),
    Provider("compile(fused_act)", fused, True, compiles=True),
    Provider("aten", aten, kernels=aten_kernels),
    Provider("compile(aten)", aten, compiles=True),
    Provider("naive", naive),
    Provider("flag_gems", lambda *_: None, kernels=flag_gems_kernels, package="flag_gems"),
)

# What fused_act does where no kernel runs.
FALLBACK = Provider("fallback", fused, True)

# The yardstick: a copy of as many bytes.
COPY = Provider("copy", lambda *_: None)

OURS = {provider.name for provider in (*PROVIDERS, FALLBACK) if provider.is_ours}


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
