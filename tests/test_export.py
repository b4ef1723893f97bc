"""What is exported, scripted or traced is torch's own op, and runs without fused_act.

Under a forced backend too.
"""

import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fused_act
from tests.shared.cases import ALL_CASES, BACKENDS, DEVICE, all_rows, elementwise_rows, of_family
from tests.shared.compiling import COMPILER
from tests.shared.facts import torch_crelu, torch_swish
from tests.shared.layouts import random

# torch.jit is deprecated, and torch.export warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class TorchSwish(nn.Module):
    """What torch has for a Swish whose beta is not 1: the definition."""

    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, input):
        return torch_swish(input, 1.702, self.inplace)


# ReLU6 first, since what reaches 6 gets smaller from layer to layer.
MODULES = {
    "relu6": (fused_act.ReLU6, nn.ReLU6),
    "mish": (fused_act.Mish, nn.Mish),
    "silu": (fused_act.SiLU, nn.SiLU),
    "swish": (functools.partial(fused_act.Swish, 1.702), TorchSwish),
}


def networks(inplace=False):
    """A small model with every module of ours, and the same with torch's."""
    first, second, third, last = (ours(inplace=inplace) for ours, _ in MODULES.values())
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), first, nn.Conv2d(4, 4, 1), second, nn.Conv2d(4, 4, 1), third),
        *(nn.Flatten(), nn.Linear(64, 8), last, nn.Linear(8, 5)),
    )
    reference = copy.deepcopy(model)
    for index, (_, theirs) in zip((1, 3, 5, 8), MODULES.values()):
        reference[index] = theirs(inplace=inplace)
    return model, reference


@pytest.fixture(params=[False, True], ids=["out_of_place", "inplace"])
def inplace(request):
    return request.param


@pytest.fixture
def models(inplace):
    return networks(inplace)


def images(batch=2, dtype=torch.float32):
    return 16 * torch.randn(batch, 3, 6, 6, dtype=dtype)


def targets(program):
    """What the nodes call. nn.ReLU6 calls F.hardtanh, for which F.relu6 is another name."""
    return [str(node.target).replace("relu6", "hardtanh") for node in program.graph.nodes]


BATCH = ({0: torch.export.Dim("batch")},)
both_modes = pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])


@both_modes
@pytest.mark.parametrize("dynamic_shapes", [None, BATCH], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_program_is_torchs(models, strict, dynamic_shapes, dtype):
    ours, theirs = (
        torch.export.export(
            model.to(dtype), (images(dtype=dtype),), strict=strict, dynamic_shapes=dynamic_shapes
        )
        for model in models
    )
    assert targets(ours) == targets(theirs)
    x = images(batch=5 if dynamic_shapes else 2, dtype=dtype)
    assert torch.equal(ours.module()(x), models[1](x))


def test_decomposed_program_is_torchs(models):
    ours, theirs = (
        torch.export.export(model, (images(),)).run_decompositions() for model in models
    )
    assert targets(ours) == targets(theirs)
    x = images()
    assert torch.equal(ours.module()(x), theirs.module()(x))


@both_modes
def test_integers_are_refused_at_export(strict):
    with pytest.raises(
        Exception, match=r"swish: expected input to be floating point or complex, got"
    ):
        torch.export.export(fused_act.Swish(1.702), (torch.ones(3).long(),), strict=strict)


def test_scripts(models):
    model, reference = (model.eval() for model in models)
    x = images()
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), reference(x))
    frozen = torch.jit.freeze(scripted)
    for module in (frozen, torch.jit.optimize_for_inference(frozen)):
        torch.testing.assert_close(module(x), reference(x))
    ours, theirs = (
        torch.autograd.grad(module(x).sum(), parameter)[0]
        for module, parameter in ((scripted, model[0].weight), (reference, reference[0].weight))
    )
    torch.testing.assert_close(ours, theirs)


@elementwise_rows
def test_scripted_function_is_torchs(case, inplace):
    x = random(99)
    expected = case.torch_function(x)
    y = torch.jit.script(case.facts.function)(x, *case.parameters, inplace=inplace)
    assert torch.equal(y, expected)
    assert torch.equal(x, expected) is inplace


def test_traces(models):
    model, reference = models
    traced = torch.jit.trace(model, images())
    x = images(batch=5)
    assert torch.equal(traced(x), reference(x))


@elementwise_rows
def test_fx_traces_torchs_function(case, inplace):
    def code(function):
        return torch.fx.symbolic_trace(lambda x: function(x * 2, inplace=inplace)).code

    assert code(case.function) == code(case.torch_function)


def test_fx_traces_through_the_modules(models):
    """Leaves are only the modules that torch defines."""
    model, reference = models
    traced = torch.fx.symbolic_trace(model)
    assert not [m for m in traced.modules() if type(m).__module__.startswith("fused_act")]
    x = images()
    assert torch.equal(traced(x), reference(x))


# How a model is saved, and how a process that has only torch loads it.
SAVED = {
    "export": (
        lambda model, x, path: torch.export.save(torch.export.export(model, (x,)), path),
        "torch.export.load(path).module()",
    ),
    "aot_inductor": (
        lambda model, x, path: torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (x,)), package_path=path
        ),
        "torch._inductor.aoti_load_package(path)",
    ),
    "script": (lambda model, x, path: torch.jit.script(model).save(path), "torch.jit.load(path)"),
    "trace": (lambda model, x, path: torch.jit.trace(model, x).save(path), "torch.jit.load(path)"),
}
RUN = """
import sys, torch
path, tensors = sys.argv[1:]
x, expected = torch.load(tensors)
torch.testing.assert_close({load}(x), expected)
assert "fused_act" not in sys.modules
"""


