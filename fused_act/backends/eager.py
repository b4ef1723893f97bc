"""The `torch` backend: torch's own op, or under `torch.compile` the formula that Inductor fuses.

It is the reference and the fallback: in eager mode results and gradients are torch's, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_act import backends
from fused_act.backends import DTYPES, Backend, Kernels


def fuses(activation, x: Tensor, *parameters: float) -> bool:
    """Whether to emit the activation's formula, for Inductor to fuse, instead of torch's op.

    Export keeps torch's op, so that ONNX shows one node, and so does `use_backend("torch")`.
    """
    return (
        torch.compiler.is_compiling()
        and not backends.is_exporting()
        and backends.forced is None
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in DTYPES
        and activation.fuses(*parameters)
    )


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, but no op where there is nothing to convert.

    Before torch 2.12, Dynamo loses the gradient of a Function whose forward has such a no-op.
    """
    return x if x.dtype is dtype else x.to(dtype)


def kernels(activation) -> Kernels:
    """`activation` computed by torch; `x` is what its backward needs."""

    def forward(x, *parameters):
        if fuses(activation, x, *parameters):
            y = activation.forward(convert(x, torch.float32), *parameters)
            return convert(y, x.dtype)
        return activation.torch_forward(x, *parameters, inplace=False)

    def forward_out(x, *parameters, out):
        out.copy_(forward(x, *parameters))

    def backward(grad_output, x, *parameters):
        if fuses(activation, x, *parameters):
            derivative = activation.derivative(convert(x, torch.float32), *parameters)
            return convert(convert(grad_output, torch.float32) * derivative, x.dtype)
        return activation.torch_backward(grad_output, x, *parameters)

    return Kernels(forward, forward_out, None, None, backward)


def load() -> dict[str, Kernels]:
    from fused_act.activations import ACTIVATIONS

    return {activation.name: activation.eager for activation in ACTIVATIONS}


BACKEND = Backend(
    name="torch",
    unavailable=lambda: None,
    load=load,
    device_types=None,
)
