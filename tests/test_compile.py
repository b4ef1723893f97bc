"""Under torch.compile the public functions give one graph of fusible math.

How accurate it is: test_accuracy.py.
"""

import shutil

import pytest
import torch

import fused_act
from fused_act.activation import kernels_for
from tests.cases import all_cases, all_dtypes

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor needs a C++ compiler",
)


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield


def run(function, x, weight):
    """y and dy."""
    x = x.detach().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, weight)[0]


@all_cases
@all_dtypes
@pytest.mark.parametrize("inplace", [False, True])
def test_one_graph_for_every_size(case, dtype, inplace):

    def chain(function, x):
        return function(x * 2, inplace=inplace) + 1

    compiled = torch.compile(lambda x: chain(case.function, x), fullgraph=True, dynamic=True)
    for size in (17, 33, 64):
        torch._dynamo.config.error_on_recompile = size > 17
        x = torch.randn(size).to(dtype)
        weight = torch.randn_like(x)
        ours = run(compiled, x, weight)
        theirs = run(lambda x: case.torch_function(x * 2) + 1, x, weight)
        for a, b in zip(ours, theirs):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@all_cases
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


@all_cases
def test_default_graph_has_no_opaque_op(case):
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    torch.compile(case.function, fullgraph=True, backend=backend)(torch.randn(5))
    (graph_module,) = graphs
    targets = [str(node.target) for m in graph_module.modules() for node in m.graph.nodes]
    assert not [target for target in targets if "fused_act" in target]


@all_cases
def test_eager_code_gets_no_formula(case):
    x = torch.randn(3)
    assert kernels_for(case.activation, x, *case.parameters) is case.activation.eager


def test_forcing_torch_emits_torchs_op():
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    with fused_act.use_backend("torch"):
        torch.compile(fused_act.mish, fullgraph=True, backend=backend)(torch.randn(5))
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.nn.functional.mish in targets


def test_subclass_is_torchs():
    """A Function in the graph would break Dynamo here; torch's own op does not."""

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    def call(x):
        return fused_act.mish(x.as_subclass(Subclass) * 1).as_subclass(torch.Tensor)

    x = torch.linspace(-3, 8, 6, requires_grad=True)
    torch.testing.assert_close(
        torch.compile(call, backend="aot_eager")(x), torch.nn.functional.mish(x)
    )
