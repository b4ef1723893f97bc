"""Autograd's neighbours: what checkpoints, moves, hooks, scales or transforms gradients does with
our activations what it does with torch's.

Without a GPU the kernels run in the interpreter, as in test_kernels.py.
"""

import collections
import contextlib
import functools
import re

import pytest
import torch
from torch import nn
from torch.autograd import graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from tests.shared.cases import (
    ALL_CASES,
    BACKENDS,
    DEVICE,
    OF_CSRC,
    ON_HOST,
    all_backends,
    combinations,
    elementwise_rows,
)

# The ways to a gradient: what users call, the Function by itself, and the kernels of each backend.
WAYS = [
    pytest.param("auto", False, id="auto"),
    pytest.param("auto", True, id="auto-inplace"),
    pytest.param("Function", False, id="Function"),
    *(
        pytest.param(backend, inplace, marks=param.marks, id=backend + "-inplace" * inplace)
        for param in BACKENDS
        for backend in param.values
        for inplace in (False, True)
    ),
    *(
        pytest.param(way, inplace, id=way + "-inplace" * inplace)
        for way in ON_HOST
        for inplace in (False, True)
    ),
]
all_ways = pytest.mark.parametrize(("way", "inplace"), WAYS)
OF_TORCH = [pytest.param(way, id=way) for way in ("auto", "Function")]
OF_KERNELS = [pytest.param(*each.values, marks=each.marks, id=each.values[0]) for each in BACKENDS]
all_rows_and_ways = combinations([*OF_TORCH, *OF_KERNELS, *OF_CSRC])


def values():
    return torch.linspace(-7, 9, 37, device=DEVICE, requires_grad=True)


def around(function, x):
    """A network whose other parts do not survive an activation that is left out or done twice."""
    return function(x * 2).sin()


def gradient(y, *leaves):
    """Through `backward`: reentrant checkpoints refuse `torch.autograd.grad`."""
    y.backward(torch.linspace(-1, 2, y.numel(), device=DEVICE).reshape(y.shape))
    return [y, *(leaf.grad for leaf in leaves)]


def checkpointed(function, **options):
    x = values()
    return gradient(checkpoint(functools.partial(around, function), x, **options), x)


def checkpointed_in_sequence(function):
    class Layer(nn.Module):
        def forward(self, x):
            return around(function, x)

    x = values()
    layers = nn.Sequential(*(Layer() for _ in range(4)))
    return gradient(checkpoint_sequential(layers, 2, x, use_reentrant=False), x)


def within(context, function):
    x = values()
    with context:
        return gradient(around(function, x), x)


def saved_as_numpy():
    return graph.saved_tensors_hooks(
        lambda x: x.cpu().numpy().copy(), lambda x: torch.from_numpy(x).to(DEVICE)
    )


def backward_twice(function):
    x = values()
    y = around(function, x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    return [*first, x.grad]


def backward_to_some(function):
    x, weight = values(), values()
    y = function(x * weight).sin()
    torch.autograd.backward(y.sum(), inputs=[weight])
    assert x.grad is None
    return [weight.grad]


def backward_to_an_intermediate(function):
    x = values()
    middle = x * 2
    y = function(middle * 1).sin()
    torch.autograd.backward(y.sum(), inputs=[middle])
    assert x.grad is None
    return [middle.grad]


def hooked_tensors(function):
    seen = []
    x = values()
    x.register_hook(lambda grad: grad * 2)
    x.register_post_accumulate_grad_hook(lambda x: seen.append(x.grad.clone()))
    middle = x * 2
    middle.register_hook(lambda grad: seen.append(grad) or grad * 3)
    middle.retain_grad()
    y = function(middle * 1)
    y.register_hook(lambda grad: seen.append(grad) or grad + 1)
    graph.register_multi_grad_hook((x, middle), lambda grads: seen.extend(grads))
    gradient(y.sin(), x)
    assert len(seen) == 5
    return [*seen, middle.grad, x.grad]


def hooked_node(function):
    seen = []
    x = values()
    y = function(x * 2)
    y.grad_fn.register_prehook(lambda outputs: seen.append(outputs[0]))
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(outputs[0]))
    gradient(y.sin(), x)
    assert len(seen) == 2
    return [*seen, x.grad]


def hooked_module(function):
    class Module(nn.Module):
        def forward(self, x):
            return function(x)

    seen = []
    module, x = Module(), values()
    module.register_full_backward_pre_hook(lambda module, outputs: seen.extend(outputs))
    module.register_full_backward_hook(lambda module, inputs, outputs: seen.extend(inputs))
    gradient(around(module, x), x)
    return [*seen, x.grad]


def scaled(function):
    """Three steps of mixed precision, of which the second overflows and is skipped."""
    torch.manual_seed(0)
    width = function(torch.ones(1, 8, device=DEVICE)).shape[1]
    layers = nn.Linear(4, 8), nn.Linear(width, 2)
    model = nn.Sequential(*layers).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(5, 4, device=DEVICE)
    dtypes, scales = [], []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            hidden = function(model[0](x))
            loss = model[1](hidden).float().square().mean() * factor
            dtypes += [hidden.dtype, function(x.clone()).dtype]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**10, 2.0**9, 2.0**9]
    assert dtypes[::2] == [torch.bfloat16] * 3
    # Of a float32 input: PReLU is cast by autocast, the others are not.
    sizes = torch.tensor([dtype.itemsize for dtype in dtypes])
    return [sizes, *(parameter.detach() for parameter in model.parameters())]


