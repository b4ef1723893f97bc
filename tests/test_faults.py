"""Bad and unusual input gets torch's own behaviour or one clear error: the table in faults.py."""

import re

import pytest
import torch

import fused_act
from fused_act.dispatch import BACKENDS
from tests.shared import accuracy, faults
from tests.shared.cases import BACKENDS as KERNELS
from tests.shared.cases import CASES, DEVICE, INTERPRET, all_backends, elementwise_rows, of_family

pytestmark = [
    pytest.mark.with_gpu,
    pytest.mark.usefixtures("forced"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # prototypes: nested and sparse tensors
]

# torch has no Swish to compare with: with beta = 1 it has.
AS_TORCH = [case for case in CASES if case.parameters in ((), (1.0,))]

all_inputs = pytest.mark.parametrize("unusual", faults.INPUTS, ids=lambda each: each.what)
all_calls = pytest.mark.parametrize("wrong", faults.CALLS, ids=lambda each: each.what)


def plain():
    return torch.linspace(-8, 8, 6, device=DEVICE).reshape(2, 3).clone()


def values(y):
    if y.is_meta or isinstance(y, torch._subclasses.FakeTensor):
        return None
    if hasattr(y, "to_local"):
        return y.to_local().tolist()
    if y.is_nested:
        return [part.tolist() for part in y.unbind()]
    if y.is_quantized:
        return y.dequantize().tolist()
    return y.to_dense().tolist() if y.layout is not torch.strided else y.tolist()


def outcome(function, x):
    """All that can be told about a result, or about an error."""
    try:
        y = function(x)
    except Exception as error:
        return type(error), str(error)
    return type(y), y.dtype, y.layout, y.device, values(y)


@pytest.mark.parametrize("case", AS_TORCH, ids=str)
@all_inputs
def test_auto_does_as_torch_does(case, unusual):
    x = unusual.make(plain())
    if DEVICE == "cuda" and unusual.forced is None:
        accuracy.assert_near(case, "forward", case.function(x), x.resolve_neg())
        return
    expected = outcome(case.torch_function, unusual.make(plain()))
    assert outcome(case.function, x) == expected


@elementwise_rows
@all_backends
@all_inputs
def test_forced_backend_refuses_or_is_right(case, backend, unusual):
    x = unusual.make(plain())
    if unusual.forced is None:
        accuracy.assert_near(case, "forward", case.function(x), x.resolve_neg())
        return
    devices = " or ".join(BACKENDS[backend].device_types)
    pattern = unusual.forced.pattern(op=case.name, backend=backend, devices=devices)
    with pytest.raises(unusual.forced.error, match=f"^{pattern}"):
        case.function(x)


def check_call(case, wrong):
    x = plain()
    with pytest.raises(wrong.refusal.error, match=wrong.refusal.pattern()):
        wrong.call(case, x)
    assert torch.equal(x, plain())


@elementwise_rows
@all_calls
def test_wrong_calls(case, wrong):
    check_call(case, wrong)


@elementwise_rows
@all_backends
@all_calls
def test_wrong_calls_of_a_forced_backend(case, backend, wrong):
    check_call(case, wrong)
    assert fused_act.dispatch.forced is BACKENDS[backend]


def ones(x, *shape):
    return torch.ones(shape, device=x.device)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: fused_act.swish(x, ones(x, 4)),
            ValueError,
            r"shape \(1,\) or \(3,\) .* got \(4,\)",
        ),
        (
            lambda x: fused_act.swish(x, ones(x, 3, 1)),
            ValueError,
            r"got \(3, 1\)",
        ),
        (
            lambda x: fused_act.swish(x, ones(x, 3).double()),
            TypeError,
            "got torch.float64",
        ),
        (lambda x: fused_act.swish(x.int(), ones(x, 3)), TypeError, "int32"),
        (
            lambda x: fused_act.swish(x, ones(x, 3), True),
            ValueError,
            "expected inplace=False",
        ),
        (lambda x: fused_act.Swish(inplace=True, learnable=True), ValueError, "inplace=False"),
        (lambda x: fused_act.Swish(num_parameters=3), ValueError, "expected num_parameters=1"),
        (
            lambda x: fused_act.prelu(x, ones(x, 4)),
            RuntimeError,
            "parameter numbers = 4",
        ),
        (
            lambda x: fused_act.prelu(x, ones(x, 3, 1)),
            RuntimeError,
            "scalar or 1D tensor",
        ),
        (
            lambda x: fused_act.prelu(x.half(), ones(x, 3)),
            RuntimeError,
            "Type promoting",
        ),
        (
            lambda x: fused_act.prelu(x[0, 0], ones(x, 3)),
            RuntimeError,
            "channel size = 1",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["auto", *KERNELS[: int(INTERPRET)]])
def test_bad_weight(call, error, text, backend):
    with pytest.raises(error, match=text) as raised:
        call(torch.randn(2, 3, 4, device=DEVICE))
    assert "\n" not in str(raised.value)


BAD_DIM = {
    "0-d": lambda: (torch.tensor(1.0, device=DEVICE), 0),
    "dim too large": lambda: (torch.randn(3, 4, device=DEVICE), 2),
    "dim too small": lambda: (torch.randn(3, 4, device=DEVICE), -3),
    "no channels": lambda: (torch.randn(3, device=DEVICE), 1),
    "float dim": lambda: (torch.randn(3, 4, device=DEVICE), 1.0),
    "bool dim": lambda: (torch.randn(3, 4, device=DEVICE), True),
    "no dim": lambda: (torch.randn(3, 4, device=DEVICE), None),
}


@of_family("mirrored")
@all_backends
@pytest.mark.parametrize("wrong", BAD_DIM)
def test_bad_dim_is_torchs_error(case, backend, wrong):
    """With every backend: what a kernel does not take along `dim`, torch refuses."""
    x, dim = BAD_DIM[wrong]()
    with pytest.raises((IndexError, RuntimeError, TypeError)) as theirs:
        case.facts.torch_function(x, dim)
    for choice in ("auto", backend):
        with fused_act.use_backend(choice):
            for function in (case.facts.function, case.row.Function.apply):
                with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
                    function(x, dim)


@of_family("mirrored")
@all_backends
def test_mirrored_refusals_of_a_forced_backend(case, backend):
    for x, error, match in (
        (torch.zeros(3, 3, dtype=torch.float64), TypeError, f"{case.name}: .* input is float64"),
        (torch.zeros(3, 3, device="meta"), ValueError, f"{case.name}: .* input is on meta"),
        ([1.0], TypeError, f"{case.name}: expected input to be a Tensor, got list"),
    ):
        with pytest.raises(error, match=match):
            case.facts.function(x)


@all_backends
def test_a_forced_backend_refuses_a_slope_that_is_a_tensor(backend):
    """Under `auto` it is torch's own op that takes it."""
    with pytest.raises(TypeError, match="expected negative_slope to be a float, got Tensor"):
        fused_act.leaky_relu(plain(), torch.tensor(0.1))
    assert torch.equal(fused_act.leaky_relu(plain(), True), plain())
