"""The public surface: names, modules, backend selection, replacement, errors, import cost."""

import concurrent.futures
import contextlib
import copy
import functools
import importlib.metadata
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import time
import types
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fused_act
from fused_act import ops, replace
from fused_act.activations import ROWS
from fused_act.dispatch import BACKENDS, Backend
from fused_act.families import base
from tests.shared.cases import ALL_CASES, all_rows, elementwise_rows

# Ours, torch's, and how both are made.
MODULES = [
    *(
        (getattr(fused_act, name), getattr(nn, name), {"inplace": inplace})
        for name in ("Mish", "SiLU", "ReLU6", "ReLU", "SELU", "LeakyReLU")
        for inplace in (False, True)
    ),
    (fused_act.LeakyReLU, nn.LeakyReLU, {"negative_slope": 0.3}),
    (fused_act.Sigmoid, nn.Sigmoid, {}),
    (fused_act.Tanh, nn.Tanh, {}),
]


@pytest.mark.parametrize(("fused", "original", "options"), MODULES)
def test_module_is_a_drop_in(fused, original, options):
    module, reference = fused(**options), original(**options)
    assert isinstance(module, original)
    assert repr(module) == repr(reference)
    assert module.state_dict() == {}
    x = torch.randn(3, 5)
    assert torch.equal(module(x.clone()), reference(x.clone()))
    restored = pickle.loads(pickle.dumps(module))
    assert type(restored) is fused
    assert vars(restored).keys() == vars(reference).keys()
    assert torch.equal(restored(x.clone()), reference(x.clone()))
    written = x.clone()
    assert (module(written) is written) is options.get("inplace", False)
    assert type(fused_act.replace_activations(reference)) is fused
    assert type(fused_act.restore_activations(reference)) is original


