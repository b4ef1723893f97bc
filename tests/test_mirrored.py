"""CReLU, y = cat([f(x), f(-x)], dim): exactly torch's values and gradients on every path.

On a GPU both backends run. Without one the Triton kernels run in the interpreter:
`TRITON_INTERPRET=1 pytest tests/test_mirrored.py -m "not gpu"`.
"""

import functools
import re

import pytest
import torch

import fused_act
from fused_act import ops
from fused_act.activations import ROWS
from fused_act.families.mirrored import Mirrored
from tests.cases import (
    DEVICE,
    GRAD_LAYOUTS,
    INTERPRET,
    LAYOUTS,
    Guarded,
    all_backends,
    all_dtypes,
    both_16_bit_dtypes,
    torch_crelu,
)

pytestmark = pytest.mark.usefixtures("forced")

CRELU = ROWS["crelu"]
# Around the ends of mask bytes and of tiles, which have 4,096 bytes.
COLUMNS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 48, 63, 1023, 1024, 1025, 2048, 2056, 4097)


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_as_torch(function, x, dim, *make_grad_outputs):
    """y, with and without grad, and the gradient of x, whose strides it has."""
    x = x.detach().requires_grad_()
    y, expected = function(x, dim), torch_crelu(x, dim)
    assert_equal(y, expected)
    assert_equal(function(x.detach(), dim), expected.detach())
    for make_grad_output in make_grad_outputs:
        grad_output = make_grad_output(y)
        ours, theirs = (
            torch.autograd.grad(z, x, grad_output, retain_graph=True)[0] for z in (y, expected)
        )
        assert ours.stride() == torch.empty_like(x).stride()
        assert_equal(ours, theirs)


