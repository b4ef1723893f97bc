"""What happens to unusual input and in unusual places: the table that the tests run over and that
the README shows (readme.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fused_act
from tests.shared import broken_installs


class Subclass(torch.Tensor):
    """A tensor subclass that changes nothing."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An error and its message, where `{op}` and `{backend}` stand for their names."""

    error: type[Exception]
    message: str

    def pattern(self, **names: str) -> str:
        return re.escape(self.message.format(**names))

    def __str__(self) -> str:
        message = self.message.format(op="mish", backend="triton", devices="cuda")
        return f"`{self.error.__name__}: {message}`"


@dataclasses.dataclass(frozen=True)
class UnusualInput:
    """An input that a kernel may not take as it is.

    Args:
        what: names it.
        make: makes it out of a plain fp32 tensor of shape (2, 3).
        forced: how a forced kernel backend refuses it; None if it computes it like any other.
    """

    what: str
    make: Callable[[Tensor], object]
    forced: Refusal | None


def takes(expected: str, error: type[Exception] = TypeError) -> Refusal:
    return Refusal(error, "{op}: the '{backend}' backend takes " + expected)


def dtype(what: str, make: Callable[[Tensor], Tensor], name: str) -> UnusualInput:
    return UnusualInput(what, make, takes(f"float16, bfloat16, float32; input is {name}"))


def layout(what: str, make: Callable[[Tensor], Tensor], name: str) -> UnusualInput:
    return UnusualInput(what, make, takes(f"strided tensors; input is {name}"))


def subclass(what: str, make: Callable[[Tensor], Tensor], name: str) -> UnusualInput:
    return UnusualInput(
        what,
        make,
        takes(f"plain tensors, got {name}; use_backend('auto') leaves tensor subclasses to torch"),
    )


def no_tensor(what: str, make: Callable[[Tensor], object], name: str) -> UnusualInput:
    return UnusualInput(
        what, make, Refusal(TypeError, "{op}: expected input to be a Tensor, got " + name)
    )


def distributed(x: Tensor) -> Tensor:
    """Sharded over a mesh of this process alone."""
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    mesh = DeviceMesh(x.device.type, [0], _init_backend=False, _rank=0)
    return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)


INPUTS = [
    dtype("float64", lambda x: x.double(), "float64"),
    dtype("float8", lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    dtype("int64", lambda x: x.long(), "int64"),
    dtype("int32", lambda x: x.int(), "int32"),
    dtype("uint8", lambda x: x.abs().byte(), "uint8"),
    dtype("bool", lambda x: x > 0, "bool"),
    dtype("complex64", lambda x: x.to(torch.complex64), "complex64"),
    dtype("conjugate view", lambda x: x.to(torch.complex64).conj(), "complex64"),
    dtype("quantized", lambda x: torch.quantize_per_tensor(x, 0.1, 128, torch.quint8), "quint8"),
    layout("sparse COO", lambda x: x.to_sparse(), "torch.sparse_coo"),
    layout("sparse CSR", lambda x: x.to_sparse_csr(), "torch.sparse_csr"),
    layout("nested, strided", lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]), "nested"),
    subclass(
        "nested, jagged",
        lambda x: torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged),
        "NestedTensor",
    ),
    subclass("DTensor", distributed, "DTensor"),
    subclass("tensor subclass", lambda x: x.as_subclass(Subclass), "Subclass"),
    subclass("fake tensor", lambda x: FakeTensorMode().from_tensor(x), "FakeTensor"),
    UnusualInput(
        "meta tensor",
        lambda x: x.to("meta"),
        takes("{devices} tensors; input is on meta", ValueError),
    ),
    UnusualInput("negative view", lambda x: x.to(torch.complex64).conj().imag, None),
    UnusualInput("expanded, gapped, transposed", lambda x: x[:, ::2].t().expand(4, 2, 2), None),
    UnusualInput("empty", lambda x: x[:, :0], None),
    no_tensor("list", lambda x: x.tolist(), "list"),
    no_tensor("None", lambda x: None, "NoneType"),
    no_tensor("Python float", lambda x: 1.0, "float"),
    no_tensor("NumPy array", lambda x: numpy.ones(3, numpy.float32), "ndarray"),
]