def test_swish_module():
    module = fused_act.Swish(1.702)
    assert repr(module) == "Swish(beta=1.702)"
    assert module.state_dict() == {}
    x = torch.randn(3, 5)
    assert torch.equal(module(x), x * torch.sigmoid(1.702 * x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    written = x.clone()
    assert fused_act.Swish(1.702, inplace=True)(written) is written
    assert torch.equal(written, module(x))


@pytest.mark.parametrize(
    ("beta", "error"),
    [
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (-2.4e38, ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (torch.ones((), dtype=torch.int64), TypeError),
    ],
)
def test_beta_must_be_a_float_that_fp32_takes(beta, error):
    x = torch.randn(3)
    with pytest.raises(error, match="beta"):
        fused_act.swish(x, beta)
    with pytest.raises(error, match="beta"):
        fused_act.Swish(beta)


@pytest.mark.parametrize(
    ("slope", "error", "got"),
    [
        (float("nan"), ValueError, "nan"),
        (-float("inf"), ValueError, "-inf"),
        (1e39, ValueError, "1e"),
        ("0.1", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (1j, TypeError, "complex"),
    ],
)
def test_slope_must_be_a_finite_float(slope, error, got):
    x = torch.randn(3)
    message = f"leaky_relu: expected negative_slope .*got {got}"
    with pytest.raises(error, match=message):
        fused_act.leaky_relu(x, slope)
    with pytest.raises(error, match=message):
        fused_act.LeakyReLU(slope)
    assert torch.equal(fused_act.leaky_relu(x, -2), torch.nn.functional.leaky_relu(x, -2))


SLIPS = [True, False, 1, 0, torch.tensor(0.1), torch.tensor(2)]
SLIPS += [numpy.float32(0.3), numpy.float16(0.3), numpy.int64(2)]


@pytest.mark.parametrize("slope", SLIPS, ids=repr)
@pytest.mark.parametrize("inplace", [False, True])
def test_slopes_that_torch_takes(slope, inplace):
    """`LeakyReLU(True)` is a slip that runs: its author meant `inplace`."""
    x = torch.linspace(-3, 3, 7)
    expected = torch.nn.functional.leaky_relu(x, slope)
    assert torch.equal(fused_act.leaky_relu(x.clone(), slope, inplace), expected)
    original = nn.LeakyReLU(slope, inplace)
    for module in (fused_act.LeakyReLU(slope, inplace), fused_act.replace_activations(original)):
        assert type(module) is fused_act.LeakyReLU
        assert torch.equal(module(x.clone()), expected)
        assert torch.equal(torch.compile(module, backend="eager")(x.clone()), expected)


@all_rows
def test_the_first_parameter_is_input(case):
    """As torch calls it: models write `act(input=x)`."""
    x = torch.linspace(-8, 8, 24).reshape(2, 3, 4)
    functions = [case.facts.function, *([fused_act.silu] if case.name == "swish" else [])]
    for function in functions:
        names = list(inspect.signature(function).parameters)
        assert names[0] == "input"
        others = dict(zip(names[1:], case.arguments(x))) if function is not fused_act.silu else {}
        assert torch.equal(function(input=x, **others), function(x, **others))


@elementwise_rows
def test_function_applies_on_cpu(case):
    Function = case.row.Function
    x = torch.linspace(-8, 8, 65, requires_grad=True)
    y = Function.apply(x, *case.parameters)
    expected = case.torch_function(x)
    assert torch.equal(y, expected)
    weight = torch.randn(65)
    (grad,) = torch.autograd.grad(y, x, weight)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, weight)[0])


class Tripled(fused_act.MishFunction):
    """What a user may make of a Function."""

    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * 3


def test_a_subclass_of_a_function_computes_what_it_says():
    """Compiled too. Under a transform torch says that it has no rule for it."""
    x = torch.linspace(-2, 2, 5, requires_grad=True)
    for apply in (Tripled.apply, torch.compile(lambda x: Tripled.apply(x), backend="aot_eager")):
        y = apply(x)
        assert torch.equal(y, 3 * x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(Tripled.apply)(x)


def test_public_functions():
    assert issubclass(fused_act.MishFunction, torch.autograd.Function)
    functions = {value for name, value in vars(fused_act).items() if name.endswith("Function")}
    assert functions == {row.Function for row in ROWS.values()}
    for function in functions:
        assert pickle.loads(pickle.dumps(function)) is function
        assert pickle.loads(pickle.dumps(function.apply)) == function.apply
    for name in fused_act.__all__:
        assert getattr(fused_act, name).__doc__, name


@elementwise_rows
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_are_torchs_error(case, dtype):
    x = torch.ones(4).to(dtype)
    try:
        expected = case.torch_function(x)
    except (RuntimeError, NotImplementedError):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            case.function(x)
    else:
        if case.parameters == () or case.parameters == (1.0,):
            assert torch.equal(case.function(x), expected)
        else:
            with pytest.raises(TypeError, match="floating point"):
                case.function(x)


def test_not_a_tensor_is_torchs_error():
    for value in ([1.0], None, 1.0):
        with pytest.raises((TypeError, AttributeError)):
            fused_act.mish(value)


def test_use_backend_names_what_it_expects():
    with pytest.raises(ValueError, match=r"'auto', 'cuda', 'triton', 'torch', got 'tritn'"):
        fused_act.use_backend("tritn")


def test_use_backend_is_setter_and_context_manager():
    assert fused_act.dispatch.forced is None
    fused_act.use_backend("torch")
    assert fused_act.dispatch.forced is BACKENDS["torch"]
    with fused_act.use_backend("auto"):
        assert fused_act.dispatch.forced is None
    assert fused_act.dispatch.forced is BACKENDS["torch"]
    setting = fused_act.use_backend("auto")
    for _ in range(2):
        fused_act.use_backend("torch")
        with setting:
            assert fused_act.dispatch.forced is None


def test_a_backend_loads_once_for_all_threads():
    loads = []

    def load():
        time.sleep(0.02)
        loads.append(1)
        return {"mish": ROWS["mish"].eager}

    backend = fused_act.dispatch.Backend("slow", lambda: None, load, None)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(found is backend for found in pool.map(lambda _: backend.ready(), range(8)))
    assert loads == [1]


class CudaTensor(types.SimpleNamespace):
    """What the rule "kernel or torch?" asks of a CUDA tensor."""

    def __init__(self, **unusual):
        usual = {"is_cuda": True, "dtype": torch.bfloat16, "layout": torch.strided}
        super().__init__(**usual | {"is_nested": False, "is_neg": lambda: False} | unusual)


@pytest.mark.parametrize(
    ("unusual", "takes_kernel"),
    [
        ({}, True),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float64}, False),
        ({"is_cuda": False}, False),
        ({"layout": torch.sparse_coo}, False),
        ({"is_nested": True}, False),
        ({"is_neg": lambda: True}, False),
    ],
    ids=["bfloat16", "float32", "float64", "cpu", "sparse", "nested", "negative"],
)
def test_kernel_or_torch(monkeypatch, unusual, takes_kernel):
    """The one rule, of which a machine without a GPU sees no more than "not CUDA: torch"."""
    best = types.SimpleNamespace(kernels={"mish": "the kernel"}, device_types=("cuda",))
    monkeypatch.setattr(base, "PLAIN", (CudaTensor,))
    monkeypatch.setattr(fused_act.dispatch, "automatic", lambda: best)
    expected = "the kernel" if takes_kernel else ROWS["mish"].eager
    x = CudaTensor(**unusual)
    assert base.kernels_for(ROWS["mish"], x) is expected
    transformed = []
    torch.func.vmap(lambda t: transformed.append(base.kernels_for(ROWS["mish"], x)) or t)(
        torch.ones(1)
    )
    with torch.autograd.forward_ad.dual_level():
        transformed.append(base.kernels_for(ROWS["mish"], x))
    assert transformed == [ROWS["mish"].eager, ROWS["mish"].eager]


@pytest.mark.parametrize(
    ("unavailable", "advised"), [({"cuda"}, True), (set(), False), ({"cuda", "triton"}, False)]
)
def test_the_report_says_what_is_faster_than_triton(monkeypatch, capsys, unavailable, advised):
    reasons = {name: "get it" if name in unavailable else None for name in BACKENDS}
    backends = {
        name: Backend(name, functools.partial(reasons.get, name), dict, None) for name in reasons
    }
    monkeypatch.setattr(fused_act.dispatch, "BACKENDS", backends)
    importlib.import_module("fused_act.__main__").main()
    assert ("fraction of the time" in capsys.readouterr().out) == advised


def test_triton_without_package_metadata(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert fused_act.available_backends()[-1] == "torch"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((7, 5), None, "8.0 or higher, this is 7.5"), ((9, 0), "6.4", "ROCm"), ((9, 0), None, None)],
)
def test_unfit_gpus_are_named(monkeypatch, capability, hip, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = fused_act.dispatch.gpu_unavailable()
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_unavailable_backend_says_why_and_changes_nothing(name):
    if name in fused_act.available_backends():
        pytest.skip(f"{name} is available here")
    with pytest.raises(RuntimeError, match=f"'{name}' is not available: .*"):
        fused_act.use_backend(name)
    assert fused_act.dispatch.forced is None


def test_torch_is_always_available_and_last():
    assert fused_act.available_backends()[-1] == "torch"


class Network(nn.Module):
    """Activations in every place: nested, shared, in a list, by exact type or not."""

    class Custom(nn.SiLU):
        pass

    def __init__(self):
        super().__init__()
        self.shared = nn.Mish()
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.ReLU6(inplace=True), self.shared, nn.Linear(4, 4), nn.SiLU()
        )
        self.custom = self.Custom()

    def forward(self, x):
        return self.custom(self.shared(self.layers(x)))


