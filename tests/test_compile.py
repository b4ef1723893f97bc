"""Under torch.compile the public functions give one graph of fusible math.

How accurate it is: test_accuracy.py.
"""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache

import fused_act
from fused_act import ops
from fused_act.families.base import kernels_for
from fused_act.families.compiled import digest
from tests.shared import accuracy, matrices
from tests.shared.cases import (
    BACKENDS,
    CASES,
    DEVICE,
    INTERPRET,
    all_backends,
    all_dtypes,
    elementwise_rows,
    of_family,
)
from tests.shared.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor needs a C++ compiler",
)


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield


class Graphs(list):
    """A compiler that keeps the graphs it gets, and runs them as they are."""

    def __call__(self, graph_module, inputs):
        self.append(graph_module)
        return graph_module


def run(function, x, weight):
    """y and dy."""
    x = x.detach().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, weight)[0]


@elementwise_rows
@all_dtypes
@pytest.mark.parametrize("inplace", [False, True])
def test_one_graph_for_every_size(case, dtype, inplace):

    def chain(function, x):
        return function(x * 2, inplace=inplace) + 1

    compiled = torch.compile(lambda x: chain(case.function, x), fullgraph=True, dynamic=True)
    atol = 2e-2 if dtype is torch.bfloat16 else 1e-2
    for size in (17, 33, 64):
        torch._dynamo.config.error_on_recompile = size > 17
        x = torch.randn(size).to(dtype)
        weight = torch.randn_like(x)
        ours = run(compiled, x, weight)
        theirs = run(lambda x: case.torch_function(x * 2) + 1, x, weight)
        for a, b in zip(ours, theirs):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=atol)


MODULES = [fused_act.Mish, fused_act.SiLU, fused_act.ReLU6, fused_act.Swish]


