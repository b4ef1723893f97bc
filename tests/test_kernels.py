"""The kernel path under autograd: what is saved, in place, second derivatives, modes, for each
backend.

On a GPU both backends run, without one the Triton kernels in the interpreter.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fused_act
from tests import sanitize
from tests.shared import accuracy
from tests.shared.cases import (
    CASES,
    DEVICE,
    all_backends,
    all_dtypes,
    all_rows,
    elementwise_rows,
    kernels,
    of_family,
)
from tests.shared.layouts import LAYOUTS, make, passes, unpack_mask
from tests.shared.matrices import assert_equal

pytestmark = pytest.mark.usefixtures("forced")


def saved_by(function, x):
    """The result of `function(x)`, and the tensors that it saves for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(x)
    return y, saved


MASKED = [case for case in CASES if case.row.saves == "mask"]


@pytest.mark.parametrize("case", MASKED, ids=str)
@all_backends
@all_dtypes
def test_mask_is_one_bit_an_element_in_memory_order(case, backend, dtype):
    x = torch.randn(3, 5, 7, 2, dtype=dtype, device=DEVICE)
    x = (6 * x).contiguous(memory_format=torch.channels_last).requires_grad_()
    _, saved = saved_by(case.function, x)
    assert sum(tensor.numel() * tensor.itemsize for tensor in saved) == -(-x.numel() // 8)
    mask = next(tensor for tensor in saved if tensor.numel() > 0)
    in_memory_order = x.detach().permute(0, 2, 3, 1).flatten()
    assert torch.equal(unpack_mask(mask, x.numel()), passes(case, in_memory_order))


@of_family("mirrored")
@all_backends
@all_dtypes
def test_mirrored_mask_is_one_bit_an_element_of_y(case, backend, dtype):
    """And all that is saved. Rows begin with a byte; the bits behind their ends are 0."""
    x = torch.randn(5, 3, 7, dtype=dtype, device=DEVICE, requires_grad=True)
    _, saved = saved_by(lambda x: case.facts.function(x, 1), x)
    (mask,) = [tensor for tensor in saved if tensor.numel() > 0]
    assert mask.dtype is torch.uint8
    assert mask.shape == (5, 2, 3)
    shifts = torch.arange(8, dtype=torch.uint8, device=DEVICE)
    bits = ((mask.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()
    assert torch.equal(bits[..., :21], torch.stack([x, -x], 1).flatten(2) > 0)
    assert not bits[..., 21:].any()


@all_backends
def test_relu6_gradient_that_does_not_pass_is_zero(backend):
    x = torch.tensor([-1.0, 7.0, 3.0], device=DEVICE, requires_grad=True)
    weight = torch.tensor([float("inf"), float("nan"), 2.0], device=DEVICE)
    (grad,) = torch.autograd.grad(fused_act.relu6(x), x, weight)
    assert grad.tolist() == [0.0, 0.0, 2.0]


@elementwise_rows
@all_backends
def test_saves_once(case, backend):
    x = torch.randn(64, device=DEVICE, requires_grad=True)
    y, saved = saved_by(case.function, x)
    storages = {t.untyped_storage().data_ptr() for t in saved if t.numel() > 0}
    assert len(storages) == 1
    if case.row.saves != "mask":
        kept = {"x": x, "y": y}[case.row.saves]
        assert storages == {kept.untyped_storage().data_ptr()}
    name = case.row.spelling
    assert y.grad_fn.name() == f"{name}FunctionBackward"


@elementwise_rows
@all_backends
@all_dtypes
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed", "gapped", "gapped_permuted", "empty"]
)
def test_inplace(case, backend, dtype, layout):
    leaf = make(layout, dtype).requires_grad_()
    x = torch.empty_strided(leaf.shape, leaf.stride(), dtype=dtype, device=DEVICE).copy_(leaf)
    version = x._version
    y = case.function(x, inplace=True)
    assert y is x
    assert x._version > version
    accuracy.assert_near(case, "forward", y.detach(), leaf)
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, leaf, weight)
    accuracy.assert_near(case, "derivative", grad, leaf, weight, y=y, inplace=True)


@elementwise_rows
@all_backends
# torch looks for no other overlap than that of expanded tensors, and its results depend on it.
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "overlapping"])
def test_inplace_without_grad(case, backend, layout):
    x = make(layout, torch.float32)
    before = x.clone()
    version = x._version
    if layout.startswith("expanded"):
        with pytest.raises(RuntimeError, match="more than one element"):
            case.function(x, inplace=True)
        assert torch.equal(x, before)
        return
    assert case.function(x, inplace=True) is x
    assert x._version > version
    accuracy.assert_near(case, "forward", x, before)


