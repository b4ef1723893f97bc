"""Activations with a learnable weight: accuracy, gradients of both, layouts, modules, machine code.

On a GPU both backends run. Without one the Triton kernels run in the interpreter:
`TRITON_INTERPRET=1 pytest tests/test_weighted.py -m "not gpu"`; the loops of the CUDA kernels run
on the host.
"""

import copy
import ctypes
import functools
import itertools
import pickle
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fused_act
from benchmarks import machine_code, oracle
from fused_act.activations import FAMILIES
from fused_act.backends.cuda import extension
from fused_act.dispatch import DTYPES
from tests import accuracy, host_kernels
from tests.cases import DEVICE, INTERPRET, Guarded, all_backends, all_dtypes, random
from tests.test_machine_code import BACKENDS as COMPILED
from tests.test_machine_code import CAPABILITIES, extension_kernels, skip_unless_counted

FUNCTIONS = {"prelu": fused_act.prelu, "learnable_swish": fused_act.swish}
WEIGHTS = {
    "prelu": (0.25, -0.5, 0.0, 1.0, 3.0),
    "learnable_swish": (1.0, -2.0, 0.0, 0.5, 8.0),
}
all_rows = pytest.mark.parametrize("row", FAMILIES["weighted"], ids=lambda row: row.name)
interpreted_or_gpu = pytest.mark.usefixtures("forced")

# What one element adds to the gradient of a weight, a sum in fp32, in ULP of fp32: for a 16-bit x,
# whose own ULP is 2^13 or more of them, and for fp32.
ADDED_LOW, ADDED_FULL = 256.0, 16.0


def truth(name, x, weight):
    """y, dy/dx and dy/dweight in float64."""
    if name == "prelu":
        positive = x > 0
        return (
            torch.where(positive, x, weight * x),
            torch.where(positive, torch.ones_like(x), weight),
            torch.where(positive, torch.zeros_like(x), x),
        )
    z = weight * x
    h = torch.exp(-z.abs() / 2)  # and x a factor at a time: its square may overflow
    u = x * h / (1 + h * h)
    return oracle.swish_forward(x, weight), oracle.swish_derivative(x, weight), u * u


class Host:
    """The loops of the CUDA kernels of one activation, on the host."""

    def __init__(self, library):
        self.library = library

    def sizes(self, x, weight):
        inner = x.stride(1) if weight.numel() > 1 else 0
        return [ctypes.c_int64(size) for size in (x.numel(), weight.numel(), inner)]

    def forward(self, x, weight, y):
        self.library.run_forward(
            DTYPES.index(x.dtype), *map(pointer, (x, weight, y)), *self.sizes(x, weight)
        )
        return y

    def backward(self, grad_output, x, weight, grad_input):
        """Returns the gradient of the weight; writes that of x."""
        sums = torch.zeros(x.numel() + weight.numel() + 2)
        shape = (ctypes.c_int64 * 3)()
        self.library.run_backward(
            DTYPES.index(x.dtype),
            *map(pointer, (grad_output, x, weight, grad_input, sums)),
            ctypes.c_int64(sums.numel()),
            *self.sizes(x, weight),
            shape,
        )
        count = shape[0] * shape[1] * shape[2]
        return sums[:count].reshape(*shape).sum((0, 2))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture(scope="session")
def weighted_libraries(tmp_path_factory):
    if INTERPRET:
        pytest.skip("the host build needs no interpreter, and is tested without it")
    if host_kernels.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder, root = tmp_path_factory.mktemp("weighted"), Path(__file__).parent
    include = Path(torch.__file__).parent / "include"
    builds = {}
    for row in FAMILIES["weighted"]:
        command = [
            host_kernels.COMPILER,
            *("-std=c++20", "-O2", "-shared", "-fPIC", f"-I{include}"),
            f"-DACTIVATION={row.pair.spelling}",
            str(root / "host_weighted.cpp"),
            *("-o", str(folder / f"{row.name}.so")),
        ]
        builds[row.name] = subprocess.Popen(command)
    assert not any(build.wait() for build in builds.values()), "a host build fails, see above"
    return {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in builds}


