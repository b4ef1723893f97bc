"""Derivatives of compiled code are torch's: of any order, under every transform of `torch.func`.

A gradient that is cut in silence trains on a wrong loss (pytorch#136662, #181581). In the
interpreter the Triton kernels are compiled; without it what needs no kernel.
"""

import contextlib
import functools

import pytest
import torch
from torch._higher_order_ops.scan import scan
from torch.autograd import forward_ad

from tests.shared.cases import BACKENDS, DEVICE, OF_CSRC, combinations, elementwise_rows

# What users call, the Function by itself, and what a forced backend gives.
OF_TORCH = [pytest.param(way, id=way) for way in ("auto", "Function")]
OF_KERNELS = [pytest.param(*each.values, marks=each.marks, id=each.values[0]) for each in BACKENDS]
all_rows_and_ways = combinations([*OF_TORCH, *OF_KERNELS])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()


def values():
    """On both sides of 0 and of 3, and not on a kink."""
    return torch.tensor([-1.0, 0.5, 2.0, 4.5], device=DEVICE)


def around(f):
    """f between other functions, so that the second derivative is not 0 where that of f is."""
    return lambda x: f(2 * x).sin()


def loss(f):
    return lambda x: around(f)(x).sum()


def penalty(f):
    """Of a gradient, as in WGAN-GP, MAML and PINNs."""
    return lambda x: torch.func.grad(loss(f))(x).square().sum()


def batch(x):
    return torch.stack([x, x + 0.25])


def vjp(f, x):
    y, pull_back = torch.func.vjp(around(f), x)
    return pull_back(torch.ones_like(y))[0]


def dual_level(f, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(around(f)(dual)).tangent


# Each takes an activation and a tensor, and is compiled as a whole.
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(loss(f))(x),
    "grad of grad": lambda f, x: torch.func.grad(penalty(f))(x),
    "grad of grad of grad": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(penalty(f))(x).square().sum()
    )(x),
    "vjp": vjp,
    "jvp": lambda f, x: torch.func.jvp(around(f), (x,), (torch.ones_like(x),))[1],
    "jvp of grad": lambda f, x: torch.func.jvp(
        torch.func.grad(loss(f)), (x,), (torch.ones_like(x),)
    )[1],
    "linearize": lambda f, x: torch.func.linearize(around(f), x)[1](torch.ones_like(x)),
    "hessian": lambda f, x: torch.func.hessian(loss(f))(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(around(f))(x),
    "vmap": lambda f, x: torch.func.vmap(around(f))(batch(x)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(loss(f)))(batch(x)),
    "dual level": dual_level,
}
# Dynamo breaks the graph here, with torch's own op as well.
WITH_BREAKS = {"linearize"}


@all_rows_and_ways
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(ours, theirs, name):
    """Programs of torch.func (pytorch#129845, #154284, #187284, #141455)."""
    program = TRANSFORMS[name]
    compiled = torch.compile(program, backend="eager", fullgraph=name not in WITH_BREAKS)
    assert_close(compiled(ours, values()), program(theirs, values()))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@all_rows_and_ways
def test_code_compiled_before_is_compiled_again_under_a_transform(ours, theirs):
    """Also where it is not the program that is compiled, but what it transforms."""
    compiled = torch.compile(around(ours), backend="eager", fullgraph=True)

    def results(g):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(values(), torch.ones_like(values()))
            tangent = forward_ad.unpack_dual(g(dual)).tangent
        return (
            g(values()),
            torch.func.vmap(g)(batch(values())),
            torch.func.grad(lambda x: g(x).sum())(values()),
            tangent,
            g(values()),
        )

    assert_close(results(compiled), results(around(theirs)))


# Second derivatives by autograd: within compiled code, partly, and all outside of it.


def loss_with_more(f, x):
    """With a term beside f, so that a second derivative that is cut is wrong and not an error."""
    return loss(f)(x) + (x**3).sum()


def penalty_inside(f, x):
    (grad,) = torch.autograd.grad(loss_with_more(f, x), x, create_graph=True)
    return grad.square().sum()