@pytest.mark.parametrize("activation", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_modules_recompile_once_at_most(activation, inplace, training, dynamic):
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), activation(inplace=inplace)).train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    counters.clear()
    for size in (17, 33) if dynamic is False else (17, 33, 64, 65):
        x = torch.randn(size, 5)
        with torch.set_grad_enabled(training):
            y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        if training:
            ours, theirs = (torch.autograd.grad(z.sum(), model[0].weight)[0] for z in (y, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


@elementwise_rows
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(case, mode):
    x, weight = torch.randn(33, 65), torch.randn(33, 65)
    compiled = torch.compile(lambda x: case.function(x * 2) + 1, fullgraph=True, mode=mode)
    for _ in range(3):  # a CUDA graph is recorded in the second call and replayed in the third
        ours = run(compiled, x, weight)
    for a, b in zip(ours, run(lambda x: case.torch_function(x * 2) + 1, x, weight)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_caches_on_disk():
    """What one process compiled, another loads; and never for another activation or beta."""
    x, weight = torch.linspace(-9, 9, 64), torch.randn(64)

    def results():
        found = []
        for case in CASES:
            torch._dynamo.reset()  # as a new process would come
            found.append(run(torch.compile(case.function, fullgraph=True), x, weight))
        return found

    with fresh_cache():
        first = results()
        counters.clear()
        second = results()
    assert counters["inductor"]["fxgraph_cache_hit"] >= 2 * len(CASES)
    assert counters["aot_autograd"]["autograd_cache_hit"] == len(CASES)
    for case, ours, again in zip(CASES, first, second):
        for a, b, expected in zip(ours, again, run(case.torch_function, x, weight)):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-5)


def test_the_graph_changes_with_the_sources(tmp_path):
    """AOTAutograd caches by a graph that names the formula, and does not show it."""
    graphs = Graphs()
    torch.compile(fused_act.mish, backend=graphs)(torch.ones(3, requires_grad=True))
    package = Path(fused_act.__file__).parent
    assert f"'formula {digest(package)}'" in graphs[0].code
    copy = shutil.copytree(package, tmp_path / "fused_act", ignore=shutil.ignore_patterns("*.so"))
    assert digest(copy) == digest(package)
    path = copy / "activations" / "mish.py"
    path.write_text(path.read_text().replace("-87.0", "-86.0"))
    assert digest(copy) != digest(package)


@elementwise_rows
def test_chain_becomes_one_kernel_each_way(case):
    def chain(x, w, b, s):
        return case.function(x * w + b) * s

    arguments = [torch.randn(64, 64) for _ in range(4)]
    arguments[0].requires_grad_()
    y, sources = torch._inductor.utils.run_and_get_code(
        torch.compile(chain, fullgraph=True), *arguments
    )
    _, backward = torch._inductor.utils.run_and_get_code(lambda: y.sum().backward())
    for code in [*sources, *backward]:
        assert code.count("async_compile.cpp_pybinding(") == 1
        assert "double" not in code.split("async_compile.wait")[0].split("cpp_pybinding(")[1]


@all_dtypes
@pytest.mark.parametrize("dynamic", [False, True])
def test_python_scalars_bring_in_no_fp64(dtype, dynamic):
    """It halves the speed (linkedin/Liger-Kernel#1350). A beta that varies is a scalar of it."""
    dtypes = []

    def compiler(graph_module, inputs):
        for node in graph_module.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                dtypes.append(value.dtype)
        return make_boxed_func(graph_module.forward)

    def backend(graph_module, inputs):
        return aot_module_simplified(graph_module, inputs, fw_compiler=compiler)

    @torch.compile(backend=backend, fullgraph=True, dynamic=dynamic)
    def function(x, beta):
        y = fused_act.mish(x * 0.7) + fused_act.silu(x) + fused_act.relu6(x + 0.3)
        return y + fused_act.swish(x, beta) + fused_act.swish(x, -0.5)

    x = torch.randn(9, dtype=dtype, requires_grad=True)
    function(x, 1.3).sum().backward()
    assert len(dtypes) > 20
    assert set(dtypes) <= {dtype, torch.float32, torch.bool}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: fused_act.swish(x, float("nan")),
            "swish: expected beta between -2.3e+38 and 2.3e+38, got nan",
        ),
        (lambda x: fused_act.swish(x, "1"), "swish: expected beta to be a float, got str"),
    ],
    ids=["nan", "str"],
)
def test_bad_input_fails_at_trace_time(call, sentence):
    x = torch.randn(3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(sentence)):
        torch.compile(call, fullgraph=True)(x)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(sentence)}$"):
        torch.compile(call)(x)


@elementwise_rows
@pytest.mark.parametrize("training", [False, True])
def test_default_graph_has_no_opaque_op(case, training):
    """What Inductor gets, forward and backward."""
    graphs = []

    def compiler(graph_module, inputs):
        graphs.append(graph_module)
        return make_boxed_func(graph_module.forward)

    def backend(graph_module, inputs):
        return aot_module_simplified(graph_module, inputs, fw_compiler=compiler)

    compiled = torch.compile(case.function, fullgraph=True, backend=backend)
    y = compiled(torch.randn(5, requires_grad=training))
    if training:
        y.sum().backward()
    assert len(graphs) == 1 + training
    ops = {n.target for graph in graphs for n in graph.graph.nodes if n.op == "call_function"}
    assert {op.namespace for op in ops} <= {"aten", "prims"}


@elementwise_rows
def test_eager_code_gets_no_formula(case):
    x = torch.randn(3)
    assert kernels_for(case.row, x, *case.parameters) is case.row.eager


def test_forcing_torch_emits_torchs_op():
    graphs = Graphs()
    with fused_act.use_backend("torch"):
        torch.compile(fused_act.mish, fullgraph=True, backend=graphs)(torch.randn(5))
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.nn.functional.mish in targets


def test_subclass_is_torchs():
    """What a subclass says of torch's own op, it does not say of ours."""

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    def call(x):
        return fused_act.mish(x.as_subclass(Subclass) * 1).as_subclass(torch.Tensor)

    targets = []

    def backend(graph_module, inputs):
        targets.extend(node.target for node in graph_module.graph.nodes)
        return graph_module

    x = torch.linspace(-3, 8, 6, requires_grad=True)
    for compiler in (backend, "aot_eager"):
        torch._dynamo.reset()
        found = torch.compile(call, backend=compiler)(x)
        torch.testing.assert_close(found, torch.nn.functional.mish(x))
    assert torch.nn.functional.mish in targets