@pytest.fixture
def host_of(weighted_libraries):
    yield lambda row: Host(weighted_libraries[row.name])
    for library in weighted_libraries.values():
        library.set_errors(0, 0)


def twice(x):
    """As a batch of one, with a channel for each element, of two: so that rows have the weights."""
    return x.reshape(1, -1, 1).expand(1, -1, 2).contiguous()


def once(batch):
    """A gradient that only the first of the two has."""
    return torch.tensor([1.0, 0.0], dtype=batch.dtype, device=batch.device).expand_as(batch).clone()


def check_accuracy(row, x, weight, y, derivative, added, perturbed=False):
    """The gates of design and package on y and dy/dx; the above on what is added to dy/dweight."""
    # Gated as a Swish of that beta is, around the zero of its derivative and in its tail.
    case = SimpleNamespace(name=row.name.removeprefix("learnable_"), parameters=(weight,))
    exact = truth(row.name, x.double(), torch.tensor(weight).double())
    for kind, result, expected in zip(("forward", "derivative"), (y, derivative), exact):
        inside, tolerance = slice(None), accuracy.PERTURBED[kind] if perturbed else None
        if INTERPRET and x.dtype is torch.bfloat16:
            tiny, tolerance = torch.finfo(x.dtype).tiny, accuracy.INTERPRETED_BF16
            inside = ((x.abs() >= tiny) | (x == 0)) & ((expected.abs() >= tiny) | (expected == 0))
        accuracy.check(case, kind, x[inside], result[inside], tolerance, exact=expected[inside])
    assert not added.isnan().any()
    if INTERPRET and x.dtype is torch.bfloat16:  # it mangles subnormal x
        normal = x.abs() >= torch.finfo(x.dtype).tiny
        added, exact = added[normal], [each[normal] for each in exact]
    gate = ADDED_FULL if x.dtype is torch.float32 else ADDED_LOW
    assert oracle.ulp_error(added, exact[2], torch.float32).max() <= gate * (2 if perturbed else 1)


@all_rows
@all_dtypes
@pytest.mark.parametrize("errors", [(0, 0), (2, 1), (-2, -1)], ids=["exact", "up", "down"])
def test_functors_on_every_16_bit_input(row, dtype, errors, host_of):
    """And fp32 in every binade. With a weight for each element, its gradient is what that adds."""
    host = host_of(row)
    x = accuracy.inputs(dtype) if dtype.itemsize == 2 else accuracy.stratified_fp32(64)
    host.library.set_errors(*errors)
    for weight in WEIGHTS[row.name][: 2 if errors != (0, 0) else None]:
        batch, weights = twice(x), torch.full((x.numel(),), weight)
        y, derivative = torch.empty_like(batch), torch.empty_like(batch)
        host.forward(batch, weights, y)
        added = host.backward(once(batch), batch, weights, derivative)
        check_accuracy(row, x, weight, y[0, :, 0], derivative[0, :, 0], added, errors != (0, 0))


@all_rows
@all_backends
@all_dtypes
def test_every_16_bit_input(row, backend, dtype, monkeypatch):
    """Through the kernels, with a weight for each element; fp32 in every binade."""
    kernels = fused_act.dispatch.BACKENDS[backend].ready().kernels[row.name]
    if INTERPRET:  # it takes its time for a block, whatever its size
        from fused_act.backends.triton import weighted

        # A block of backward is twice as large, and Triton has none of more than 2^20.
        monkeypatch.setattr(weighted, "block_size", lambda dtype: 2**19)
    x = accuracy.inputs(dtype) if dtype.itemsize == 2 else accuracy.stratified_fp32(64)
    batch = twice(x).to(DEVICE)
    for weight in WEIGHTS[row.name]:
        weights = torch.full((x.numel(),), weight, device=DEVICE)
        y = kernels.forward(batch, weights)
        derivative, added = kernels.backward(once(batch), batch, weights)
        results = y[0, :, 0], derivative[0, :, 0], added
        check_accuracy(row, x, weight, *(result.cpu() for result in results))


