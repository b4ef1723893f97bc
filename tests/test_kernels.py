"""The kernel path: Function, mask, strides, in place, errors, raw ops, for each backend.

On a GPU both backends run (`pytest -m gpu`). Without one the Triton kernels run in the interpreter:
`TRITON_INTERPRET=1 pytest tests/test_kernels.py -m "not gpu"`.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fused_act
from fused_act import ops
from fused_act.dispatch import DTYPES
from tests import accuracy, sanitize
from tests.cases import (
    BACKENDS,
    CASES,
    DEVICE,
    INTERPRET,
    LAYOUTS,
    PARAMETERS,
    all_backends,
    all_cases,
    all_dtypes,
    cases,
    unpack_mask,
)

pytestmark = pytest.mark.usefixtures("forced")


def kernels(backend, case):
    return ops.kernels(f"fused_act_{backend}")[case.name]


def make(layout, dtype):
    return LAYOUTS[layout](dtype=dtype, device=DEVICE)


@all_backends
@all_dtypes
def test_mask_is_one_bit_an_element_in_memory_order(backend, dtype):
    x = torch.randn(3, 5, 7, 2, dtype=dtype, device=DEVICE)
    x = (6 * x).contiguous(memory_format=torch.channels_last).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_act.relu6(x)
    assert sum(tensor.numel() * tensor.itemsize for tensor in saved) == -(-x.numel() // 8)
    mask = next(tensor for tensor in saved if tensor.numel() > 0)
    in_memory_order = x.detach().permute(0, 2, 3, 1).flatten()
    expected = (in_memory_order > 0) & (in_memory_order < 6)
    assert torch.equal(unpack_mask(mask, x.numel()), expected)


@all_backends
def test_relu6_gradient_that_does_not_pass_is_zero(backend):
    x = torch.tensor([-1.0, 7.0, 3.0], device=DEVICE, requires_grad=True)
    weight = torch.tensor([float("inf"), float("nan"), 2.0], device=DEVICE)
    (grad,) = torch.autograd.grad(fused_act.relu6(x), x, weight)
    assert grad.tolist() == [0.0, 0.0, 2.0]


@all_cases
@all_backends
def test_saves_once(case, backend):
    x = torch.randn(64, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = case.function(x)
    storages = {t.untyped_storage().data_ptr() for t in saved if t.numel() > 0}
    assert len(storages) == 1
    if case.activation.saves != "mask":
        kept = {"x": x, "y": y}[case.activation.saves]
        assert storages == {kept.untyped_storage().data_ptr()}
    name = case.activation.spelling
    assert type(y.grad_fn).__name__.startswith(f"{name}Function")


@all_cases
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
    accuracy.assert_near(case, "derivative", grad, leaf, weight)


@all_cases
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


@all_cases
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


@all_cases
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


@all_cases
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


@all_cases
@all_backends
def test_inplace_write_after_saving_is_caught(case, backend):
    leaf = torch.randn(8, device=DEVICE, requires_grad=True)
    x = leaf * 1
    y = x.sigmoid().mul(x)  # saves x
    case.function(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@all_cases
@all_backends
def test_mutated_input_is_caught(case, backend):
    leaf = torch.randn(8, device=DEVICE, requires_grad=True)
    x = leaf * 1
    y = case.function(x)
    x.add_(1)
    if case.activation.saves != "x":
        y.sum().backward()  # what was saved is still right
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@all_cases
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


@all_cases
@all_backends
def test_second_derivative_through_grad_output(case, backend):
    x = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
    weight = torch.ones_like(x, requires_grad=True)
    (first,) = torch.autograd.grad(case.function(x), x, weight, create_graph=True)
    (through_weight,) = torch.autograd.grad(first.sum(), weight)
    expected = torch.autograd.grad(case.torch_function(x).sum(), x)[0]
    torch.testing.assert_close(through_weight, expected, rtol=1e-4, atol=1e-5)


@all_cases
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


@all_cases
@all_backends
def test_forward_mode_through_backward(case, backend):
    def run(function):
        x = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
        y = function(x)
        with torch.autograd.forward_ad.dual_level():
            weight = torch.autograd.forward_ad.make_dual(torch.ones_like(x), torch.ones_like(x))
            (grad,) = torch.autograd.grad(y, x, weight)
            return torch.autograd.forward_ad.unpack_dual(grad).tangent

    try:
        expected = run(case.torch_function)
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            run(case.function)
    else:
        torch.testing.assert_close(run(case.function), expected, rtol=1e-4, atol=1e-5)


@all_cases
@all_backends
def test_backward_stays_with_the_backend_of_forward(case, backend):
    x = torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)
    y = case.function(x)
    with fused_act.use_backend("torch"), profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.autograd.grad(y, x, torch.ones_like(y))
    names = [event.name for event in profiled.events()]
    op = f"fused_act_{backend}::{case.name}_backward"
    assert op + "_from_output" * (case.activation.saves == "y") in names


@all_cases
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
        written = x.clone()
        assert torch.equal(case.function(written, inplace=True), expected)
        if mode is torch.no_grad:
            with torch.enable_grad():
                assert case.function(x).requires_grad
            # A leaf may be written here, as torch's own ops may.
            leaf = x.detach().clone().requires_grad_()
            assert case.function(leaf, inplace=True) is leaf
            assert torch.equal(leaf, expected)


@all_cases
@all_backends
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_traces_torchs_op(case, backend):
    x = torch.linspace(-7, 9, 37, device=DEVICE)
    traced = torch.jit.trace(lambda x: case.function(x), x)  # it takes no partial
    kinds = [node.kind() for node in traced.graph.nodes()]
    assert [kind for kind in kinds if kind.startswith("aten::")]
    assert not [kind for kind in kinds if kind.startswith("fused_act")]
    torch.testing.assert_close(traced(x), case.torch_function(x))


@all_cases
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


@all_cases
@all_backends
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(3, dtype=torch.float64), TypeError, "takes float16, bfloat16, float32; x is"),
        (torch.zeros(3, dtype=torch.int32), TypeError, "x is int32"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "x is complex64"),
        (torch.zeros(3, device="meta"), ValueError, "x is on meta"),
        (torch.zeros(3, 3).to_sparse(), (TypeError, ValueError), "backend takes"),
        ([1.0], TypeError, "expected x to be a Tensor, got list"),
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


@all_cases
@all_backends
def test_raw_ops_refuse_autograd(case, backend):
    x = torch.randn(3, device=DEVICE, requires_grad=True)
    table = kernels(backend, case)
    with pytest.raises(RuntimeError, match=f"call fused_act.{case.name}"):
        table.forward(x, *case.parameters)
    with torch.no_grad():
        accuracy.assert_near(case, "forward", table.forward(x, *case.parameters), x)
    x = x.detach()
    with pytest.raises(RuntimeError, match=f"call fused_act.{case.name}"):
        torch.func.jvp(lambda x: table.forward(x, *case.parameters), (x,), (x,))


@all_backends
def test_fx_traces_torchs_op(backend):
    graph = torch.fx.symbolic_trace(fused_act.Mish()).graph
    assert F.mish in [node.target for node in graph.nodes]


@all_cases
@all_backends
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_raw_backward_checks_its_arguments(case, backend, mode):
    """Under Autograd, and in inference mode below it, where each backend checks by itself."""
    x = torch.randn(4, 6, device=DEVICE)
    table = kernels(backend, case)
    backward = table.backward or table.backward_from_output
    if case.activation.saves == "mask":
        y, mask = table.forward_with_mask(x, *case.parameters)
        assert mask.shape == (3,)
        stride = list(y.stride())
        wrong = [
            (y.double(), mask, stride),
            (y, mask.float(), stride),
            (y, mask[:2], stride),
            (y, torch.zeros(6, dtype=torch.uint8, device=DEVICE)[::2], stride),
            (y, mask, [6]),
            (y, mask, [7, 1]),
            (y, mask, [3, 2]),  # overlapping, in as much memory as there is
            (y, mask, [-6, 1]),
        ]
    else:
        wrong = [
            (torch.randn(4, 5, device=DEVICE), x),
            (torch.randn(1, 6, device=DEVICE), x),
            (torch.randn(6, 4, device=DEVICE), x),
            (torch.randn(8, 6, device=DEVICE), x),
            (torch.randn(4, 6, device=DEVICE, dtype=torch.float16), x),
        ]
    errors = (TypeError, ValueError) if mode is contextlib.nullcontext else Exception
    for grad_output, saved, *layout in wrong:
        with mode(), pytest.raises(errors, match=r"(_backward\w*|fused_act): expected"):
            backward(grad_output, saved, *case.parameters, *layout)


@all_cases
@all_backends
def test_raw_backward_refuses_mixed_devices(case, backend):
    x = torch.randn(4, 6, device=DEVICE)
    saved, layout = x.to("meta"), ()
    if case.activation.saves == "mask":
        saved, layout = torch.empty(3, dtype=torch.uint8, device="meta"), ([6, 1],)
    table = kernels(backend, case)
    backward = table.backward or table.backward_from_output
    with pytest.raises(ValueError, match=rf"{case.name}_backward\w*: expected .* on "):
        backward(x, saved, *case.parameters, *layout)


@all_cases
@all_backends
def test_raw_out_op(case, backend):
    table = kernels(backend, case)
    x = torch.randn(5, 7, device=DEVICE)
    for out in (torch.empty(5, 7, device=DEVICE), torch.empty(7, 5, device=DEVICE).t()):
        version = out._version
        assert table.forward_out(x, *case.parameters, out=out) is None
        assert out._version > version
        accuracy.assert_near(case, "forward", out, x)
    gapped = torch.full((5, 14), 77.0, device=DEVICE)
    table.forward_out(x, *case.parameters, out=gapped[:, ::2])
    accuracy.assert_near(case, "forward", gapped[:, ::2], x)
    assert (gapped[:, 1::2] == 77).all()
    buffer = torch.linspace(-3, 8, 12291, device=DEVICE)
    before = buffer[:-1].clone()
    table.forward_out(buffer[:-1], *case.parameters, out=buffer[1:])
    accuracy.assert_near(case, "forward", buffer[1:], before)
    for wrong, error in (
        (torch.empty(5, 6, device=DEVICE), ValueError),
        (torch.empty(5, 7, device=DEVICE, dtype=torch.float16), TypeError),
    ):
        with pytest.raises(error, match=f"{case.name}.out: expected"):
            table.forward_out(x, *case.parameters, out=wrong)


@pytest.mark.parametrize("case", cases(PARAMETERS), ids=str)
@all_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gapped_permuted", "scalar"])
def test_opcheck(case, backend, dtype, layout):
    x = make(layout, dtype)
    table, parameters = kernels(backend, case), case.parameters
    y = torch.zeros_like(x)
    grad_output = torch.randn(y.shape[::-1], dtype=dtype, device=DEVICE)
    grad_output = grad_output.permute(tuple(range(y.dim()))[::-1])
    calls = [
        (table.forward, (x, *parameters), {}),
        (table.forward_out, (x, *parameters), {"out": y}),
    ]
    if case.activation.saves == "mask":
        mask = table.forward_with_mask(x, *parameters)[1]
        calls += [
            (table.forward_with_mask, (x, *parameters), {}),
            (table.forward_with_mask_out, (x, *parameters), {"out": y}),
            (table.backward, (grad_output, mask, *parameters, list(y.stride())), {}),
        ]
    if case.activation.saves == "x":
        calls += [(table.backward, (grad_output, x, *parameters), {})]
    if table.backward_from_output is not None:
        calls += [(table.backward_from_output, (grad_output, y, *parameters), {})]
    for op, args, kwargs in calls:
        torch.library.opcheck(op, args, kwargs)


@all_cases
@all_backends
def test_forced_backend_under_compile_is_one_opaque_op(case, backend):
    torch._dynamo.reset()
    graphs = []

    def record(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    compiled = torch.compile(case.function, fullgraph=True, backend=record)
    x = torch.randn(40, device=DEVICE)
    accuracy.assert_near(case, "forward", compiled(x), x)
    (call,) = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert call.target is kernels(backend, case).forward
    x.requires_grad_()
    y = torch.compile(case.function, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    accuracy.assert_near(case, "derivative", grad, x)


@all_backends
def test_changing_the_backend_recompiles(backend):
    torch._dynamo.reset()
    graphs = []

    def record(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    compiled = torch.compile(fused_act.silu, backend=record)
    x = torch.randn(3, device=DEVICE)
    compiled(x)
    with fused_act.use_backend("torch"):
        compiled(x)
    assert len(graphs) == 2
    assert F.silu in [node.target for node in graphs[1].graph.nodes]


@all_cases
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("strict", [False, True])
def test_exports_torchs_op(case, backend, strict):
    """Of float64 too, which the kernels refuse."""

    class Module(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    x = torch.randn(40, device=DEVICE, dtype=torch.float64)
    ours, theirs = (
        torch.export.export(Module(function), (x,), strict=strict)
        for function in (case.function, case.torch_function)
    )
    assert ours.graph_module.code == theirs.graph_module.code
    assert torch.equal(ours.module()(x), case.torch_function(x))


@pytest.mark.skipif(not INTERPRET, reason="for Triton's interpreter")
def test_what_compute_sanitizer_is_to_watch_runs(capsys):
    sanitize.main(["--backends", "triton", "--sizes", "0", "1", "9", "--offsets", "0", "3"])
    count = 18 * (len(CASES) + 6)
    assert capsys.readouterr().out == f"sanitize: {count} tensors through triton\n"