def classes(model):
    return [type(module) for module in model.modules()]


def test_replace_and_restore():
    model = Network().train()
    called = []
    model.shared.register_forward_hook(lambda *args: called.append(1))
    reference = copy.deepcopy(model)
    before = classes(model)
    identities = [id(module) for module in model.modules()]
    assert fused_act.replace_activations(model) is model
    assert type(model.shared) is fused_act.Mish
    assert model.layers[2] is model.shared
    assert type(model.layers[1]) is fused_act.ReLU6
    assert model.layers[1].inplace is True
    assert type(model.layers[4]) is fused_act.SiLU
    assert type(model.custom) is Network.Custom
    assert [id(module) for module in model.modules()] == identities
    assert list(model.state_dict()) == list(reference.state_dict())
    x = torch.randn(3, 4)
    expected = reference(x)
    called.clear()
    assert torch.equal(model(x), expected)
    assert called == [1, 1]
    assert fused_act.restore_activations(model) is model
    assert classes(model) == before


def test_replace_a_bare_activation_and_some_by_name():
    assert type(fused_act.replace_activations(nn.ReLU6())) is fused_act.ReLU6
    other_bounds = nn.ReLU6()
    other_bounds.max_val = 4.0
    assert type(fused_act.replace_activations(other_bounds)) is nn.ReLU6
    model = Network()
    fused_act.replace_activations(model, filter_fn=lambda name, module: name == "layers.1")
    assert type(model.layers[1]) is fused_act.ReLU6
    assert type(model.layers[4]) is nn.SiLU