# x and where the channels are; sizes around tiles, odd ones, one channel.
SHAPES = [
    *((), (1,), (5,), (4099,), (0,), (0, 4), (2, 0, 3), (3, 0)),
    *((7, 3), (33, 64), (130, 1000), (5, 1), (2, 3, 7), (2, 64, 49), (3, 5, 2)),
    *((2, 3, 4, 8), (1, 1, 40, 40), (2, 3, 32, 65), (1, 1000, 1, 1), (2, 64, 8, 8), (2, 2, 4097)),
]
PERMUTATIONS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x,
    "reversed": lambda x: (
        x.permute(tuple(range(x.dim()))[::-1]).contiguous().permute(tuple(range(x.dim()))[::-1])
    ),
    "gapped": lambda x: torch.stack([x, x], -1)[..., 0],
}
all_permutations = pytest.mark.parametrize("layout", PERMUTATIONS)


def shapes_and_dtypes(layout):
    """Every shape in a dtype, another one in each layout."""
    first = list(PERMUTATIONS).index(layout)
    return [(shape, DTYPES[(first + i) % 3]) for i, shape in enumerate(SHAPES)]


def inputs(shape, layout, dtype, per_channel, weight_dtype=torch.float32):
    x = PERMUTATIONS[layout](
        random(*shape, device=DEVICE).to(dtype)
        if shape
        else torch.randn((), device=DEVICE).to(dtype)
    )
    count = shape[1] if per_channel and len(shape) > 1 else 1
    return x, torch.rand(count, device=DEVICE).to(weight_dtype)


def check_gradients(row, x, weight, grad_output, y, grad_input, grad_weight):
    """Against float64 sums."""
    wide = weight.double().reshape([-1] + [1] * max(0, x.dim() - 2)) if x.dim() else weight.double()
    wide = wide.reshape(()) if weight.numel() == 1 else wide
    exact = truth(row.name, x.double(), wide)
    eps = torch.finfo(x.dtype).eps
    for result, expected in ((y, exact[0]), (grad_input, grad_output.double() * exact[1])):
        torch.testing.assert_close(result, expected.to(x.dtype), rtol=4 * eps, atol=4 * eps)
    added = grad_output.double() * exact[2]
    keep = [i for i in range(x.dim()) if i != 1]
    if weight.numel() == 1:
        total, size = added.sum().reshape(1), added.abs().sum().reshape(1)
    else:
        total, size = added.sum(keep), added.abs().sum(keep)
    # Rounding in fp32, of the terms and of sums in tiles.
    assert grad_weight.dtype is torch.float32
    assert ((grad_weight.double() - total).abs() <= 1e-5 * size + 1e-30).all()


@all_rows
@all_permutations
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per_channel"])
def test_host_loops(row, layout, per_channel, host_of):
    """Nothing but the result is written, and every element counts once, at every alignment."""
    host = host_of(row)
    for number, (shape, dtype) in enumerate(shapes_and_dtypes(layout)):
        x, weight = inputs(shape, layout, dtype, per_channel)
        if x.numel() == 0:
            continue
        dense = torch.empty_like(x).copy_(x)
        offset = number % 3
        memory = [Guarded(x.numel(), dtype, offset) for _ in range(4)]
        source, grad_output, y, grad_input = (
            one.inside.as_strided(dense.shape, dense.stride(), one.inside.storage_offset())
            for one in memory
        )
        source.copy_(x)
        grad_output.copy_(torch.randn_like(x))
        host.forward(source, weight, y)
        grad_weight = host.backward(grad_output, source, weight, grad_input)
        check_gradients(row, source, weight, grad_output, y, grad_input, grad_weight)
        for one in memory:
            one.assert_untouched_outside()


