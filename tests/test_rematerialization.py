"""`rematerialize`: less is saved for backward, and every gradient is the same, bit for bit.

Without a GPU the kernels run in the interpreter, as in test_kernels.py.
"""

import contextlib
import functools
import gc
import inspect
import random
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_act
from benchmarks.small_networks import csp_network, digits_network, stack
from fused_act import host, packing, rematerialization
from fused_act.rematerialization import same_bits, way
from tests.shared import compiling
from tests.shared.cases import BACKENDS, CASES, DEVICE, ON_HOST, all_rows, elementwise_rows

PART = 25  # graphs of one test
# Kernels get fewer: they are slow in the interpreter, and a GPU's time is short.
GRAPHS = [
    pytest.param(
        *way.values, first, marks=[*way.marks, *([pytest.mark.full] if first or way.marks else [])]
    )
    for way, count in [(pytest.param("auto"), 2000), *((each, 200) for each in BACKENDS)]
    for first in range(0, count, PART)
]

KEPT = {packing.Kept, way().Kept}
RECOMPUTED = {packing.Recomputed, way().Recomputed}
plain = contextlib.nullcontext
remat = fused_act.rematerialize


def conv(x, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, x.shape[1], 1, 1, generator=generator).to(x).requires_grad_()
    return F.conv2d(x, weight), [weight]


def norm(x, seed, training=True):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, x.shape[1], generator=generator).to(x).unbind()
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    running = torch.zeros_like(weight), torch.ones_like(weight)
    return F.batch_norm(x, *running, *parameters, training=training), parameters


# What a random graph is made of: `(x, activation, seed) -> y, parameters`.
def activated(x, f, seed):
    return f(x), []


def activated_in_place(x, f, seed):
    return f(x * 1, inplace=True), []


def activated_twice(x, f, seed):
    return f(f(x)), []


def convolved(x, f, seed):
    return conv(x, seed)


def activated_and_convolved(x, f, seed):
    return conv(f(x), seed)


def normalized(x, f, seed):
    return norm(x, seed)


def normalized_in_evaluation(x, f, seed):
    return norm(x, seed, training=False)


def block(x, f, seed):
    y, of_conv = conv(x, seed)
    y, of_norm = norm(y, seed + 1)
    y, of_next = conv(f(y), seed + 2)
    return y, of_conv + of_norm + of_next


def block_in_place(x, f, seed):
    y, of_conv = conv(x, seed)
    y, of_norm = norm(y, seed + 1)
    y, of_next = conv(f(y, inplace=True), seed + 2)
    return y, of_conv + of_norm + of_next


def norm_changed_unseen(x, f, seed, inplace=False, afterwards=False):
    """Written before the activation or after it, where neither the graph nor torch can tell."""
    y, of_norm = norm(x, seed)
    if afterwards:
        y = f(y, inplace=inplace)
    with torch.no_grad():
        y.add_(0.25)
    if not afterwards:
        y = f(y, inplace=inplace)
    y, of_next = conv(y, seed + 1)
    return y, of_norm + of_next


norm_changed_before_in_place = functools.partial(norm_changed_unseen, inplace=True)
norm_changed_after = functools.partial(norm_changed_unseen, afterwards=True)
norm_changed_after_in_place = functools.partial(norm_changed_unseen, inplace=True, afterwards=True)


def norm_viewed(x, f, seed):
    """What an activation takes is a part of a norm's output, and what is saved a part of its."""
    y, of_norm = norm(x, seed)
    y = f(y[:, 1:])
    y, of_next = conv(y[:, 1:], seed + 1)
    return torch.cat([x[:, :1] * y[:, :1], y[:, 1:]], 1), of_norm + of_next


def used_twice(x, f, seed):
    y = f(x)
    (a, first), (b, second) = conv(y, seed), conv(y, seed + 1)
    return a + b, first + second


def viewed(x, f, seed):
    y = f(x)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).to(x)
    weight.requires_grad_()
    left = y[:, :1] * y[:, 1:2]
    flat = F.linear(y.transpose(2, 3).flatten(2)[..., :5], weight)
    return torch.cat([y[:, :3] * left, flat.sum() * left], 1), [weight]