def patched(module):
    """A module as a hook of accelerate leaves it: with a forward of its own around its class's."""
    module.original = module.forward
    module.forward = lambda x: module.original(x) + 1
    return module


@contextlib.contextmanager
def one_warning(match):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    (warning,) = caught
    assert re.search(match, str(warning.message))
    assert warning.filename == __file__


REPLACED = pytest.mark.parametrize("original", replace.FUSED, ids=lambda kind: kind.__name__)


@REPLACED
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_module_that_holds_a_forward_is_left_as_it_is(original, backend):
    """That forward runs whatever the class (accelerate#1971, Liger-Kernel#593)."""
    x = torch.randn(3, 4)
    model = nn.Sequential(
        patched(original()),
        nn.Linear(4, 4),
        nn.ModuleDict({"act": patched(original())}),
        original(),
    )
    expected = original()(x) + 1
    with fused_act.use_backend(backend), one_warning(r"replace_activations: .*: '0', '2\.act'\. "):
        fused_act.replace_activations(model)
    assert type(model[0]) is type(model[2]["act"]) is original
    assert type(model[3]) is replace.FUSED[original]
    assert torch.equal(model[0](x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what a filter leaves out it says nothing
        fused_act.replace_activations(model, lambda name, module: name == "3")
        fused_act.replace_activations(nn.Sequential(patched(nn.Linear(4, 4))))
    for module in (model[0], model[2]["act"]):
        del module.forward, module.original
    fused_act.replace_activations(model)
    assert type(model[0]) is type(model[2]["act"]) is replace.FUSED[original]


@REPLACED
def test_restoring_leaves_a_fused_forward_in_no_hook(original):
    """One that came after the replacement holds the fused forward: the module stays fused."""
    model = fused_act.replace_activations(nn.Sequential(original(), original()))
    patched(model[0])
    with one_warning(r"restore_activations: .*: '0'\. "):
        fused_act.restore_activations(model)
    assert type(model[0]) is replace.FUSED[original]
    assert type(model[1]) is original
    del model[0].forward, model[0].original
    fused_act.restore_activations(model)
    assert type(model[0]) is original
    assert model[0].forward.__func__ is original.forward


class Squared(nn.Module):
    def forward(self, weight):
        return weight**2


def test_restoring_a_prelu_that_was_parametrized_since():
    """`register_parametrization` gives the module a class of its own (MQBench#57)."""
    model = fused_act.replace_activations(nn.Sequential(nn.PReLU(3), nn.ReLU()))
    parametrize.register_parametrization(model[0], "weight", Squared())
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 4)
    expected, state = model(x), model.state_dict()
    fused_act.restore_activations(model)
    assert isinstance(model[0], nn.PReLU)
    assert not isinstance(model[0], fused_act.PReLU)
    assert type(model[0]).__name__ == "ParametrizedPReLU"
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(state)
    assert isinstance(twin[0], fused_act.PReLU)  # a copy shares the class, which must not change
    assert torch.equal(copy.deepcopy(model)(x), expected)
    fused_act.restore_activations(twin)
    for each in (model, twin):
        parametrize.remove_parametrizations(each[0], "weight")
        assert type(each[0]) is nn.PReLU
        assert torch.equal(each(x), expected)


def run(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_and_use_leave_the_costly_alone():
    """Triton, DTensor (0.6 s) and the CUDA context."""
    print_modules = (
        "import sys, torch; before = set(sys.modules); import fused_act; "
        "fused_act.mish(torch.ones(3, requires_grad=True)).sum().backward(); "
        "new = set(sys.modules) - before; "
        "print(new & {'triton', 'torch.distributed.tensor'}, torch.cuda.is_initialized())"
    )
    assert run(print_modules).strip() == "set() False"


def test_report_names_every_backend():
    output = subprocess.run(
        [sys.executable, "-m", "fused_act"], capture_output=True, text=True, check=True
    ).stdout
    assert f"torch      {torch.__version__}" in output
    for name in ("cuda", "triton", "torch"):
        assert f"  {name:8} " in output
    for name in {"cuda", "triton"} - set(fused_act.available_backends()):
        assert f"  {name:8} not available: " in output


@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
def test_every_backend_has_every_row(name):
    """Or a forced one would fail with a KeyError."""
    kernels = (
        BACKENDS[name].ready().kernels if name == "torch" else ops.kernels(f"fused_act_{name}")
    )
    assert kernels.keys() == ROWS.keys()


def test_forced_torch_computes_what_has_weights_or_is_mirrored():
    x, weight = torch.randn(2, 3, 4), torch.rand(3)
    expected = [
        function(*arguments)
        for function, arguments in (
            (fused_act.prelu, (x, weight)),
            (fused_act.swish, (x, weight)),
            (fused_act.crelu, (x,)),
        )
    ]
    with fused_act.use_backend("torch"):
        found = [fused_act.prelu(x, weight), fused_act.swish(x, weight), fused_act.crelu(x)]
    assert all(map(torch.equal, found, expected))


def test_prelu_module_is_torchs():
    ours, theirs = fused_act.PReLU(3, init=0.1), torch.nn.PReLU(3, init=0.1)
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fused_act.PReLU
        assert torch.equal(copied.weight, ours.weight)
    model = torch.nn.Sequential(torch.nn.PReLU(2))
    weight = model[0].weight
    assert type(fused_act.replace_activations(model)[0]) is fused_act.PReLU
    assert model[0].weight is weight
    assert type(fused_act.restore_activations(model)[0]) is torch.nn.PReLU


def test_learnable_swish_module():
    module = fused_act.Swish(1.5, learnable=True, num_parameters=3, dtype=torch.float64)
    assert isinstance(module.beta, torch.nn.Parameter)
    assert module.beta.dtype is torch.float64
    assert module.beta.tolist() == [1.5] * 3
    assert list(module.state_dict()) == ["beta"]
    assert repr(module) == "Swish(learnable=True, num_parameters=3)"
    assert torch.equal(pickle.loads(pickle.dumps(module)).beta, module.beta)
    assert not list(fused_act.Swish(1.5).parameters())


class Holder(nn.Module):
    """A model that holds a Function's `apply`, as many do."""

    def __init__(self, apply):
        super().__init__()
        self.act = apply


PUBLIC = [case for case in ALL_CASES if hasattr(fused_act, case.row.Function.__name__)]


@pytest.mark.parametrize("case", PUBLIC, ids=str)
def test_a_model_that_holds_apply_is_saved(case):
    saved = io.BytesIO()
    torch.save(Holder(case.row.Function.apply), saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    x = torch.linspace(-8, 8, 24).reshape(2, 3, 4)
    assert torch.equal(loaded.act(x, *case.arguments(x)), case.function(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: fused_act.Swish(1.5, learnable=True, num_parameters=3, **options),
        lambda **options: fused_act.PReLU(3, init=0.1, **options),
        lambda **options: fused_act.replace_activations(nn.PReLU(3, init=0.1, **options)),
    ],
    ids=["Swish", "PReLU", "replaced"],
)
def test_modules_with_parameters_reset_them(make):
    """Models are built on meta and then reset, as users of FSDP2 do (torchtune#1956)."""
    expected = make().state_dict()
    module = make(device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(77.0)
    module.reset_parameters()
    assert module.state_dict().keys() == expected.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name])


def test_every_module_of_ours_with_parameters_resets_them():
    for value in vars(fused_act).values():
        if isinstance(value, type) and issubclass(value, nn.Module):
            has_parameters = value in (fused_act.Swish, fused_act.PReLU)
            assert hasattr(value, "reset_parameters") is has_parameters
    fused_act.Swish(1.5).reset_parameters()  # has none to reset