# Each takes an activation and returns tensors.
PROGRAMS = {
    "checkpoint": functools.partial(checkpointed, use_reentrant=False),
    "checkpoint to the end": functools.partial(checkpointed, use_reentrant=False, early_stop=False),
    "reentrant checkpoint": functools.partial(checkpointed, use_reentrant=True),
    "checkpoint_sequential": checkpointed_in_sequence,
    "save_on_cpu": lambda function: within(graph.save_on_cpu(), function),
    "saved_tensors_hooks": lambda function: within(saved_as_numpy(), function),
    "anomaly mode": lambda function: within(torch.autograd.detect_anomaly(), function),
    "backward twice": backward_twice,
    "backward to some inputs": backward_to_some,
    "backward to an intermediate": backward_to_an_intermediate,
    "hooks of tensors": hooked_tensors,
    "hooks of a node": hooked_node,
    "hooks of a module": hooked_module,
    "GradScaler": scaled,
}


EACH_PROGRAM = [
    # In place it fails, as with torch, which C++ leaves to torch.
    pytest.param(
        program, id=name, marks=pytest.mark.declined if name == "hooks of a module" else ()
    )
    for name, program in PROGRAMS.items()
]


def assert_torchs(ours, theirs, way):
    """Bit for bit where torch's own op computes ours."""
    tolerance = {"rtol": 0, "atol": 0} if way in ("auto", "Function") and DEVICE == "cpu" else {}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance or {"rtol": 1e-4, "atol": 1e-5})


def outcome(run, *args):
    """What it returns, or the error that autograd raises."""
    try:
        return run(*args)
    except RuntimeError as error:
        return error


@all_rows_and_ways
@pytest.mark.parametrize("program", EACH_PROGRAM)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_neighbours_do_as_with_torch(ours, theirs, way, inplace, program):
    ours, theirs = outcome(program, ours), outcome(program, theirs)
    if isinstance(theirs, RuntimeError):
        assert str(ours) == str(theirs)
        assert inplace
        assert program is hooked_module
    else:
        assert_torchs(ours, theirs, way)


class Calls(TorchDispatchMode):
    """Counts the calls of every op."""

    def __enter__(self):
        self.counts = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op] += 1
        return op(*args, **kwargs or {})


@pytest.mark.declined
@elementwise_rows
@all_ways
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_selective_checkpoint(ours, theirs, way, inplace, keep):
    """A policy keeps what the activation returns, or computes it again."""
    x = values() * 1
    with Calls() as forward:
        ours(x)

    def policy(context, op, *args, **kwargs):
        if keep and op in forward.counts:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}
    with Calls() as plain:
        within(contextlib.nullcontext(), ours)
    with Calls() as selective:
        result = outcome(functools.partial(checkpointed, use_reentrant=False, **options), ours)
    if keep and inplace and way == "auto" and DEVICE == "cpu":
        # What torch's op wrote is not what it returned.
        assert "has been mutated" in str(result)
        return
    assert_torchs(result, within(contextlib.nullcontext(), theirs), way)
    # What torch multiplies for Swish is not all that is multiplied here.
    name = re.compile("mish|silu|swish|sigmoid|tanh|elu")
    (op,) = (op for op in forward.counts if name.search(str(op)))
    # What a kernel writes in place cannot be kept, and is right nonetheless.
    expected = 0 if keep and not inplace else 1
    assert selective.counts[op] - plain.counts[op] == expected


def forward_mode(function, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.stack(torch.autograd.forward_ad.unpack_dual(function(dual)))


def vjp(function, x):
    y, pull_back = torch.func.vjp(function, x)
    return pull_back(torch.ones_like(y))[0]


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
    "vjp": vjp,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "forward mode": forward_mode,
}


@all_rows_and_ways
@pytest.mark.declined
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_transforms_are_torchs(ours, theirs, transform):
    x = values().detach()[:15].reshape(5, 3)
    assert torch.equal(transform(lambda x: ours(x * 1), x), transform(lambda x: theirs(x * 1), x))


def in_fp8(tensor):
    """What the README says to compress: no bits, and nothing empty."""
    if tensor.is_floating_point() and tensor.numel() > 0:
        return tensor.dtype, (tensor / tensor.abs().amax()).to(torch.float8_e4m3fn)
    return tensor.dtype, tensor


@pytest.mark.parametrize("case", [case for case in ALL_CASES if case.saves == "mask"], ids=str)
@all_backends
@pytest.mark.usefixtures("forced")
def test_hooks_that_compress_leave_bits_alone(case, backend):
    """fp8 for bits made a third of the gradients wrong, and an empty tensor has no maximum."""
    x = torch.linspace(-8, 8, 64, device=DEVICE).reshape(2, 32).requires_grad_()
    weight = torch.randn_like(case.function(x))
    expected = torch.autograd.grad(case.function(x), x, weight)[0]
    with graph.saved_tensors_hooks(in_fp8, lambda packed: packed[1].to(packed[0])):
        y = case.function(x)
    assert torch.equal(torch.autograd.grad(y, x, weight)[0], expected)