def viewed_as_complex(x, f, seed):
    y = torch.view_as_complex(f(x[..., :4].reshape(*x.shape[:3], 2, 2)))
    return x + (y * y).abs().sum(), []


def negated_view(x, f, seed):
    """Views of y that negate or conjugate what is in memory (pytorch#184379)."""
    y = f(x[..., :4].reshape(*x.shape[:3], 2, 2).contiguous())
    z = torch.view_as_complex(y)
    weight = torch.randn(2, generator=torch.Generator().manual_seed(seed)).to(x).requires_grad_()
    products = (z.conj().imag * weight, z.conj() * weight, z.imag.conj() * weight)
    return x + sum(product.sum().real for product in products), [weight]


def changed_afterwards(x, f, seed):
    y = f(x)
    y.mul_(0.5)
    return conv(y, seed)


def changed_unseen(x, f, seed):
    y = f(x)
    with torch.no_grad():
        y.add_(0.25)
    return conv(y, seed)


def changed_view(x, f, seed):
    y = f(x)
    y[:, 0].mul_(0.5)
    return conv(y, seed)


def saved_and_changed(x, f, seed):
    y = f(x)
    z, parameters = conv(y, seed)
    y.add_(1)
    return z + y, parameters


def input_changed(x, f, seed):
    h = x * 2
    z, parameters = conv(f(h), seed)
    with torch.no_grad():
        h.add_(1)
    return z, parameters


def saves_its_output(x, f, seed):
    y = f(x)
    return y.sigmoid() * y.tanh(), []


def checkpointed(x, f, seed):
    # Made before: computed again, they would be others.
    weights = conv(x.detach(), seed)[1]
    y = checkpoint(lambda x, w: f(F.conv2d(f(x), w)), x, *weights, use_reentrant=False)
    return y, weights


def cast(x, f, seed):
    y = f(x).to(torch.bfloat16)
    z, parameters = conv(y, seed)
    return z.to(x.dtype), parameters


def detached(x, f, seed):
    return conv(f(x).detach() + x, seed)


PIECES = [
    activated,
    activated_in_place,
    activated_twice,
    convolved,
    activated_and_convolved,
    block_in_place,
    norm_changed_unseen,
    norm_changed_before_in_place,
    norm_changed_after,
    norm_changed_after_in_place,
    norm_viewed,
    normalized,
    normalized_in_evaluation,
    block,
    used_twice,
    viewed,
    viewed_as_complex,
    negated_view,
    changed_afterwards,
    changed_unseen,
    changed_view,
    saved_and_changed,
    input_changed,
    saves_its_output,
    checkpointed,
    cast,
    detached,
]


def run(pieces, function, context):
    """The result and all gradients, or the error, of a graph built in `context`."""
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x.requires_grad_()
    try:
        leaves = [x]
        with context:
            y = x
            for piece, seed in pieces:
                y, parameters = piece(y, function, seed)
                leaves += parameters
        grads = torch.autograd.grad(
            y, leaves, torch.ones_like(y), allow_unused=True, retain_graph=True
        )
        again = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    except RuntimeError as error:
        return error
    assert all(a is b is None or same_bits(a, b) for a, b in zip(grads, again))
    return [y, *grads]


def assert_same(ours, theirs):
    if isinstance(theirs, RuntimeError):  # ours may be right where torch refuses
        assert "modified by an inplace operation" in str(theirs)
        assert not isinstance(ours, RuntimeError) or "modified by an inplace" in str(ours)
        return
    for a, b in zip(ours, theirs, strict=True):
        assert a is b is None or same_bits(a, b)


@pytest.fixture
def backend(request):
    # cuDNN may choose algorithms that add in no fixed order.
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with fused_act.use_backend(request.param), cudnn:
        yield request.param


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("backend", "first"), GRAPHS, indirect=["backend"])
def test_random_graphs(backend, first):
    for seed in range(first, first + PART):
        draw = random.Random(seed)
        case = draw.choice(CASES)
        pieces = [(draw.choice(PIECES), draw.randrange(10**6)) for _ in range(draw.randint(1, 6))]
        # A kernel's bits are not torch's.
        reference = case.torch_function if backend == "auto" and DEVICE == "cpu" else case.function
        theirs = run(pieces, reference, plain())
        for options in ({}, {"norm": True}):
            ours = run(pieces, case.function, remat(**options))
            try:
                assert_same(ours, theirs)
            except AssertionError:
                names = [str(piece) for piece, _ in pieces]
                pytest.fail(f"seed {seed}, {case}, {options}: {names}: {ours}, {theirs}")