@elementwise_rows
@all_backends
@pytest.mark.usefixtures("forced")
def test_forced_backend_under_compile_is_one_opaque_op(case, backend):
    graphs = Graphs()
    compiled = torch.compile(case.function, fullgraph=True, backend=graphs)
    x = torch.randn(40, device=DEVICE)
    accuracy.assert_near(case, "forward", compiled(x), x)
    (call,) = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert call.target is ops.kernels(f"fused_act_{backend}")[case.name].forward
    x.requires_grad_()
    y = torch.compile(case.function, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    accuracy.assert_near(case, "derivative", grad, x, y=y)


@all_backends
@pytest.mark.usefixtures("forced")
def test_changing_the_backend_recompiles(backend):
    graphs = Graphs()
    compiled = torch.compile(fused_act.silu, backend=graphs)
    x = torch.randn(3, device=DEVICE)
    compiled(x)
    with fused_act.use_backend("torch"):
        compiled(x)
    assert len(graphs) == 2
    assert F.silu in [node.target for node in graphs[1].graph.nodes]


@of_family("weighted")
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per_channel"])
def test_compiles_into_one_graph_of_any_batch(case, per_channel):
    compiled = torch.compile(case.facts.function, fullgraph=True, dynamic=True)
    for batch in (3, 5):
        x, weight = matrices.inputs((batch, 4, 6), "contiguous", torch.float32, per_channel)
        x.requires_grad_()
        weight.requires_grad_()
        y, expected = compiled(x, weight), case.row.torch_forward(x, weight)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(each.sum(), (x, weight)) for each in (y, expected)]
        torch.testing.assert_close(*grads)


