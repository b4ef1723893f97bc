"""Bad and unusual input gets torch's own behaviour or one clear error: the table in faults.py."""

import pytest
import torch

import fused_act
from fused_act.dispatch import BACKENDS
from tests import accuracy, faults
from tests.cases import CASES, DEVICE, all_backends, all_cases

pytestmark = [
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


@all_cases
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


@all_cases
@all_calls
def test_wrong_calls(case, wrong):
    check_call(case, wrong)


@all_cases
@all_backends
@all_calls
def test_wrong_calls_of_a_forced_backend(case, backend, wrong):
    check_call(case, wrong)
    assert fused_act.dispatch.forced is BACKENDS[backend]
