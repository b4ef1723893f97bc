"""Properties of the kernel path for any shape, strides, offset and dtype, drawn by hypothesis.

On a GPU both backends run. Without one the Triton kernels run in the interpreter:
`TRITON_INTERPRET=1 pytest tests/test_properties.py`.
"""

import pytest
import torch

from fused_act.dispatch import DTYPES
from tests.shared import accuracy
from tests.shared.cases import ALL_CASES, BACKENDS, CASES, DEVICE
from tests.shared.layouts import check

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("forced")]

settings = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    # `forced` holds for all examples of a test.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@st.composite
def tensors(draw, shape=None, dtype=None):
    """A tensor of up to four dimensions with gaps, permuted, expanded, at an offset."""
    if shape is None:
        shape = draw(st.lists(st.integers(0, 7), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    step, stride = 1, [0] * len(shape)
    for dimension in order:
        step *= draw(st.sampled_from([1, 1, 1, 2, 3]))
        if draw(st.sampled_from([True, True, True, True, False])):  # else expanded
            stride[dimension] = step
            step *= max(1, shape[dimension])
    offset = draw(st.integers(0, 8))
    if dtype is None:
        dtype = draw(st.sampled_from(DTYPES))
    needed = 1 + sum(max(0, size - 1) * step for size, step in zip(shape, stride))
    seed = draw(st.integers(0, 2**16))
    values = torch.randn(offset + needed, generator=torch.Generator().manual_seed(seed))
    return (4 * values).to(dtype).to(DEVICE).as_strided(shape, stride, offset)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(data=st.data())
@settings
def test_any_strides(backend, data):
    """Any strides of x, any other of grad_output: torch's result in torch's strides."""
    x = data.draw(tensors())
    # torch concatenates nothing without dimensions.
    case = data.draw(st.sampled_from(ALL_CASES if x.dim() > 0 else CASES))
    shape = list(case.torch_function(x).shape)
    grad_output = data.draw(tensors(shape=shape, dtype=x.dtype))
    memory = x.untyped_storage().cpu().tolist()
    check(case, x, lambda y: grad_output)
    assert x.untyped_storage().cpu().tolist() == memory


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(data=st.data())
@settings
def test_any_strides_in_place(backend, data):
    """In place writes x and nothing beside it; where x overlaps it writes nothing."""
    case = data.draw(st.sampled_from(CASES))
    x = data.draw(tensors())
    buffer = torch.empty(0, dtype=x.dtype, device=DEVICE).set_(x.untyped_storage())
    before = buffer.clone()
    expanded = 0 in [step for size, step in zip(x.shape, x.stride()) if size > 1]
    if expanded and x.numel() > 0:
        with pytest.raises(RuntimeError, match="more than one element"):
            case.function(x, inplace=True)
        assert torch.equal(buffer, before)
        return
    values = x.clone()
    assert case.function(x, inplace=True) is x
    accuracy.assert_near(case, "forward", x, values)
    x.copy_(values)
    assert torch.equal(buffer, before)