@pytest.mark.parametrize("function", [fused_act.mish, torch.nn.functional.mish])
def test_nothing_of_a_checkpoint_runs_before_backward(function):
    """What its nodes save is asked of it only in backward, when it has to compute it again."""
    x, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    sizes = []

    def part(x):
        sizes.append(x.shape)
        return function(x)

    with remat():
        y = checkpoint(part, x * 1, use_reentrant=False) @ weight
        assert sizes == [x.shape]
    y.sum().backward()
    assert sizes == [x.shape] * 2


WAYS = [
    "auto",
    "Function",
    *(pytest.param(*each.values, marks=each.marks) for each in BACKENDS),
]


@all_rows
@pytest.mark.parametrize("way", WAYS)
def test_every_row_of_activations(case, way):
    """Those too whose output is not computed again, among all that may save it."""

    def function(x, inplace=False):
        y = case.apply(x) if way == "Function" else case.function(x, inplace=inplace)
        return y[..., : x.shape[-1]]  # CReLU's is twice as long

    assert_same_graphs(
        function, lambda: fused_act.use_backend("auto" if way == "Function" else way)
    )


def assert_same_graphs(function, selected):
    pieces = [block, viewed, negated_view, activated_in_place, saved_and_changed, convolved]
    after_norms = [block_in_place, norm_changed_unseen, norm_changed_before_in_place]
    after_norms += [norm_changed_after, norm_changed_after_in_place, norm_viewed]
    for piece in (pieces[:-1], *([one, convolved] for one in (*pieces, *after_norms))):
        graph = [(one, seed) for seed, one in enumerate(piece)]
        with selected():
            theirs = run(graph, function, plain())
            for options in ({}, {"norm": True}):
                assert_same(run(graph, function, remat(**options)), theirs)


needs_compiler = pytest.mark.skipif(compiling.COMPILER is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.usefixtures("one_thread")
@elementwise_rows
@pytest.mark.parametrize("way", ON_HOST)
@pytest.mark.usefixtures("hooks")
def test_every_row_on_the_host(case, way):
    """The nodes of C++ and those of Python with the kernels of csrc/, whose masks are real."""
    assert_same_graphs(case.function, ON_HOST[way])


class Doubled(fused_act.MishFunction):
    """A user's Function, which says that it saves what ours does and computes something else."""

    row = 1  # what ours have, too

    @staticmethod
    def forward(ctx, x):
        return 2 * fused_act.MishFunction.forward(ctx, x)

    @staticmethod
    def backward(ctx, grad_output):
        return fused_act.MishFunction.backward(ctx, 2 * grad_output)[0]


def test_subclass_of_a_function_is_kept():
    def gradients():
        x = torch.linspace(-3, 3, 64).reshape(1, 4, 4, 4).requires_grad_()
        y, parameters = conv(Doubled.apply(x), 0)
        return torch.autograd.grad(y.square().sum(), [x, *parameters])

    expected = gradients()
    with remat():
        found = gradients()
    assert all(map(torch.equal, found, expected))


@all_rows
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"norm": True}], ids=["", "norm"])
@pytest.mark.usefixtures("hooks")
def test_gradient_of_a_negated_view(case, way, options):
    """Its sign, which torch has right without rematerialize and for the sum of a product."""

    def gradient(context):
        weight = torch.linspace(1, 2, 12, device=DEVICE).reshape(3, 4).requires_grad_()
        x = torch.linspace(-3, 4, 24, device=DEVICE).reshape(3, 4, 2).requires_grad_()
        with context:
            y = case.apply(x * 1) if way == "Function" else case.function(x * 1)
            z = torch.view_as_complex(y.reshape(3, -1, 2)[:, :4])
            product = (z.conj().imag * weight).sum()
        expected = -y.detach().reshape(3, -1, 2)[:, :4, 1]
        return torch.autograd.grad(product, weight)[0], expected

    with fused_act.use_backend("auto" if way == "Function" else way):
        assert torch.equal(*gradient(remat(**options)))
        assert torch.equal(*gradient(plain()))