@all_rows
@all_backends
@all_permutations
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per_channel"])
def test_layouts_and_sums(row, backend, layout, per_channel, forced):
    """Strides as torch has them, sums as in float64, and twice the same bits."""
    kernels = fused_act.dispatch.BACKENDS[backend].ready().kernels[row.name]
    for shape, dtype in shapes_and_dtypes(layout):
        x, weight = inputs(shape, layout, dtype, per_channel)
        grad_output = torch.randn_like(x)
        y = kernels.forward(x, weight)
        grads = kernels.backward(grad_output, x, weight)
        assert y.stride() == grads[0].stride() == torch.empty_like(x).stride()
        check_gradients(row, x, weight, grad_output, y, *grads)
        again = kernels.backward(grad_output, x, weight)
        assert all(map(torch.equal, grads, again))


def test_offsets_beyond_32_bits(weighted_libraries):
    """Of rows as long as a tile, with a weight each, and of one weight."""
    library = weighted_libraries["prelu"]
    offset = ctypes.c_int64()
    for block in (2**21, 2**22 + 5, 2**29):
        for weights, inner in ((1, 0), (2**12, 1024)):
            sizes = [ctypes.c_int64(size) for size in (2**60, weights, inner)]
            library.place_of(*sizes, block, 0, ctypes.byref(offset))
            assert offset.value == block * 4096


@all_rows
def test_a_gradient_that_does_not_reach_the_weight_adds_nothing(row, host_of):
    host, x = host_of(row), torch.tensor([[3.0, 0.0]])
    grad_output = torch.tensor([[float("inf"), 1.0]])
    grad = host.backward(grad_output, x, torch.ones(1), torch.empty_like(x))
    expected = {"prelu": 0.0, "learnable_swish": float("inf")}[row.name]
    assert grad.tolist() == [expected]


@all_rows
@all_backends
def test_raw_ops_pass_opcheck(row, backend):
    namespace = getattr(torch.ops, f"fused_act_{backend}")
    fused_act.dispatch.BACKENDS[backend].ready()
    for layout, per_channel in itertools.product(PERMUTATIONS, (False, True)):
        x, weight = inputs((3, 4, 5), layout, torch.float32, per_channel)
        torch.library.opcheck(getattr(namespace, row.name).default, (x, weight))
        backward = getattr(namespace, f"{row.name}_backward").default
        torch.library.opcheck(backward, (torch.randn_like(x), x, weight))
        with pytest.raises(RuntimeError, match="has no derivative; call fused_act"):
            getattr(namespace, row.name)(x, weight.requires_grad_())


@all_rows
@all_backends
def test_raw_ops_refuse_what_kernels_cannot_take(row, backend):
    op = getattr(getattr(torch.ops, f"fused_act_{backend}"), row.name)
    fused_act.dispatch.BACKENDS[backend].ready()
    x = torch.randn(2, 3, 4, device=DEVICE)
    for weight, error, text in (
        (torch.ones(4, device=DEVICE), ValueError, r"shape \(1,\) or \(3,\)"),
        (torch.ones(3, 1, device=DEVICE), ValueError, r"got \(3, 1\)"),
        (torch.ones(3, device=DEVICE).double(), TypeError, "float32, got torch.float64"),
        (torch.ones(3, device="meta"), ValueError, "weight on"),
    ):
        with pytest.raises(error, match=text):
            op(x, weight)


@all_rows
@all_backends
@pytest.mark.parametrize("asked", ["x", "weight", "both"])
def test_gradients_that_are_asked_for(row, backend, asked, forced):
    """And second ones, as torch's."""
    function = FUNCTIONS[row.name]
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

    for ours, theirs in zip(derivatives(function), derivatives(row.torch_forward)):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    y = function(x, weight)
    y.backward(torch.ones_like(y))
    assert (x.grad is None) == (asked == "weight")
    assert (weight.grad is None) == (asked == "x")


@all_backends
def test_autocast_casts_both_as_torch_does(backend, forced):
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