@dataclasses.dataclass(frozen=True)
class WrongCall:
    """A call that is refused, whatever the backend: `call(case, x)` for a plain fp32 x."""

    what: str
    call: Callable
    refusal: Refusal


def inplace(case, x):
    case.function(x, inplace=True)


def of_inference(case, x):
    with torch.inference_mode():
        inference = x.clone()
    case.function(inference, inplace=True)


CALLS = [
    WrongCall(
        "in place on a leaf that requires grad",
        lambda case, x: inplace(case, x.requires_grad_()),
        Refusal(
            RuntimeError,
            "a leaf Variable that requires grad is being used in an in-place operation",
        ),
    ),
    WrongCall(
        "in place on a view of such a leaf",
        lambda case, x: inplace(case, x.requires_grad_()[1:]),
        Refusal(
            RuntimeError,
            "a view of a leaf Variable that requires grad is being used in an in-place operation",
        ),
    ),
    WrongCall(
        "in place on an expanded tensor",
        lambda case, x: inplace(case, x[:, :1].expand(2, 3)),
        Refusal(
            RuntimeError,
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location",
        ),
    ),
    WrongCall(
        "in place on an inference tensor outside inference mode",
        of_inference,
        Refusal(RuntimeError, "Inplace update to inference tensor outside InferenceMode"),
    ),
    WrongCall(
        "grad_output of another shape",
        lambda case, x: torch.autograd.grad(case.function(x.requires_grad_()), x, x[0]),
        Refusal(RuntimeError, "Mismatch in shape: grad_output[0] has a shape of torch.Size([3])"),
    ),
    WrongCall(
        "grad_output on another device",
        lambda case, x: torch.autograd.grad(
            case.function(x.requires_grad_()), x, torch.ones_like(x, device="meta")
        ),
        Refusal(RuntimeError, "invalid gradient at index 0 - expected device"),
    ),
    WrongCall(
        "beta that is no float",
        lambda case, x: fused_act.swish(x, "1"),
        Refusal(TypeError, "swish: expected beta to be a float, got str"),
    ),
    WrongCall(
        "beta that is not finite, or above 2.3e38",
        lambda case, x: fused_act.swish(x, float("nan")),
        Refusal(ValueError, "swish: expected beta between -2.3e+38 and 2.3e+38, got nan"),
    ),
    WrongCall(
        "backend that does not exist",
        lambda case, x: fused_act.use_backend("tritn"),
        Refusal(
            ValueError,
            "use_backend: expected one of 'auto', 'cuda', 'triton', 'torch', got 'tritn'",
        ),
    ),
]


def table() -> str:
    """The README's table of unusual input and wrong calls."""
    from tabulate import tabulate

    own, computed = "torch's own result or error", "computed, in torch's strides"
    rows = [
        (each.what, own, str(each.forced)) if each.forced else (each.what, computed, computed)
        for each in INPUTS
    ]
    rows += [(each.what, str(each.refusal), "the same") for each in CALLS]
    return tabulate(rows, ("input or call", "`auto`", "forced kernel backend"), "github")


def installs() -> str:
    """The README's table of broken installs, out of the cases of broken_installs.py."""
    from tabulate import tabulate

    rows = []
    for case in broken_installs.CASES:
        reasons = {"cuda": case.cuda, "triton": case.triton}
        if case.cuda == broken_installs.NO_EXTENSION:
            del reasons["cuda"]  # not what is broken here
        text = [f"`{name}: {readable(reason)}`" for name, reason in reasons.items() if reason]
        if text:
            takes = "Triton" if case.triton is None else "torch's own ops"
            rows.append((case.breaks.__name__.replace("_", " "), takes, "; ".join(text)))
    return tabulate(rows, ("install with", "CUDA tensors go to", "the warning says"), "github")


def readable(pattern: str) -> str:
    """A regular expression as the text that it matches, with an ellipsis for any, and for the cure
    that all of Triton's share.
    """
    pattern = pattern.replace(broken_installs.NEEDS, "; it needs .*")
    return re.sub(r"\\(.)", r"\1", pattern.replace(".*", "…")).replace("`", "'")