@all_backends
@both_16_bit_dtypes
def test_every_16_bit_value(backend, dtype):
    """NaN, infinities and zeros of both signs among them, in gradients too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(dtype).view(512, 128)
    if INTERPRET and dtype is torch.bfloat16:  # which mangles the subnormal ones
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
    weight = torch.tensor([1.0, -2.0, float("inf"), float("nan"), 0.0, -3.0, float("-inf")])
    weight = weight.to(dtype).to(DEVICE)

    def grad_output(y):
        # Where x is NaN both halves pass. The interpreter truncates their difference to bf16, but
        # has these exactly.
        return weight.repeat(-(-y.numel() // 7))[: y.numel()].view(y.shape)

    assert_as_torch(fused_act.crelu, x, 1, grad_output)


@all_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    """Every layout of x along every dimension, with every layout of grad_output."""
    x = LAYOUTS[layout](dtype=torch.float32, device=DEVICE)
    for dim in range(-x.dim(), x.dim()):
        # They are many, and dimensions from the back are those from the front.
        makes = GRAD_LAYOUTS.values() if dim < 0 else [torch.randn_like]
        assert_as_torch(fused_act.crelu, x, dim, *makes)


@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_3d", "gapped"])
def test_strides_are_those_of_cat(backend, layout):
    x = LAYOUTS[layout](dtype=torch.float16, device=DEVICE)
    for dim in range(x.dim()):
        assert fused_act.crelu(x, dim).stride() == torch_crelu(x, dim).stride()


@all_backends
@all_dtypes
def test_sizes_and_guard_bands(backend, dtype, monkeypatch):
    """Rows of every length; nothing outside y, mask and grad_input is written."""
    allocated = []
    if backend == "triton":
        from fused_act.families import raw_op

        def empty_strided(size, stride, dtype, device):
            numel = torch.Size(size).numel()
            allocated.append(Guarded(numel, dtype, device=device))
            inside = allocated[-1].inside
            return inside.as_strided(size, stride, inside.storage_offset())

        class Torch:
            """torch, as what allocates sees it, with guarded allocations."""

            __getattr__ = staticmethod(functools.partial(getattr, torch))

        guarded = Torch()
        guarded.empty_strided = empty_strided
        guarded.empty = lambda size, dtype, device: empty_strided(
            size, torch.empty(size, device="meta").stride(), dtype, device
        )
        monkeypatch.setattr(raw_op, "torch", guarded)
    for i, columns in enumerate(COLUMNS):
        x = 4 * torch.randn((1, 3, 67)[i % 3] if columns < 64 else 3, columns, device=DEVICE)
        assert_as_torch(fused_act.crelu, x.to(dtype), 1, torch.randn_like)
    # y twice, the mask, grad_input; the CUDA kernels' loops are tested so on the host.
    assert len(allocated) == 4 * len(COLUMNS) * (backend == "triton")
    for output in allocated:
        output.assert_untouched_outside()


@all_backends
@all_dtypes
def test_mask_is_one_bit_an_element_of_y(backend, dtype):
    """And all that is saved. Rows begin with a byte; the bits behind their ends are 0."""
    x = torch.randn(5, 3, 7, dtype=dtype, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_act.crelu(x)
    (mask,) = [tensor for tensor in saved if tensor.numel() > 0]
    assert mask.dtype is torch.uint8
    assert mask.shape == (5, 2, 3)
    shifts = torch.arange(8, dtype=torch.uint8, device=DEVICE)
    bits = ((mask.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()
    assert torch.equal(bits[..., :21], torch.stack([x, -x], 1).flatten(2) > 0)
    assert not bits[..., 21:].any()


@all_backends
def test_a_forced_backend_runs_its_kernels(backend):
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        y = fused_act.crelu(x)
        fused_act.crelu(x.detach())
        with fused_act.use_backend("torch"):  # backward stays with the backend of forward
            y.sum().backward()
    names = {event.name for event in profiled.events()}
    expected = {f"fused_act_{backend}::crelu{kind}" for kind in ("", "_with_mask", "_backward")}
    assert expected <= names
    assert "aten::cat" not in names


@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gapped"])
def test_second_derivative(backend, layout):
    values = LAYOUTS[layout](dtype=torch.float32, device=DEVICE)

    def run(function):
        x = values.detach().requires_grad_()
        weight = torch.linspace(-2, 2, 2 * x.numel(), device=DEVICE)
        weight = weight.view(function(x).shape).requires_grad_()
        (first,) = torch.autograd.grad(function(x), x, weight, create_graph=True)
        return first, *torch.autograd.grad(first.pow(2).sum(), (x, weight))

    for ours, theirs in zip(run(fused_act.crelu), run(torch_crelu)):
        assert_equal(ours, theirs)


@all_backends
def test_forward_mode_through_backward(backend):
    def run(function):
        x = torch.linspace(-7, 9, 36, device=DEVICE).view(4, 9).requires_grad_()
        y = function(x)
        with torch.autograd.forward_ad.dual_level():
            ones = torch.ones_like(y)
            weight = torch.autograd.forward_ad.make_dual(ones, 3 * ones)
            (grad,) = torch.autograd.grad(y, x, weight)
            return torch.autograd.forward_ad.unpack_dual(grad).tangent

    assert_equal(run(fused_act.crelu), run(torch_crelu))


@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gapped_permuted"])
def test_opcheck(backend, layout):
    table = ops.kernels(f"fused_act_{backend}")["crelu"]
    x = LAYOUTS[layout](dtype=torch.bfloat16, device=DEVICE)
    dense = torch.empty_like(x)
    y, mask = table.forward_with_mask(x, -2)
    grad_output = torch.randn(y.shape[::-1], dtype=y.dtype, device=DEVICE)
    grad_output = grad_output.permute(tuple(range(y.dim()))[::-1])
    torch.library.opcheck(table.forward, (x, -2))
    torch.library.opcheck(table.forward_with_mask, (x, -2))
    torch.library.opcheck(table.backward, (grad_output, mask, -2, list(dense.stride())))


@all_backends
def test_driver_takes_another_activation(backend):
    """It knows none by name."""
    if backend != "triton":
        pytest.skip("csrc/register.cu has no other mirrored activation")
    from fused_act.backends import triton

    row = Mirrored(name="mirrored", spelling="MirroredReLU6", derived_from=ROWS["relu6"])
    run = triton.implementations(row)
    x = (6 * torch.randn(5, 3, 11, device=DEVICE)).requires_grad_()
    expected = row.torch_forward(x, 2)
    assert_equal(run["mirrored"](x.detach(), 2), expected.detach())
    y, mask = run["mirrored_with_mask"](x.detach(), 2)
    assert_equal(y, expected.detach())
    grad_output = torch.randn_like(y)
    (grad,) = torch.autograd.grad(expected, x, grad_output)
    assert_equal(run["mirrored_backward"](grad_output, mask, 2, list(x.stride())), grad)


# Bad input.

BAD_INPUT = {
    "0-d": lambda: (torch.tensor(1.0, device=DEVICE), 0),
    "dim too large": lambda: (torch.randn(3, 4, device=DEVICE), 2),
    "dim too small": lambda: (torch.randn(3, 4, device=DEVICE), -3),
    "no channels": lambda: (torch.randn(3, device=DEVICE), 1),
    "float dim": lambda: (torch.randn(3, 4, device=DEVICE), 1.0),
    "bool dim": lambda: (torch.randn(3, 4, device=DEVICE), True),
    "no dim": lambda: (torch.randn(3, 4, device=DEVICE), None),
}


@all_backends
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_torchs_error(backend, case):
    """With every backend: what a kernel does not take along `dim`, torch refuses."""
    x, dim = BAD_INPUT[case]()
    with pytest.raises((IndexError, RuntimeError, TypeError)) as theirs:
        torch_crelu(x, dim)
    for choice in ("auto", backend):
        with fused_act.use_backend(choice):
            for function in (fused_act.crelu, fused_act.CReLUFunction.apply):
                with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
                    function(x, dim)


@all_backends
def test_forced_backend_refuses(backend):
    for x, error, match in (
        (torch.zeros(3, 3, dtype=torch.float64), TypeError, "crelu: .* x is float64"),
        (torch.zeros(3, 3, device="meta"), ValueError, "crelu: .* x is on meta"),
        ([1.0], TypeError, "crelu: expected x to be a Tensor, got list"),
    ):
        with pytest.raises(error, match=match):
            fused_act.crelu(x)


@all_backends
def test_raw_ops_check_their_arguments(backend):
    table = ops.kernels(f"fused_act_{backend}")["crelu"]
    x = torch.randn(4, 6, device=DEVICE)
    y, mask = table.forward_with_mask(x, 1)
    for args, error, match in (
        ((x, 2), IndexError, r"crelu: expected dim between -2 and 1, got 2 for shape \(4, 6\)"),
        ((x[0, 0], 0), IndexError, "expected dim x with dimensions, got 0"),
        ((x.double(), 1), TypeError, "expected float16, bfloat16 or float32"),
    ):
        with pytest.raises(error, match=match):
            table.forward(*args)
    stride = [6, 1]
    for args, error, match in (
        ((y[:, 1:], mask, 1, stride), ValueError, "of even size along dim 1, got 11"),
        ((y, mask, 2, stride), IndexError, "expected dim between"),
        ((y, mask.float(), 1, stride), TypeError, "expected mask to be uint8"),
        ((y, mask.flatten(), 1, stride), ValueError, r"mask of shape \(4, 2, 1\)"),
        ((y, mask[:3], 1, stride), ValueError, r"mask of shape \(4, 2, 1\)"),
        ((y, mask.to("meta"), 1, stride), ValueError, "expected mask on"),
        ((y, mask, 1, [12, 1]), ValueError, r"dense tensor of shape \(4, 6\)"),
        ((y, mask, 1, [1]), ValueError, r"dense tensor of shape \(4, 6\)"),
    ):
        with pytest.raises(error, match=match):
            table.backward(*args)
    with pytest.raises(RuntimeError, match=r"call fused_act\.crelu"):
        table.forward(x.requires_grad_(), 1)


@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gapped"])
def test_forced_backend_under_compile_is_one_opaque_op(backend, layout):
    torch._dynamo.reset()
    graphs = []

    def record(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    x = LAYOUTS[layout](dtype=torch.float32, device=DEVICE)
    compiled = torch.compile(fused_act.crelu, fullgraph=True, backend=record)
    assert_equal(compiled(x, 1), torch_crelu(x, 1))
    (call,) = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert call.target is ops.kernels(f"fused_act_{backend}")["crelu"].forward
    compiled = torch.compile(fused_act.crelu, fullgraph=True, backend="aot_eager")
    assert_as_torch(compiled, x, 1, torch.randn_like)