@all_rows
@all_backends
def test_a_weight_of_no_dimension_and_one_with_gaps(row, backend, forced):
    x = torch.randn(3, 4, device=DEVICE)
    for weight in (torch.tensor(0.5, device=DEVICE), torch.rand(8, device=DEVICE)[::2]):
        weight.requires_grad_()
        y = FUNCTIONS[row.name](x, weight)
        expected = row.torch_forward(x, weight)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), weight)
        (theirs,) = torch.autograd.grad(expected.sum(), weight)
        torch.testing.assert_close(grad, theirs)


@all_rows
def test_fallback_is_torch_to_the_bit(row):
    for dtype, shape in itertools.product((torch.float32, torch.float64, torch.bfloat16), SHAPES):
        if DEVICE == "cuda" and dtype is not torch.float64:
            continue
        x, weight = inputs(shape, "contiguous", dtype, True, dtype)
        x.requires_grad_()
        weight.requires_grad_()
        y, expected = FUNCTIONS[row.name](x, weight), row.torch_forward(x, weight)
        assert torch.equal(y, expected)
        grads = (torch.autograd.grad(each.sum(), (x, weight)) for each in (y, expected))
        assert all(map(torch.equal, *grads))


def test_modules_are_torchs():
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


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: fused_act.swish(x, torch.ones(4)),
            ValueError,
            r"shape \(1,\) or \(3,\) .* got \(4,\)",
        ),
        (lambda x: fused_act.swish(x, torch.ones(3, 1)), ValueError, r"got \(3, 1\)"),
        (lambda x: fused_act.swish(x, torch.ones(3).double()), TypeError, "got torch.float64"),
        (lambda x: fused_act.swish(x.int(), torch.ones(3)), TypeError, "int32"),
        (lambda x: fused_act.swish(x, torch.ones(3), True), ValueError, "expected inplace=False"),
        (lambda x: fused_act.Swish(inplace=True, learnable=True), ValueError, "inplace=False"),
        (lambda x: fused_act.Swish(num_parameters=3), ValueError, "expected num_parameters=1"),
        (lambda x: fused_act.prelu(x, torch.ones(4)), RuntimeError, "parameter numbers = 4"),
        (lambda x: fused_act.prelu(x, torch.ones(3, 1)), RuntimeError, "scalar or 1D tensor"),
        (lambda x: fused_act.prelu(x.half(), torch.ones(3)), RuntimeError, "Type promoting"),
        (lambda x: fused_act.prelu(x[0, 0], torch.ones(3)), RuntimeError, "channel size = 1"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", *([] if not INTERPRET else ["triton"])])
def test_bad_input(call, error, text, backend):
    with fused_act.use_backend(backend), pytest.raises(error, match=text) as raised:
        call(torch.randn(2, 3, 4))
    assert "\n" not in str(raised.value)


@all_rows
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per_channel"])
def test_compiles_into_one_graph_of_any_batch(row, per_channel):
    compiled = torch.compile(FUNCTIONS[row.name], fullgraph=True, dynamic=True)
    for batch in (3, 5):
        x, weight = inputs((batch, 4, 6), "contiguous", torch.float32, per_channel)
        x.requires_grad_()
        weight.requires_grad_()
        y, expected = compiled(x, weight), row.torch_forward(x, weight)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(each.sum(), (x, weight)) for each in (y, expected)]
        torch.testing.assert_close(*grads)


