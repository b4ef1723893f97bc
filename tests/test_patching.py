"""What users do to modules: they put our functions in the place of torch's, purge, and reload.

Each in a process of its own, since torch remembers what it has seen.
"""

import os
import subprocess
import sys

import pytest

COMMON = """
import gc, importlib, sys
import torch
import torch.nn.functional as F
from functools import partial
import fused_act
from tests.shared.cases import ALL_CASES

x = torch.linspace(-8, 9, 24).reshape(2, 3, 4)
extra = {"weighted": (torch.tensor([0.1, 0.2, 0.3]),), "mirrored": (1,)}
arguments = {
    case.name: extra.get(case.row.family, case.parameters) for case in ALL_CASES
}
silu = F.silu(x)
expected = {case.name: case.facts.torch_function(x, *arguments[case.name]) for case in ALL_CASES}


def public(name):
    return getattr(fused_act, name.removeprefix("learnable_"))


def check(*ways):
    for name, y in expected.items():
        function = lambda x: public(name)(x, *arguments[name])
        for way in ways:
            found = way(function)(x.clone())
            torch.testing.assert_close(found, y, msg=f"{name} {way}")


def eager(function):
    return function


def differentiated(function):
    def call(x):
        x.requires_grad_()
        y = function(x)
        y.sum().backward()
        assert x.grad is not None
        return y.detach()

    return call


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def as_subclass(function):
    class Subclass(torch.Tensor):
        pass

    return lambda x: function(x.as_subclass(Subclass)).as_subclass(torch.Tensor)


fullgraph = True


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)


WAYS = (
    eager,
    differentiated,
    as_subclass,
    lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[0],
    lambda f: torch.fx.symbolic_trace(Module(f)),
    lambda f: torch.jit.trace(f, x),
    lambda f: torch.export.export(Module(f), (x,)).module(),
    compiled,
)


def patch():
    '''Every function of torch that ours stand for. torch itself knows F.sigmoid as another one.'''
    for name in ("mish", "silu", "relu6", "relu", "leaky_relu", "selu", "prelu"):
        setattr(F, name, getattr(fused_act, name))
    for name in ("relu", "selu", "sigmoid", "tanh", "prelu"):
        setattr(torch, name, getattr(fused_act, name))
    for name in ("relu", "selu", "sigmoid", "tanh"):
        setattr(torch, name + "_", partial(getattr(fused_act, name), inplace=True))


def purge():
    for name in [name for name in sys.modules if name.partition(".")[0] == "fused_act"]:
        del sys.modules[name]
    gc.collect()
    return importlib.import_module("fused_act")
"""

PATCHED = """
if COMPILED_BEFORE:
    compiled(lambda x: x + 1)(x)
patch()
fullgraph = COMPILED_BEFORE  # torch cannot trace a function of its own that it finds by no name
check(*WAYS)
for name in ("mish", "silu", "relu6", "relu", "leaky_relu", "selu", "sigmoid", "tanh", "prelu"):
    arguments_of = arguments.get(name, ())
    y = torch.jit.script(public(name))(x, *arguments_of)
    torch.testing.assert_close(y, expected.get(name, silu))
    if name != "prelu":
        written = x.clone()
        assert public(name)(written, *arguments_of, inplace=True) is written
    with fused_act.use_backend("torch"):
        public(name)(x, *arguments_of)
for function in (fused_act.crelu, fused_act.swish):
    torch.jit.script(function)(x)
model = torch.nn.Sequential(torch.nn.Mish(), torch.nn.ReLU(), torch.nn.Sigmoid(), torch.nn.PReLU())
assert torch.equal(model(x), fused_act.replace_activations(model)(x))
fullgraph = False
fused_act = purge()
check(eager, differentiated, compiled)
"""

PURGED = """
def interpreted(function):
    def call(x):
        with fused_act.use_backend("triton"):
            return differentiated(function)(x)

    return call


ways = [eager, differentiated, compiled]
ways += [interpreted] if "triton" in fused_act.available_backends() else []
old = fused_act
model = fused_act.replace_activations(torch.nn.Sequential(torch.nn.Mish(), torch.nn.SELU()))
check(*ways)
for _ in range(2):
    fused_act = purge()
    assert fused_act is not old
    check(*ways)
    new, fused_act = fused_act, old  # code that holds the first import goes on with it
    check(*ways)
    fused_act = new
assert type(model[0]) is old.Mish
with fused_act.restored(model):  # with classes that the first import has put there
    assert type(model[0]) is torch.nn.Mish
assert type(model[0]) is old.Mish
assert type(fused_act.restore_activations(model)[1]) is torch.nn.SELU
"""

RELOADED = """
for name in sorted(name for name in sys.modules if name.partition(".")[0] == "fused_act"):
    importlib.reload(sys.modules[name])
    check(eager, differentiated)
    with fused_act.use_backend("torch"):
        check(eager, differentiated)
patch()
for name in sorted(name for name in sys.modules if name.partition(".")[0] == "fused_act"):
    importlib.reload(sys.modules[name])
fullgraph = False
check(eager, differentiated, compiled)
"""


def run(code, **environment):
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMON + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.parametrize("compiled_before", [False, True])
def test_our_functions_in_the_place_of_torchs(compiled_before):
    """`F.silu = fused_act.silu`: a fallback to torch's must not come back (NEFTune#5)."""
    run(f"COMPILED_BEFORE = {compiled_before}\n{PATCHED}")


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_importing_again(interpret):
    """Notebooks and test runners purge sys.modules; torch allows one library for a namespace."""
    run(PURGED, TRITON_INTERPRET=interpret)


def test_reloading_each_module():
    run(RELOADED)