@of_family("weighted")
@all_backends
def test_a_forced_backend_is_one_op_of_the_graph(case, backend, forced):
    seen = []

    def keep(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, weight = matrices.inputs((3, 4, 6), "contiguous", torch.float32, True)
    y = torch.compile(case.facts.function, fullgraph=True, backend=keep)(x, weight)
    assert f"fused_act_{backend}.{case.name}.default" in seen
    torch.testing.assert_close(y, case.row.torch_forward(x, weight))


@of_family("mirrored")
@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gapped"])
@pytest.mark.usefixtures("forced")
def test_mirrored_under_compile_is_one_opaque_op(case, backend, layout):
    ours, theirs = (
        partial(function, dim=1) for function in (case.facts.function, case.facts.torch_function)
    )
    graphs = Graphs()
    x = LAYOUTS[layout](dtype=torch.float32, device=DEVICE)
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    matrices.assert_equal(compiled(x), theirs(x))
    (call,) = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert call.target is ops.kernels(f"fused_act_{backend}")[case.name].forward
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    matrices.assert_as_torch(compiled, theirs, x, torch.randn_like)


@of_family("mirrored")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mirrored_is_one_kernel(case, memory_format):
    x = torch.randn(2, 3, 5, 16).to(memory_format=memory_format)
    metrics.reset()
    compiled = torch.compile(case.facts.function, fullgraph=True)
    y = compiled(x)
    assert metrics.generated_kernel_count == 1
    matrices.assert_equal(y, case.facts.torch_function(x))
    x.requires_grad_()
    grad_output = torch.randn_like(y)
    dynamic = torch.compile(case.facts.function, fullgraph=True, dynamic=True)
    ours, theirs = (
        torch.autograd.grad(function(x, 1), x, grad_output)[0]
        for function in (dynamic, case.facts.torch_function)
    )
    matrices.assert_equal(ours, theirs)


def varying(function, reference, backend, training):
    """The compilations that many values of a parameter take, each of which must be right."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    values = [1.7, 1.0, 0.5, 2.5, -3.0, 0.0, 1.1, 7.0, -0.3, 0.01, 0.2, 1.0, 1e-3, 20.0]
    for value in values:
        x = torch.linspace(-8, 9, 35, device=DEVICE, requires_grad=training)
        y = compiled(x, value)
        expected = reference(x, value)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        if training:
            ours, theirs = (torch.autograd.grad(each.sum(), x)[0] for each in (y, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return counters["stats"]["unique_graphs"]


WITH_PARAMETERS = {case.name: case for case in CASES if case.parameters}
with_parameters = pytest.mark.parametrize("case", WITH_PARAMETERS.values(), ids=str)


@with_parameters
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_parameter_that_varies(case, compiler, training, inplace):
    """One compilation for the first value and one for all others, as of `x * sigmoid(beta * x)`."""

    def function(x, value):
        return case.facts.function(x * 1, value, inplace)

    for choice in ("auto", "torch"):
        with fused_act.use_backend(choice):
            assert varying(function, case.facts.torch_function, compiler, training) == 2


@with_parameters
@all_backends
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.usefixtures("forced")
def test_a_parameter_that_varies_for_a_forced_backend(case, backend, compiler, training):
    """An op makes a constant of a float (pytorch#171320)."""
    ours, theirs = case.facts.function, case.facts.torch_function
    assert varying(ours, theirs, compiler, training) == 2


@with_parameters
@pytest.mark.parametrize("backend", ["auto", *BACKENDS[: int(INTERPRET)]])
def test_a_parameter_that_is_known_only_when_the_code_runs(case, backend):
    with torch._dynamo.config.patch(capture_scalar_outputs=True), fused_act.use_backend(backend):
        compiled = torch.compile(
            lambda x, value: case.facts.function(x, value.item()),
            fullgraph=True,
            backend="aot_eager",
        )
        for value in (0.5, 1.0, 3.0):
            x = torch.linspace(-8, 9, 35, requires_grad=True)
            results = (compiled(x, torch.tensor(value)), case.facts.torch_function(x, value))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
            grads = (torch.autograd.grad(y.sum(), x)[0] for y in results)
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@with_parameters
def test_a_parameter_that_is_said_to_vary_takes_one_compilation(case):
    counters.clear()
    compiled = torch.compile(case.facts.function, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.linspace(-8, 9, 35)
    for value in (0.5, 1.7, 2.5, -3.0, 1.0):
        expected = case.facts.torch_function(x, value)
        torch.testing.assert_close(compiled(x, value), expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_parameter_that_varies_and_is_tiny_or_huge(compiler):
    """The formula of a beta that varies is right for all that one for a constant is right for."""
    compiled = torch.compile(fused_act.swish, backend=compiler)
    x = torch.tensor([-3e38, -88.0, -1e-3, 0.0, 1e-30, 2.0, 3e38])
    for beta in (0.7, 1.3, 1e-40, 1e30, -1e30, 2.3e38, -2.3e38, 1.0, -2.0):
        expected = (x.double() * torch.sigmoid(beta * x.double())).float()
        torch.testing.assert_close(compiled(x, beta), expected, rtol=2e-6, atol=1e-37)


@with_parameters
@all_backends
@pytest.mark.usefixtures("forced")
def test_ops_that_take_tensors_for_floats(case, backend):
    """Those of a forced backend in compiled code whose parameters vary."""
    namespace = getattr(torch.ops, f"fused_act_{backend}")
    x = torch.randn(3, 40, device=DEVICE)
    tensors = [torch.tensor(each, dtype=torch.float64) for each in case.parameters]
    table = ops.kernels(f"fused_act_{backend}")[case.name]
    for op in (table.forward, table.forward_with_mask):
        if op is not None:
            overload = op.overloadpacket.Tensor
            expected = op(x, *case.parameters)
            torch.testing.assert_close(overload(x, *tensors), expected, rtol=0, atol=0)
            torch.library.opcheck(overload, (x, *tensors))
            with pytest.raises(RuntimeError, match=f"call fused_act.{case.name}"):
                overload(x.clone().requires_grad_(), *tensors)
    assert getattr(namespace, case.name).Tensor is table.forward.overloadpacket.Tensor