@all_rows
@all_backends
def test_a_forced_backend_is_one_op_of_the_graph(row, backend, forced):
    seen = []

    def keep(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, weight = inputs((3, 4, 6), "contiguous", torch.float32, True)
    y = torch.compile(FUNCTIONS[row.name], fullgraph=True, backend=keep)(x, weight)
    assert f"fused_act_{backend}.{row.name}.default" in seen
    torch.testing.assert_close(y, row.torch_forward(x, weight))


@all_rows
def test_scripted_traced_exported_and_symbolic(row):
    module = {"prelu": fused_act.PReLU(3), "learnable_swish": fused_act.Swish(learnable=True)}[
        row.name
    ]
    x = torch.randn(2, 3, 4)
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


# Instructions for an element on sm_90: forward and backward by row, then both by column. Memory
# speed on an H200 allows 31 and 47 in 16 bits, in fp32 twice that.
BUDGETS = {
    ("triton", 16): {"prelu": (12, 16, 13, 18), "learnable_swish": (16, 32, 17, 35)},
    ("cuda", 16): {"prelu": (8, 17, 9, 19), "learnable_swish": (13, 32, 14, 35)},
    ("triton", 32): {"prelu": (17, 18, 18, 20), "learnable_swish": (36, 61, 37, 64)},
    ("cuda", 32): {"prelu": (11, 22, 11, 21), "learnable_swish": (30, 65, 30, 64)},
}

REGISTERS = {
    "triton": {"forward": 40, "backward": 80},
    "cuda": {"forward": 64, "backward": 64},
}
# Accesses of a thread to spilled registers in backward, on the GPU that has most: by backend, row,
# and whether columns have the weights. An H200 took longer without them, for fewer threads go with
# that (benchmarks/TUNING.md).
SPILLS = {
    ("triton", "learnable_swish", True): 8,
    ("cuda", "learnable_swish", True): 24,
    ("cuda", "prelu", True): 4,
    ("cuda", "prelu", False): 4,
}


@functools.cache
def compiled(backend, row, direction, by_column, dtype, capability):
    if backend == "triton":
        kernel = machine_code.compile_triton_weighted(row, direction, by_column, dtype, capability)
        return machine_code.code_of(kernel, row.name, dtype)
    kernels = extension_kernels(capability)
    return machine_code.cuda_weighted_kernel(kernels, row, direction, by_column, dtype)


@pytest.mark.skipif(extension() is None, reason="needs the CUDA extension")
@all_rows
@all_dtypes
@pytest.mark.parametrize("by_column", [False, True], ids=["by_row", "by_column"])
def test_narrow_accesses_spill_little(row, by_column, dtype):
    """What rows of odd lengths run, whose threads have more runs and so more weights and sums."""
    kernels = extension_kernels(90)
    for direction, width in itertools.product(("forward", "backward"), (1, 2, 4)):
        if width * dtype.itemsize == 16:
            continue
        variant = f"{width}, {str(by_column).lower()}, fused_act::{row.pair.spelling}"
        variant += f", {machine_code.CUDA_TYPES[dtype]}"
        (name,) = (name for name in kernels if f"weighted::{direction}_kernel<{variant}>" in name)
        local = [one for one in kernels[name].instructions if one.opcode[:3] in ("LDL", "STL")]
        assert len(local) <= 64
        assert kernels[name].registers <= 128


@all_rows
@all_dtypes
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("by_column", [False, True], ids=["by_row", "by_column"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_machine_code(backend, row, direction, by_column, dtype):
    """Few instructions, accesses of 16 bytes, few spills or none."""
    if INTERPRET:
        pytest.skip("machine code needs no interpreter, and is tested without it")
    skip_unless_counted(backend)
    # Triton takes seconds to compile one.
    for capability in CAPABILITIES[backend] if backend == "cuda" else (90,):
        kernel = compiled(backend, row, direction, by_column, dtype, capability)
        spills = SPILLS.get((backend, row.name, by_column), 0) if direction == "backward" else 0
        assert kernel.spills() <= spills
        assert kernel.registers <= REGISTERS[backend][direction]
        loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
        inputs = 1 if direction == "forward" else 2
        assert 128 * loads.count(128) >= 8 * 32 * inputs
        assert 128 * stores.count(128) >= 8 * 32  # the path of a cut tile has wide ones too
        # Of 4 bytes are weights, and the sums for them.
        assert {*loads, *stores} <= {128, 64, 32}
    kernel = compiled(backend, row, direction, by_column, dtype, 90)
    budget = BUDGETS[backend, 8 * dtype.itemsize][row.name][
        2 * by_column + (direction != "forward")
    ]
    assert kernel.per_element() <= budget