def kept_bytes(not_counted=()):
    """Bytes of the storages that are kept for backward, by whoever, each once."""
    gc.collect()
    addresses = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    storages = {
        each.tensor.untyped_storage().data_ptr(): each.tensor.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in KEPT
    }
    return sum(size for address, size in storages.items() if address not in addresses)


def saved_bytes(network, x, not_counted):
    """As `kept_bytes`, of what torch saves."""
    with torch.autograd.graph.saved_tensors_hooks(packing.Kept, packing.unpack):
        y = network(x)
    found = kept_bytes(not_counted)
    del y
    return found


NETWORKS = {
    "conv-act": functools.partial(stack, norm=False),
    "conv-norm-act": functools.partial(stack, norm=True),
    "mobilenet_v2": digits_network,
    "csp": csp_network,
}
# At most, of what torch saves: without and with `norm`.
SHARES = {
    "conv-act": (0.60, 0.60),
    "conv-norm-act": (0.77, 0.50),
    "mobilenet_v2": (0.77, 0.50),
    "csp": (0.77, 0.50),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", [fused_act.Mish, fused_act.SiLU, fused_act.ReLU6])
def test_less_is_kept_and_gradients_are_the_same(name, kind):
    torch.manual_seed(0)
    network = NETWORKS[name](kind)
    x = torch.randn(2, 1, 16, 16)
    not_counted = [x, *network.parameters(), *network.buffers()]
    saved = saved_bytes(network, x, not_counted)
    expected = gradients(network, x, plain())
    for with_norm, share in zip((False, True), SHARES[name]):
        with remat(norm=with_norm):
            y = network(x)
        assert 0 < kept_bytes(not_counted) <= share * saved
        del y
        for a, b in zip(gradients(network, x, remat(norm=with_norm)), expected):
            assert torch.equal(a, b)


MASKED = [fused_act.ReLU, fused_act.ReLU6, fused_act.LeakyReLU]


@needs_compiler
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("error:rematerialize")
@pytest.mark.parametrize("name", ["conv-norm-act", "mobilenet_v2", "csp"])
@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("way", ON_HOST)
@pytest.mark.usefixtures("hooks")
def test_masks_after_norms_are_all_that_is_kept(name, kind, inplace, way):
    torch.manual_seed(0)
    network = NETWORKS[name](functools.partial(kind, inplace=inplace))
    x = torch.randn(2, 1, 16, 16)
    not_counted = [x, *network.parameters(), *network.buffers()]
    saved = saved_bytes(NETWORKS[name](kind), x, not_counted)  # without kernels, as torch
    with ON_HOST[way]():
        expected = gradients(network, x, plain())
        with remat(norm=True):
            y = network(x)
        assert 0 < kept_bytes(not_counted) <= 0.5 * saved
        del y
        for a, b in zip(gradients(network, x, remat(norm=True)), expected):
            assert torch.equal(a, b)


def gradients(network, x, context):
    with context:
        y = network(x)
    return torch.autograd.grad(y.square().sum(), [*network.parameters()])


@pytest.fixture(params=["", "python"])
def hooks(request, monkeypatch):
    """The hooks that run here, and those of Python, which run where there is no host extension."""
    if request.param:
        monkeypatch.setattr(rematerialization, "way", lambda: packing)
        monkeypatch.setattr(rematerialization, "pack_hook", rematerialization.pack_hook.__wrapped__)


def mish_conv(weight):
    """A leaf, its Mish, which a convolution saves, and the result."""
    leaf = torch.randn(2, 4, 3, 5, requires_grad=True)
    with remat():
        y = fused_act.mish(leaf * 1)
        return leaf, y, F.conv2d(y, weight)


@pytest.fixture
def weight():
    return torch.randn(4, 4, 1, 1, requires_grad=True)


@pytest.mark.usefixtures("hooks")
def test_nothing_is_kept_alive(weight):
    gc.collect()
    leaf, y, z = mish_conv(weight)
    with remat():
        z = z.sigmoid()  # which saves its own output
    saved = [weakref.ref(each) for each in gc.get_objects() if type(each) in KEPT | RECOMPUTED]
    assert saved
    gc.disable()
    try:
        del leaf, y, z
        assert not [each for each in saved if each() is not None]
    finally:
        gc.enable()


def norm_and_conv(x, conv_weight, weight, bias):
    """A convolution of a norm's output."""
    return F.conv2d(F.batch_norm(x, None, None, weight, bias, training=True), conv_weight)


def trainable(*shape):
    return torch.randn(shape).requires_grad_()


# What one norm is, and then another that looks alike.
ALIKE = {
    "without a weight": lambda: ((trainable(4), trainable(4)), (None, None)),
    "with a bias alone": lambda: ((trainable(4), trainable(4)), (None, trainable(4))),
    "with a frozen bias alone": lambda: ((None, None), (None, torch.randn(4))),
    "of another dtype": lambda: (
        (trainable(4).detach().bfloat16().requires_grad_(),) * 2,
        (trainable(4), trainable(4)),
    ),
}


@pytest.mark.usefixtures("hooks")
@pytest.mark.filterwarnings("ignore:rematerialize")
@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_that_look_alike(monkeypatch, make, swapped, dtype):
    """What was found of one is not taken for the other."""
    monkeypatch.setattr(rematerialization, "SAME_BITS", {})
    torch.manual_seed(0)
    pairs = make()
    conv_weight = trainable(4, 4, 1, 1).detach().to(dtype).requires_grad_()
    x = torch.randn(2, 4, 3, 5, dtype=dtype, requires_grad=True)
    for parameters in reversed(pairs) if swapped else pairs:
        if dtype is torch.float32 and any(
            p is not None and p.dtype is not dtype for p in parameters
        ):
            continue
        found = []
        for block in (remat(norm=True), plain()):
            with block:
                y = norm_and_conv(x, conv_weight, *parameters)
            found.append(torch.autograd.grad(y.square().sum(), conv_weight)[0])
        assert torch.equal(*found)


@pytest.mark.usefixtures("hooks")
@pytest.mark.filterwarnings("ignore:rematerialize")
def test_values_that_tell_nothing_are_not_a_try(monkeypatch):
    """Zeros have the same bits however they are computed."""
    monkeypatch.setattr(rematerialization, "SAME_BITS", {})
    asked, check_bits = [], rematerialization.check_bits

    def counted(*args):
        asked.append(check_bits(*args))
        return asked[-1]

    monkeypatch.setattr(rematerialization, "check_bits", counted)
    monkeypatch.setattr(rematerialization, "pack_hook", inspect.unwrap(rematerialization.pack_hook))
    conv_weight, parameters = trainable(4, 4, 1, 1), (trainable(4), trainable(4))
    for x in (torch.zeros(2, 4, 3, 5), torch.randn(2, 4, 3, 5)):
        with remat(norm=True):
            norm_and_conv(x.requires_grad_(), conv_weight, *parameters)
    assert asked == [None, True]


@pytest.mark.usefixtures("hooks")
def test_statistics_that_a_later_step_writes():
    """Training writes them and counts no version."""
    bn, conv_weight = nn.BatchNorm2d(4), trainable(4, 4, 1, 1)
    x, other = torch.randn(2, 2, 4, 3, 5).unbind()
    found = []
    for block in (remat(norm=True), plain()):
        bn.reset_running_stats()
        bn.eval()
        with block:
            y = F.conv2d(bn(x), conv_weight)
        bn.train()
        bn(other + 5)
        found.append(torch.autograd.grad(y.square().sum(), conv_weight)[0])
    assert torch.equal(*found)


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize("way", [*ON_HOST, "auto"])
def test_what_was_saved_outside_and_changed_then_is_kept(way):
    """Its node was made without the hooks, and tells itself that what it saved was changed."""
    with ON_HOST[way]() if way in ON_HOST else plain():
        for of_norm in (False, True):
            found = []
            for block in (remat(norm=True), plain()):
                torch.manual_seed(0)
                weight, h = trainable(4, 4, 1, 1), trainable(2, 4, 3, 5) * 1
                y = nn.BatchNorm2d(4)(h) if of_norm else fused_act.mish(h)
                with torch.no_grad():
                    h.add_(1)
                with block:
                    z = F.conv2d(y, weight)
                found.append(torch.autograd.grad(z.square().sum(), weight)[0])
            assert torch.equal(*found)


@pytest.mark.skipif(isinstance(host.extension(), str), reason="torch's getters do not lock")
@pytest.mark.skipif(compiling.COMPILER is None, reason="needs a C++ compiler")
def test_a_graph_that_another_thread_frees():
    """What is being freed is kept: neither waits for the other, and nothing gone is read."""
    errors = []

    def use(y, weight, barrier):
        barrier.wait()
        try:
            with remat():
                for _ in range(20):
                    y * weight
        except RuntimeError as error:
            errors.append(error)

    for _ in range(600):
        x, weight, barrier = trainable(64), trainable(64), threading.Barrier(2)
        with ON_HOST["csrc"]():
            y = fused_act.mish(x * 1)  # saved without hooks, so that freeing it frees the tensor
        thread = threading.Thread(target=use, args=(y, weight, barrier))
        thread.start()
        total = y.sum()
        barrier.wait()
        total.backward()
        thread.join(60)
        assert not thread.is_alive()
    assert not errors


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * 2


@pytest.mark.skipif(isinstance(host.extension(), str), reason="Python asks each time")
def test_python_is_asked_once_about_each_kind_of_node():
    """A hook meets every tensor that anybody saves, and a call of Python takes microseconds."""
    asked = []

    def may_recompute(node, norm):
        asked.append(node.name())
        return False

    hooks = way().Pack(may_recompute, None, None, False), way().unpack
    x = torch.randn(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        for _ in range(3):
            Twice.apply(x).sin()
            fused_act.MishFunction.apply(x).sin()
            (x * 2).sin()
    assert sorted(asked) == ["MishFunctionBackward", "MulBackward0", "TwiceBackward"]


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **kwargs or {})


@pytest.mark.usefixtures("hooks")
def test_output_saved_twice_is_computed_once(weight):
    leaf = torch.randn(2, 4, 3, 5, requires_grad=True)
    with remat():
        y = fused_act.mish(leaf * 1)
        z = F.conv2d(y, weight) * F.conv2d(y[:, :], weight)
    for _ in range(2):
        with Calls() as calls:
            torch.autograd.grad(z.sum(), [leaf, weight], retain_graph=True)
        assert calls.ops.count(torch.ops.aten.mish.default) == 1


@pytest.mark.usefixtures("hooks")
def test_output_between_activations_is_computed_once(weight):
    """Though what leads to the second is a view: it is needed there, and for what comes of it."""
    leaf = torch.randn(2, 4, 3, 5, requires_grad=True)
    with remat():
        z = F.conv2d(fused_act.silu(fused_act.mish(leaf * 1)[:]), weight)
    with Calls() as calls:
        torch.autograd.grad(z.sum(), [leaf, weight])
    assert calls.ops.count(torch.ops.aten.mish.default) == 1


@needs_compiler
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", ON_HOST)
def test_output_that_was_written_in_place_is_computed_again(way, weight):
    """From the copy of its input that the activation saves."""
    leaf = torch.randn(2, 4, 3, 5, requires_grad=True)
    with ON_HOST[way](), remat():
        z = F.conv2d(fused_act.mish(leaf * 1, inplace=True), weight)
    assert kept_bytes([weight]) == leaf.nbytes
    del z


def test_norm_that_two_need_is_computed_once(weight):
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    norm = nn.BatchNorm2d(4)
    with remat(norm=True):
        z = F.conv2d(fused_act.mish(norm(x * 1)), weight)
    with Calls() as calls:
        torch.autograd.grad(z.sum(), x)
    assert calls.ops.count(torch.ops.aten.native_batch_norm.default) == 1


def test_a_backward_to_some_leaves_a_right_one_to_the_rest(weight):
    leaf, _, z = mish_conv(weight)
    expected = torch.autograd.grad(F.conv2d(F.mish(leaf * 1), weight).sum(), [leaf, weight])
    for index in (1, 0, 0, 1):
        (grad,) = torch.autograd.grad(z.sum(), [(leaf, weight)[index]], retain_graph=True)
        assert torch.equal(grad, expected[index])


@elementwise_rows
@pytest.mark.parametrize("backward_inside", [False, True])
def test_second_derivative(case, weight, backward_inside):
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = weight.detach().double().requires_grad_()

    def second(function, context):
        with context:
            y = F.conv2d(function(x * 1), weight).square().sum()
            if backward_inside:
                first = torch.autograd.grad(y, [x, weight], create_graph=True)
        if not backward_inside:
            first = torch.autograd.grad(y, [x, weight], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [x, weight])

    for a, b in zip(second(case.function, remat()), second(case.torch_function, plain())):
        assert torch.equal(a, b)


def test_decorated_function(weight):
    @fused_act.rematerialize(norm=True)
    def function(x):
        assert x.requires_grad
        return F.conv2d(fused_act.mish(x * 1), weight)

    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    for _ in range(2):
        y = function(x)
        assert kept_bytes([x, weight]) == x.nbytes  # the activation's input
        del y


def test_exception_ends_the_block(weight):
    with pytest.raises(KeyError), remat():
        raise KeyError
    y = F.conv2d(fused_act.mish(torch.randn(2, 4, 3, 5) * weight.sum()), weight)
    assert kept_bytes() == 0
    y.sum().backward()


@pytest.mark.usefixtures("hooks")
def test_weight_changed_before_backward_is_refused(weight):
    _, _, z = mish_conv(weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \[.*at version 1"):
        z.sum().backward()


@pytest.mark.usefixtures("hooks")
def test_input_changed_before_backward_is_refused(weight):
    h = torch.randn(2, 4, 3, 5, requires_grad=True) * 1
    with remat():
        z = F.conv2d(fused_act.mish(h), weight)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_input_freed_by_the_user(weight):
    leaf = torch.randn(2, 4, 3, 5, requires_grad=True)
    h = leaf * 1
    with remat():
        z = F.conv2d(fused_act.mish(h), weight)
    h.data = torch.empty(0)
    expected = torch.autograd.grad(F.conv2d(F.mish(leaf * 1), weight).sum(), [leaf, weight])
    for a, b in zip(torch.autograd.grad(z.sum(), [leaf, weight]), expected):
        assert torch.equal(a, b)


def test_graph_that_is_gone_is_no_way_to_compute_again(weight):
    leaf = torch.randn(2, 4, 3, 5, requires_grad=True)
    y = fused_act.mish(leaf * 1)
    y.sum().backward()
    with remat():
        z = F.conv2d(y, weight)
    (grad,) = torch.autograd.grad(z.sum(), weight)
    assert torch.equal(grad, torch.autograd.grad(F.conv2d(y.detach(), weight).sum(), weight)[0])


def test_no_grad_keeps_nothing(weight):
    with remat(), torch.no_grad():
        z = F.conv2d(fused_act.mish(torch.randn(2, 4, 3, 5)), weight)
    assert kept_bytes() == 0
    assert not z.requires_grad


def test_other_threads_are_not_affected(weight):
    found = []

    def work():
        y = F.conv2d(fused_act.mish(torch.randn(2, 4, 3, 5) * weight.sum()), weight)
        found.append((kept_bytes(), y))

    with remat():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found[0][0] == 0


def test_backward_in_many_threads():
    network = csp_network(fused_act.Mish)
    x = torch.randn(2, 1, 16, 16)
    results = []

    def work():
        for _ in range(5):
            results.append(gradients(network, x, remat(norm=True)))

    network.eval()
    expected = gradients(network, x, plain())
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        for a, b in zip(result, expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("with_norm", [False, True])
def test_autocast(with_norm):
    network = digits_network(fused_act.Mish)
    x = torch.randn(2, 1, 16, 16)

    def run(context):
        with torch.autocast("cpu", dtype=torch.bfloat16), context:
            y = network(x)
        return torch.autograd.grad(y.float().square().sum(), [*network.parameters()])

    for a, b in zip(run(remat(norm=with_norm)), run(plain())):
        assert torch.equal(a, b)


def test_innermost_hooks_apply(weight):
    leaf = torch.randn(2, 4, 3, 5, requires_grad=True)
    with remat(), torch.autograd.graph.save_on_cpu():
        z = F.conv2d(fused_act.mish(leaf * 1), weight)
    assert kept_bytes() == 0
    with torch.autograd.graph.save_on_cpu(), remat():
        z2 = F.conv2d(fused_act.mish(leaf * 1), weight)
    assert kept_bytes([weight]) == leaf.nbytes
    for y in (z, z2):
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert torch.equal(
            grad, torch.autograd.grad(F.conv2d(F.mish(leaf * 1), weight).sum(), leaf)[0]
        )


def test_norm_that_differs_the_second_time_is_kept(monkeypatch):
    monkeypatch.setattr(rematerialization, "same_bits", lambda a, b: False)
    monkeypatch.setattr(rematerialization, "SAME_BITS", {})
    fresh = functools.cache(rematerialization.pack_hook.__wrapped__)
    monkeypatch.setattr(rematerialization, "pack_hook", fresh)
    network = stack(fused_act.Mish, norm=True)
    x = torch.randn(2, 1, 16, 16)
    expected = gradients(network, x, plain())
    with pytest.warns(UserWarning, match="gives other bits the second time") as warned:
        found = gradients(network, x, remat(norm=True))
    assert len(warned) == 1
    with remat(norm=True):
        y = network(x)
    kept = kept_bytes()
    del y
    with remat():
        y = network(x)
    assert kept == kept_bytes()
    del y
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "no affine"])
@pytest.mark.parametrize("training", [False, True])
def test_norms_of_all_kinds(frozen, training):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, affine=frozen != "no affine"), nn.SiLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    network[1].running_mean += 0.5
    if frozen in ("weight", "both"):
        network[1].weight.requires_grad_(False)
    if frozen in ("bias", "both"):
        network[1].bias.requires_grad_(False)
    network.train(training)
    x = torch.randn(2, 1, 16, 16)

    def run(context):
        with context:
            y = network(x)
        leaves = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.autograd.grad(y.square().sum(), leaves)

    for a, b in zip(run(remat(norm=True)), run(plain())):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_code_is_as_ever(inside, weight):
    def function(x):
        with remat() if inside else plain():
            return F.conv2d(fused_act.mish(x * 1), weight)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    with plain() if inside else remat():
        y = compiled(x)
    for a, b in zip(
        torch.autograd.grad(y.sum(), [x, weight]),
        torch.autograd.grad(F.conv2d(F.mish(x * 1), weight).sum(), [x, weight]),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_relu6_kernels_keep_their_output(backend):
    leaf = torch.randn(2, 4, 3, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(4, 4, 1, 1, device=DEVICE, requires_grad=True)
    with remat():
        y = F.conv2d(fused_act.relu6(leaf * 1), weight)
    assert kept_bytes([weight]) == leaf.nbytes + leaf.numel() // 8
    del y


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum()),
    "vmap": torch.func.vmap,
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum())),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("norm", [False, True])
def test_under_a_transform_it_does_nothing(transform, norm):
    """torch.func refuses hooks of saved tensors."""
    weight = torch.linspace(-1, 1, 4)

    def plain(x):
        return F.silu(F.mish(x) * weight) * weight

    @fused_act.rematerialize(norm=norm)
    def rematerialized(x):
        return fused_act.silu(fused_act.mish(x) * weight) * weight

    x = torch.randn(3, 4)
    ours, theirs = (TRANSFORMS[transform](function)(x) for function in (rematerialized, plain))
    torch.testing.assert_close(ours, theirs)


def test_in_forward_mode_and_while_tracing_it_does_nothing():
    x, tangent = torch.randn(4), torch.randn(4)

    @fused_act.rematerialize()
    def function(x):
        return fused_act.mish(x) * 2

    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, torch.func.jvp(lambda x: F.mish(x) * 2, (x,), (tangent,))[1])
    traced = torch.jit.trace(function, x)
    assert torch.equal(traced(x), F.mish(x) * 2)