@elementwise_rows
@all_backends
def test_inplace_refuses_what_torch_refuses(case, backend):
    leaf = torch.randn(8, device=DEVICE, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        case.function(leaf, inplace=True)
    with pytest.raises(RuntimeError, match="leaf"):
        case.function(leaf[2:], inplace=True)
    assert torch.equal(leaf, before)
    first, _ = (leaf * 1).split(4)
    with pytest.raises(RuntimeError, match="multiple views"):
        case.function(first, inplace=True)


@elementwise_rows
@all_backends
def test_inplace_on_an_inference_tensor(case, backend):
    with torch.inference_mode():
        x = torch.linspace(-3, 8, 5, device=DEVICE)
        before = x.clone()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            case.function(x, inplace=True)
        assert f"fused_act_{backend}::{case.name}" in [event.name for event in profiled.events()]
        accuracy.assert_near(case, "forward", x, before)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        case.function(x, inplace=True)
    before = x.clone()  # torch's own op, which it was, writes before it raises
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        kernels(backend, case).forward_out(before.clone(), *case.parameters, out=x)
    assert torch.equal(x, before)


@elementwise_rows
@all_backends
def test_inplace_on_a_view_reaches_its_base(case, backend):
    def run(function):
        leaf = torch.linspace(-8, 8, 12, device=DEVICE, requires_grad=True)
        base = leaf * 1
        function(base.view(3, 4)[1:], inplace=True)
        return base, torch.autograd.grad(base.sum(), leaf)[0]

    # swish without grad has no in-place op to compare with: compute it out of place.
    def reference(view, inplace):
        return view.copy_(case.torch_function(view.clone()))

    for ours, theirs in zip(run(case.function), run(reference)):
        torch.testing.assert_close(ours, theirs)


@elementwise_rows
@all_backends
def test_inplace_write_after_saving_is_caught(case, backend):
    leaf = torch.randn(8, device=DEVICE, requires_grad=True)
    x = leaf * 1
    y = x.sigmoid().mul(x)  # saves x
    case.function(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@all_rows
@all_backends
def test_mutated_input_is_caught(case, backend):
    leaf = torch.randn(8, device=DEVICE, requires_grad=True)
    x = leaf * 1
    y = case.function(x)
    x.add_(1)
    if case.saves != "x":
        y.sum().backward()  # what was saved is still right
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@elementwise_rows
@all_backends
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gapped"])
def test_second_derivative(case, backend, inplace, layout):
    values, weight = make(layout, torch.float32), make(layout, torch.float32)

    def run(function):
        leaf = values.detach().requires_grad_()
        x = torch.empty_strided(leaf.shape, leaf.stride(), device=DEVICE).copy_(leaf)
        y = function(x, inplace=inplace)
        (first,) = torch.autograd.grad(y, leaf, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return first, second

    def reference(x, inplace=False):
        return case.torch_function(x)

    for ours, theirs in zip(run(case.function), run(reference)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@elementwise_rows
@all_backends
def test_second_derivative_through_grad_output(case, backend):
    x = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
    weight = torch.ones_like(x, requires_grad=True)
    (first,) = torch.autograd.grad(case.function(x), x, weight, create_graph=True)
    (through_weight,) = torch.autograd.grad(first.sum(), weight)
    expected = torch.autograd.grad(case.torch_function(x).sum(), x)[0]
    torch.testing.assert_close(through_weight, expected, rtol=1e-4, atol=1e-5)


@all_rows
@all_backends
@pytest.mark.parametrize("leaf_hook", [False, True])
def test_hooks_run_once_under_create_graph(case, backend, leaf_hook):
    def run(function):
        leaf = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
        x = leaf * 1
        x.retain_grad()
        (leaf if leaf_hook else x).register_hook(lambda grad: grad * 2)
        function(x).sum().backward(create_graph=True)
        return x.grad, leaf.grad

    for ours, theirs in zip(run(case.function), run(case.torch_function)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@all_rows
@all_backends
def test_forward_mode_through_backward(case, backend):
    def run(function):
        x = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
        y = function(x)
        with torch.autograd.forward_ad.dual_level():
            ones = torch.ones_like(y)
            weight = torch.autograd.forward_ad.make_dual(ones, 3 * ones)
            (grad,) = torch.autograd.grad(y, x, weight)
            return torch.autograd.forward_ad.unpack_dual(grad).tangent

    try:
        expected = run(case.torch_function)
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            run(case.function)
    else:
        tolerance = 0.0 if case.row.family == "mirrored" else 1e-5
        torch.testing.assert_close(
            run(case.function), expected, rtol=10 * tolerance, atol=tolerance
        )


@all_rows
@all_backends
def test_backward_stays_with_the_backend_of_forward(case, backend):
    x = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
    y = case.function(x)
    with fused_act.use_backend("torch"), profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.autograd.grad(y, x, torch.ones_like(y))
    names = [event.name for event in profiled.events()]
    op = f"fused_act_{backend}::{case.name}_backward"
    assert op + "_from_output" * (case.saves == "y") in names


@all_rows
@all_backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_recorded(case, backend, mode):
    x = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
    expected = case.function(x.detach())
    with mode():
        y = case.function(x)
        assert y.grad_fn is None
        assert not y.requires_grad
        assert torch.equal(y, expected)
        if mode is torch.no_grad:
            with torch.enable_grad():
                assert case.function(x).requires_grad
        if not case.has_inplace:
            return
        written = x.clone()
        assert torch.equal(case.function(written, inplace=True), expected)
        if mode is torch.no_grad:
            # A leaf may be written here, as torch's own ops may.
            leaf = x.detach().clone().requires_grad_()
            assert case.function(leaf, inplace=True) is leaf
            assert torch.equal(leaf, expected)


@all_rows
@all_backends
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_traces_torchs_op(case, backend):
    x = torch.linspace(-7, 9, 37, device=DEVICE)
    traced = torch.jit.trace(lambda x: case.function(x), x)  # it takes no partial
    kinds = [node.kind() for node in traced.graph.nodes()]
    assert [kind for kind in kinds if kind.startswith("aten::")]
    assert not [kind for kind in kinds if kind.startswith("fused_act")]
    torch.testing.assert_close(traced(x), case.torch_function(x))


@all_rows
@all_backends
def test_a_tensor_that_has_outlived_its_transform(case, backend):
    escaped = []
    weight = torch.linspace(-3, 9, 7, device=DEVICE, requires_grad=True)

    def leak(x):
        escaped.append(x * weight)
        return escaped[0].sum()

    torch.func.grad(leak)(torch.ones(7, device=DEVICE))
    (grad,) = torch.autograd.grad(case.function(escaped[0]).sum(), weight)
    expected = torch.autograd.grad(case.torch_function(weight).sum(), weight)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


@all_backends
def test_module_trains(backend):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU6(inplace=True), nn.Conv2d(3, 3, 3), nn.Mish(), nn.SiLU()
    ).to(DEVICE)
    x = torch.randn(2, 2, 9, 9, device=DEVICE)

    def gradients():
        model.zero_grad()
        model(x).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    fused_act.replace_activations(model)
    for ours, theirs in zip(gradients(), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@all_rows
@all_backends
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (
            torch.zeros(3, dtype=torch.float64),
            TypeError,
            "takes float16, bfloat16, float32; input is",
        ),
        (torch.zeros(3, dtype=torch.int32), TypeError, "input is int32"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "input is complex64"),
        (torch.zeros(3, device="meta"), ValueError, "input is on meta"),
        (torch.zeros(3, 3).to_sparse(), (TypeError, ValueError), "backend takes"),
        ([1.0], TypeError, "expected input to be a Tensor, got list"),
    ],
    ids=["float64", "int32", "complex", "meta", "sparse", "list"],
)
def test_forced_backend_refuses(case, backend, x, error, match):
    with pytest.raises(error, match=match):
        case.function(x)
    if isinstance(x, torch.Tensor) and x.layout is torch.strided:  # at trace time, too
        compiled = torch.compile(lambda x: case.function(x), backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=match):
            compiled(x)


@all_backends
def test_forced_backend_refuses_subclasses(backend):
    class Subclass(torch.Tensor):
        pass

    x = torch.zeros(3, device=DEVICE).as_subclass(Subclass)
    with pytest.raises(TypeError, match="plain tensors, got Subclass"):
        fused_act.mish(x)
    compiled = torch.compile(fused_act.mish, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="plain tensors, got Subclass"):
        compiled(x)


@all_backends
def test_fx_traces_torchs_op(backend):
    graph = torch.fx.symbolic_trace(fused_act.Mish()).graph
    assert F.mish in [node.target for node in graph.nodes]


@pytest.mark.full
@pytest.mark.interpreted
def test_what_compute_sanitizer_is_to_watch_runs(capsys):
    sanitize.main(["--backends", "triton", "--sizes", "0", "1", "9", "--offsets", "0", "3"])
    matrices = sum(2 if case.facts.weights else 1 for case in sanitize.MATRICES)
    count = 18 * (len(CASES) + 2 * 2 * matrices)
    assert capsys.readouterr().out == f"sanitize: {count} tensors through triton\n"


@of_family("weighted")
@all_backends
@pytest.mark.parametrize("asked", ["x", "weight", "both"])
def test_gradients_that_are_asked_for(case, backend, asked):
    """And second ones, as torch's."""
    function = case.facts.function
    x = torch.randn(3, 4, 5, device=DEVICE, requires_grad=asked != "weight")
    weight = torch.rand(4, device=DEVICE, requires_grad=asked != "x")
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]

    def derivatives(f):
        y = f(x, weight)
        grads = torch.autograd.grad(y, leaves, torch.cos(y.detach()), create_graph=True)
        twice = torch.autograd.grad(
            sum((grad**2).sum() for grad in grads), leaves, allow_unused=True
        )
        return y, *grads, *twice

    for ours, theirs in zip(derivatives(function), derivatives(case.facts.torch_function)):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    y = function(x, weight)
    y.backward(torch.ones_like(y))
    assert (x.grad is None) == (asked == "weight")
    assert (weight.grad is None) == (asked == "x")


@all_backends
def test_autocast_casts_both_as_torch_does(backend):
    x, weight = torch.randn(3, 4, device=DEVICE, requires_grad=True), torch.rand(4, device=DEVICE)
    weight.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.float16):
        ours, theirs = fused_act.prelu(x, weight), F.prelu(x, weight)
    assert ours.dtype is torch.float16
    torch.testing.assert_close(ours, theirs)
    grads = torch.autograd.grad(ours.sum(), (x, weight))
    for grad, expected in zip(grads, torch.autograd.grad(theirs.sum(), (x, weight))):
        assert grad.dtype is torch.float32
        torch.testing.assert_close(grad, expected, rtol=2e-3, atol=2e-3)


@of_family("weighted")
@all_backends
def test_a_weight_of_no_dimension_and_one_with_gaps(case, backend):
    x = torch.randn(3, 4, device=DEVICE)
    for weight in (torch.tensor(0.5, device=DEVICE), torch.rand(8, device=DEVICE)[::2]):
        weight.requires_grad_()
        y = case.facts.function(x, weight)
        expected = case.row.torch_forward(x, weight)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), weight)
        (theirs,) = torch.autograd.grad(expected.sum(), weight)
        torch.testing.assert_close(grad, theirs)


@of_family("mirrored")
@all_backends
def test_a_forced_backend_runs_its_kernels(case, backend):
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        y = case.function(x)
        case.function(x.detach())
        with fused_act.use_backend("torch"):  # backward stays with the backend of forward
            y.sum().backward()
    names = {event.name for event in profiled.events()}
    op = f"fused_act_{backend}::{case.name}"
    expected = {op, f"{op}_with_mask", f"{op}_backward"}
    assert expected <= names
    assert "aten::cat" not in names


@of_family("mirrored")
@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gapped"])
def test_mirrored_second_derivative(case, backend, layout):
    values = make(layout, torch.float32)

    def run(function):
        x = values.detach().requires_grad_()
        weight = torch.linspace(-2, 2, 2 * x.numel(), device=DEVICE)
        weight = weight.view(function(x).shape).requires_grad_()
        (first,) = torch.autograd.grad(function(x), x, weight, create_graph=True)
        return first, *torch.autograd.grad(first.pow(2).sum(), (x, weight))

    for ours, theirs in zip(run(case.function), run(case.torch_function)):
        assert_equal(ours, theirs)