@pytest.mark.parametrize(
    "kind",
    ["export", *(pytest.param(kind, marks=pytest.mark.full) for kind in SAVED if kind != "export")],
)
def test_saved_model_runs_without_fused_act(kind, tmp_path):
    if kind == "aot_inductor" and COMPILER is None:
        pytest.skip("Inductor needs a C++ compiler")
    save, load = SAVED[kind]
    model, reference = (network.eval() for network in networks())
    x = images()
    path, tensors = str(tmp_path / "model.pt2"), str(tmp_path / "tensors.pt")
    with torch.no_grad():
        torch.save((x, reference(x)), tensors)
        save(model, x, path)
    code = RUN.format(load=load)
    subprocess.run([sys.executable, "-c", code, path, tensors], check=True, cwd=tmp_path)


@pytest.fixture
def to_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra 'export'")

    def export(model, x, **options):
        return torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False, **options)

    return export


def operators(exported):
    return [node.op_type for node in exported.model.graph]


def run_onnx(exported, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = (argument.name for argument in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def test_onnx_is_torchs(models, to_onnx):
    ours, theirs = (to_onnx(model, images(), dynamic_shapes=BATCH) for model in models)
    assert operators(ours) == operators(theirs)
    assert operators(ours).count("Mish") == 1
    x = images(batch=5)
    y = run_onnx(ours, x)
    assert torch.equal(y, run_onnx(theirs, x))
    # Five layers of sums of numbers around 1, in another order.
    torch.testing.assert_close(y, models[1](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_onnxruntime_computes_ours(name, dtype, to_onnx):
    module = MODULES[name][0]()
    x = torch.linspace(-30, 30, 10001).to(dtype)
    y, expected = run_onnx(to_onnx(module, x), x), module(x)
    # Its sigmoid is off by eps even where it is tiny, and x multiplies that.
    tolerance = torch.finfo(dtype).eps * (4 * expected.abs() + 2 * x.abs())
    assert ((y - expected).abs() <= tolerance).all()


def test_onnx_of_an_opset_without_mish_is_torchs(to_onnx):
    """torch takes the first opset that has it, 18, and says so."""
    x = torch.randn(3)
    ours, theirs = (to_onnx(module(), x, opset_version=17) for module in MODULES["mish"])
    assert ours.model.opset_imports == theirs.model.opset_imports == {"": 18}
    assert operators(ours) == operators(theirs) == ["Mish"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mish", torch.complex64), ("swish", torch.complex64), ("swish", torch.float64)],
    ids=["mish-complex64", "swish-complex64", "swish-float64"],
)
def test_onnx_of_unusual_input_is_torchs(name, dtype, to_onnx):
    def outcome(module):
        """The graph with its constants, or the sentence that says why there is none."""
        try:
            return str(to_onnx(module, torch.ones(3, dtype=dtype)).model.graph)
        except torch.onnx.OnnxExporterError as error:
            return str(error.__cause__.__cause__)

    ours, theirs = (outcome(module()) for module in MODULES[name])
    assert ours == theirs
    assert "complex-valued input" in ours or not dtype.is_complex


@all_rows
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("forced")
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


@all_rows
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_are_copied_scripted_traced_and_exported(case):
    module, reference = case.facts.module(), case.facts.torch_module()
    x = torch.randn(2, 3, 4)
    expected = reference(x)
    for each in (
        module,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.jit.script(module),
        torch.jit.trace(module, x),
        torch.fx.symbolic_trace(module),
        torch.export.export(module, (x,)).module(),
    ):
        assert torch.equal(each(x), expected)
    assert repr(copy.deepcopy(module)) == repr(module)
    assert module.state_dict().keys() == reference.state_dict().keys()


@of_family("weighted")
def test_modules_with_a_weight_for_each_channel(case):
    module, x = case.facts.module(num_parameters=3), torch.randn(2, 3, 4)
    expected = module(x)
    for made in (
        torch.jit.script(module),
        torch.jit.trace(module, x),
        torch.fx.symbolic_trace(module),
        torch.export.export(module, (x,)).module(),
    ):
        assert torch.equal(made(x), expected)
    tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.func.grad(lambda t: module(t).sum())(x))


WITHOUT_WEIGHT = [case for case in ALL_CASES if not case.facts.weights]


@pytest.mark.parametrize("case", WITHOUT_WEIGHT, ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_modules_export_torchs_ops(case, strict):
    x = torch.randn(2, 3)
    ours, theirs = (
        torch.export.export(make(), (x,), strict=strict)
        for make in (case.facts.module, case.facts.torch_module)
    )
    assert targets(ours) == targets(theirs)


def test_crelu_module_along_another_dimension():
    module = fused_act.CReLU(dim=-1)
    x = torch.randn(2, 3, 4)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.jit.script(module)]
    copies += [torch.fx.symbolic_trace(module), torch.jit.trace(module, x)]
    for each in (module, *copies):
        assert torch.equal(each(x), torch_crelu(x, -1))
    assert repr(copies[1]) == "CReLU(dim=-1)"