def all_inside(compile_it, f, x):
    def run(x):
        return torch.autograd.grad(penalty_inside(f, x), x)[0]

    return compile_it(run)(x)


def first_inside(compile_it, f, x):
    return torch.autograd.grad(compile_it(lambda x: penalty_inside(f, x))(x), x)[0]


def all_outside(compile_it, f, x):
    (grad,) = torch.autograd.grad(
        compile_it(lambda x: loss_with_more(f, x))(x), x, create_graph=True
    )
    return torch.autograd.grad(grad.square().sum(), x)[0]


PLACES = (all_inside, first_inside, all_outside)
# Where Dynamo is told to trace them, it does not break the graph at calls of autograd.
TRACED = {"trace_autograd_ops": True}
SETTINGS = [
    pytest.param("eager", {}, id="eager"),
    pytest.param("aot_eager", {}, id="aot_eager"),
    pytest.param("aot_eager", TRACED, id="aot_eager-traced"),
]


def second_derivative(place, f, compile_it):
    torch._dynamo.reset()
    try:
        return place(compile_it, f, values().requires_grad_())
    except RuntimeError as error:
        if "does not currently support double backward" in str(error):
            return None
        raise


@all_rows_and_ways
@pytest.mark.parametrize(("compiler", "config"), SETTINGS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_second_derivatives(ours, theirs, compiler, config, place):
    """Right wherever they are with torch's own op, and its error elsewhere.

    That is where AOTAutograd has compiled a graph and then meets a second derivative of it.
    """
    compile_it = functools.partial(torch.compile, backend=compiler)
    with torch._dynamo.config.patch(config):
        found = second_derivative(place, ours, compile_it)
        if found is None:
            assert second_derivative(place, theirs, compile_it) is None
            return
    assert_close(found, second_derivative(place, theirs, lambda f: f))


@combinations([*OF_TORCH, *OF_KERNELS, *OF_CSRC])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("second_inside", [False, True])
@pytest.mark.usefixtures("host_calls")
def test_second_derivatives_through_compiled_autograd(ours, theirs, compiler, second_inside):
    """It compiles the backward of eager code (pytorch#183603)."""
    results = []
    for f in (ours, theirs):
        torch._dynamo.reset()
        x = values().requires_grad_()
        compiled = torch._dynamo.compiled_autograd._enable(torch.compile(backend=compiler))
        with compiled if f is ours else contextlib.nullcontext():
            (first,) = torch.autograd.grad(loss_with_more(f, x), x, create_graph=True)
            if second_inside:
                (second,) = torch.autograd.grad(first.square().sum(), x)
        if not second_inside:
            (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((first, second))
    assert_close(*results)


@elementwise_rows
@pytest.mark.parametrize("place", PLACES[:2], ids=lambda place: place.__name__)
def test_second_derivatives_through_inductor(case, place):
    with torch._dynamo.config.patch(TRACED):
        found = second_derivative(place, case.function, torch.compile)
    assert_close(found, second_derivative(place, case.torch_function, lambda f: f))


@pytest.mark.full
@all_rows_and_ways
def test_scan(ours, theirs, way):
    """A loop whose body is compiled by itself, and its gradient, which a raw op refuses."""

    def step(f, carry, x):
        y = f(carry * x)[..., : carry.shape[-1]]
        return y.sin(), y * 1

    def looped(x):
        carry, ys = scan(functools.partial(step, ours), x, batch(x))
        return carry.sum() + ys.sum()

    def unrolled(x):
        carry, total = x, 0
        for each in batch(x):
            carry, y = step(theirs, carry, each)
            total = total + y.sum()
        return carry.sum() + total

    compiled = torch.compile(looped, backend="aot_eager", fullgraph=True)
    if way in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match="has no derivative"):
            compiled(values().requires_grad_())
        return
    results = []
    for run in (compiled, unrolled):
        x = values().requires_grad_()
        y = run(x)
        results.append((y, torch.autograd.grad(y, x)[0]))
    assert_close(*results)
