"""The `torch` backend: torch's own op, and the formula that `torch.compile` fuses instead of it.

torch's own op is the reference and the fallback: results and gradients are torch's, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_act.backends import Backend, Kernels


def kernels(activation) -> Kernels:
    """`activation` computed by torch's own op; backward needs `x`, or `y` where torch does."""

    def forward(x, *parameters):
        return activation.torch_forward(x, *parameters, inplace=False)

    def forward_out(x, *parameters, out):
        out.copy_(forward(x, *parameters))

    return Kernels(
        forward, forward_out, activation.torch_backward, activation.torch_backward_from_output
    )


def formula(activation) -> Kernels:
    """`activation` out of place by its formula, in fp32, for Inductor to fuse."""

    def forward(x, *parameters):
        return convert(activation.forward(convert(x, torch.float32), *parameters), x.dtype)

    def backward(grad_output, x, *parameters):
        derivative = activation.derivative(convert(x, torch.float32), *parameters)
        return convert(convert(grad_output, torch.float32) * derivative, x.dtype)

    return Kernels(forward, backward=backward)


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, but no op where there is nothing to convert.

    Before torch 2.12, Dynamo loses the gradient of a Function whose forward has such a no-op.
    """
    return x if x.dtype is dtype else x.to(dtype)


def load() -> dict[str, Kernels]:
    from fused_act.activations import ACTIVATIONS, MIRRORED, WEIGHTED

    return {row.name: row.eager for row in (*ACTIVATIONS, *WEIGHTED, *MIRRORED)}


BACKEND = Backend(
    name="torch",
    unavailable=lambda: None,
    load=load,
    device_types=None,
)
