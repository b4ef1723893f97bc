"""The host path: a call in C++ does what it does in Python, and what torch's own op does.

The ops of csrc/ run on CPU tensors, see shared/cpu_ops.py. test_autograd.py runs its programs over
both ways, too. In the interpreter all tests of kernels go through C++ where the host extension is,
and `make test` runs them again with --without-host-extension.
"""

import contextlib
import copy
import functools
import gc
import io
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.autograd import graph
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_act
from fused_act import MishFunction, dispatch, extensions, host
from fused_act.dispatch import DTYPES
from tests.shared import compiling, cpu_ops
from tests.shared.cases import (
    ALL_CASES,
    DEVICE,
    ON_HOST,
    all_backends,
    all_dtypes,
    all_rows,
    elementwise_rows,
    of_family,
)

pytestmark = [
    pytest.mark.skipif(compiling.COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(isinstance(host.extension(), str), reason="needs the host extension"),
]
both_ways = pytest.mark.parametrize("way", ON_HOST)
rows_in_place_or_not = pytest.mark.parametrize(
    ("case", "inplace"),
    [
        pytest.param(case, inplace, id=f"{case}{'-inplace' if inplace else ''}")
        for case in ALL_CASES
        for inplace in (False, True)[: 1 + case.has_inplace]
    ],
)


@pytest.fixture
def calls():
    """Forces the ops of csrc/ in C++; fails unless C++ has taken a call."""
    with cpu_ops.in_cpp() as counter:
        yield counter
    assert counter.taken > 0


@pytest.fixture
def way_to_ops(way):
    with ON_HOST[way]():
        yield way


def values(*shape, dtype=torch.float32):
    return (4 * torch.randn(shape or (3, 5))).to(dtype).requires_grad_()


def assert_same(ours, theirs):
    """Bits, signs of zeros, and strides; of None that it is None."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        if b is None:
            assert a is None
            continue
        assert a.dtype is b.dtype
        assert a.stride() == b.stride()
        bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
        assert torch.equal(a.detach().clone().view(bits), b.detach().clone().view(bits))


LAYOUTS = {
    "contiguous": lambda x: x * 1,
    "transposed": lambda x: (x * 1).t(),
    "gapped": lambda x: (x * 1)[:, ::2],
    "offset": lambda x: (x * 1).flatten()[1:],
    "row": lambda x: (x * 1)[1],
    "expanded": lambda x: (x * 1).expand(2, 6, 8),
    "empty": lambda x: (x * 1)[:0],
    "scalar": lambda x: (x * 1)[0, 0],
    "channels_last": lambda x: (x * 1).reshape(2, 3, 4, 2).to(memory_format=torch.channels_last),
}
GRADIENTS = {
    "dense": lambda y: torch.linspace(-2, 2, y.numel()).reshape(y.shape).to(y.dtype),
    "expanded": lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
    "reversed": lambda y: (
        torch.linspace(-2, 2, y.numel())
        .to(y.dtype)
        .reshape(y.shape[::-1])
        .permute(tuple(range(y.dim()))[::-1])
    ),
}


def all_of(case, inplace, dtype, layout, gradient):
    """y, its strides and version, the first and the second derivative, without and with a graph."""
    torch.manual_seed(0)
    leaf = values(6, 8, dtype=dtype)
    x = LAYOUTS[layout](leaf)
    x = x.clone() if x._is_view() and inplace else x
    without_graph = x.detach().clone()
    z = case.function(without_graph, inplace=inplace)
    assert (z is without_graph) is inplace
    version = x._version
    y = case.function(x, inplace=inplace)
    assert (y is x) is inplace
    versions = (x._version - version, without_graph._version)
    grad_output = GRADIENTS[gradient](y)
    (first,) = torch.autograd.grad(y, leaf, grad_output, retain_graph=True)
    (kept,) = torch.autograd.grad(y, leaf, grad_output, create_graph=True)
    (second,) = torch.autograd.grad(kept.sum(), leaf, allow_unused=True)
    return versions, [z, y, first, kept, second]


@rows_in_place_or_not
@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_in_python_bit_for_bit(case, inplace, dtype, layout):
    if case.row.family == "mirrored" and layout in ("offset", "row", "scalar"):
        layout = "gapped"  # the others have no dimension 1
    for gradient in GRADIENTS:
        if inplace and layout == "expanded":
            layout = "gapped"  # what is expanded must not be written
        with cpu_ops.in_cpp() as counter:
            versions, ours = all_of(case, inplace, dtype, layout, gradient)
        assert (counter.taken, counter.declined) == (2, 0)
        with cpu_ops.in_python():
            expected_versions, theirs = all_of(case, inplace, dtype, layout, gradient)
        assert_same(ours, theirs)
        assert versions == expected_versions == (int(inplace), int(inplace))


@rows_in_place_or_not
def test_derivatives_to_the_third(case, inplace, calls):
    results = []
    for function in (case.function, case.torch_function):
        torch.manual_seed(0)
        leaf = values()
        y = function(leaf * 1, inplace=inplace)
        found, total = [], (y**3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
            found.append(gradient)
            total = (gradient**2).sum()
        results.append(found)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


weighted_rows = of_family("weighted")
WEIGHTS = {
    "scalar": lambda: values(1)[0],
    "one": lambda: values(1),
    "channels": lambda: values(6),
    "gapped": lambda: values(12)[::2],
    "expanded": lambda: values(1).expand(6),
    "of the dtype of x": lambda: values(6, dtype=torch.bfloat16),
}


@weighted_rows
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocasts", [False, True], ids=["", "autocast"])
def test_weights_as_in_python_bit_for_bit(case, make, dtype, autocasts):
    """Also where only one of both gradients is wanted, or only one of both requires grad."""
    results, counts = [], []
    for way in (cpu_ops.in_cpp, cpu_ops.in_python):
        torch.manual_seed(0)
        x, weight, found = values(5, 6, 4, dtype=dtype), make(), []
        with way() as counter, torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            for inputs in ((x, weight), (x, weight.detach()), (x.detach(), weight)):
                try:
                    y = case.facts.function(*inputs)
                except (RuntimeError, TypeError) as error:
                    found.append(str(error))
                    continue
                needed = [each for each in inputs if each.requires_grad]
                for wanted in (needed, *([each] for each in needed)):
                    grads = torch.autograd.grad(y, wanted, y.cos(), create_graph=True)
                    total = sum((grad.float() ** 2).sum() for grad in grads)
                    second = torch.autograd.grad(
                        total, wanted, allow_unused=True, retain_graph=True
                    )
                    first = torch.autograd.grad(y, wanted, y.cos(), retain_graph=True)
                    found += [y, *first, *grads, *second]
        results.append(found)
        counts.append(counter and (counter.taken, counter.declined))
    fits = (
        (autocasts and case.row.autocasts)
        or weight.dtype is dtype
        or (case.row.takes_fp32 and weight.dtype is torch.float32)
    )
    assert counts[0] == ((3, 0) if fits else (0, 3))
    for ours, theirs in zip(*results, strict=True):
        if isinstance(theirs, str):
            assert ours == theirs
        else:
            assert_same([ours], [theirs])


@weighted_rows
def test_weights_that_python_decides_about(case):
    x = values(5, 6)
    of_others = {
        "too many": values(5),
        "a matrix": values(6, 1),
        "double": values(6).double(),
        "sparse": values(6).detach().to_sparse(),
        "negated": torch._neg_view(values(6).detach()),
        "meta": torch.empty(6, device="meta"),
    }
    for name, weight in of_others.items():
        with cpu_ops.in_cpp() as counter:
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                case.facts.function(x, weight)
            assert (counter.taken, counter.declined) == (0, 1), name
    path = cpu_ops.CSRC.paths[case.name]
    assert path(x, True, (values(6),)) is NotImplemented
    for arguments in ((), (1.0,), (None,), (values(6), values(6))):
        assert path(x, False, arguments) is NotImplemented


@weighted_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_a_weight_with_a_tangent_or_written_later(case, way):
    x, weight = values(5, 6), values(6)
    with forward_ad.dual_level(), contextlib.suppress(NotImplementedError):
        dual = forward_ad.make_dual(weight, torch.ones(6))
        assert forward_ad.unpack_dual(case.facts.function(x, dual)).tangent is not None
    y = case.facts.function(x, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@of_family("mirrored")
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_differentiable_gradients_of_rows_of_one_element(case, way):
    """A row of the mask is a byte, of which such a row of x has one bit."""
    results = []
    for function in (case.row.activate, case.row.torch_forward):
        x = torch.tensor([[-1.0], [2.0], [-3.0]], requires_grad=True)
        y = function(x, 1)
        grad_output = torch.arange(1.0, 7.0).reshape(3, 2)
        results += torch.autograd.grad(y, x, grad_output, create_graph=True)
    assert torch.equal(*results)


@weighted_rows
def test_hooks_that_compiled_autograd_does_not_take(case, calls):
    y = case.facts.function(values(5, 6), values(6))
    y.grad_fn.register_hook(lambda outputs, grads: None)
    compiled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
    with compiled, pytest.raises(NotImplementedError, match=r"FunctionBackward has hooks"):
        y.sum().backward(create_graph=True)


@of_family("mirrored")
def test_dimensions_that_python_decides_about(case):
    x, path = values(3, 5), cpu_ops.CSRC.ready().paths[case.name]
    for dim in (-3, 2, 2**70, -(2**70), True, 1.0, None, torch.tensor(1)):
        assert path(x, False, (dim,)) is NotImplemented
    assert path(torch.tensor(1.0), False, (0,)) is NotImplemented
    with cpu_ops.in_cpp(), pytest.raises(IndexError):
        case.facts.function(x, 2)
    for dim in (-2, -1, 0, 1):
        assert torch.equal(path(x, False, (dim,)), case.row.torch_forward(x, dim))


class Cut(torch.autograd.Function):
    """Gives no gradient to what comes before it."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad_output):
        return None


@rows_in_place_or_not
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_an_undefined_gradient_stays_undefined(case, way, inplace):
    for function in (case.function, case.torch_function):
        x = values()
        y = Cut.apply(function(x * 1, inplace=inplace))
        assert torch.autograd.grad(y.sum(), x, allow_unused=True) == (None,)


@all_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_versions_and_freed_graphs(case, way):
    x = values() * 1
    y = case.function(x)
    (x if case.saves == "x" else y).add_(1)
    if case.saves == "mask":
        y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    y = case.function(values())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        assert y.grad_fn.saved_tensors


@elementwise_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
@pytest.mark.parametrize(
    "make",
    [
        lambda: values(),
        lambda: values()[0],
        lambda: values().unbind()[0],
        lambda: values().detach().expand(2, 3, 5),
        torch.inference_mode()(lambda: torch.randn(3, 5)),
    ],
    ids=["leaf", "view of a leaf", "one of several views", "expanded", "inference tensor"],
)
def test_what_must_not_be_written_is_not(case, way, make):
    messages = []
    for function in (case.function, case.torch_function):
        torch.manual_seed(0)
        x = make()
        before = x.detach().clone()
        with pytest.raises(RuntimeError) as caught:
            function(x, inplace=True)
        messages.append(str(caught.value).partition("\n")[0])
        # torch raises for an inference tensor when it has written it.
        assert x.is_inference() or torch.equal(x.detach(), before)
    assert messages[0].endswith(messages[1])


@elementwise_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_what_was_saved_before_a_write_is_found_changed(case, way):
    x = values() * 1
    squared = x**2
    case.function(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@all_rows
def test_inference_mode(case, calls):
    with torch.inference_mode():
        x = torch.randn(5)
        assert case.function(x).is_inference()
        case.function(x, inplace=True)
    ordinary = torch.randn(5)
    with torch.inference_mode():
        case.function(ordinary)
        case.function(ordinary, inplace=True)
    assert calls.declined == 0
    assert ordinary._version == case.has_inplace


@rows_in_place_or_not
def test_hooks_run_where_autograd_is_on(case, inplace, calls):
    """A hook that detaches what it packs would lose versions where they are off."""
    seen = []

    def pack(tensor):
        seen.append([torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in KEYS])
        return tensor

    x = values()
    source = x * 1
    with graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = case.function(source, inplace=inplace)
    count = 1 + (case.saves == "mask" or case.row.family == "weighted")
    assert seen == [[False] * len(KEYS)] * count
    y.sum().backward()
    refused = graph.saved_tensors_hooks(lambda tensor: 1 / 0, lambda tensor: tensor)
    with refused, pytest.raises(ZeroDivisionError):
        case.function(values())
    with graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: 1 / 0):
        y = case.function(values())
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()


KEYS = ("ADInplaceOrView", "AutogradCPU")


@elementwise_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_hooks_of_a_tensor_that_is_then_written(case, way):
    results = []
    for function in (case.function, case.torch_function):
        torch.manual_seed(0)
        seen = []
        leaf = values()
        x = leaf * 1
        x.retain_grad()
        x.register_hook(lambda grad, seen=seen: seen.append(grad.clone()) or grad * 2)
        y = function(x, inplace=True)
        y.register_hook(lambda grad, seen=seen: seen.append(grad.clone()) or grad * 3)
        y.sum().backward()
        results.append([*seen, x.grad, leaf.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def gradient_in_a_child(x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(fused_act.mish(leaf).sum(), leaf)[0]


def test_in_a_forked_process(calls):
    x = torch.randn(5)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(gradient_in_a_child, (x,)).get(60)
    assert torch.equal(found, gradient_in_a_child(x))


@rows_in_place_or_not
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_what_a_node_tells(case, way, inplace):
    x = values()
    y = case.function(x * 1, inplace=inplace)
    node = y.grad_fn
    function = case.row.InplaceFunction if inplace else case.row.Function
    assert node.name() == f"{function.__name__}Backward"
    assert f"grad_fn=<{node.name()}>" in repr(y)
    assert node.name() in repr(node)
    assert isinstance(node, graph.Node)
    assert node is y.grad_fn
    assert node._forward_cls is function
    assert node.kernels is cpu_ops.CSRC.kernels[case.name]
    assert getattr(node, "parameters", ()) == case.parameters
    if case.saves == "mask":
        assert (node.shape, node.stride) == ((3, 5), (5, 1))
    is_weighted = case.row.family == "weighted"
    kept, *beside = node.saved_tensors
    shapes = [(0,)] * (case.saves == "mask") + [(1,)] * is_weighted
    assert [each.shape for each in beside] == shapes
    assert kept.dtype is (torch.uint8 if case.saves == "mask" else torch.float32)
    node.metadata["key"] = "value"
    assert y.grad_fn.metadata["key"] == "value"
    count = 1 + is_weighted + (way == "csrc-python" and case.saves == "mask")
    assert len(node._raw_saved_tensors) == count


@all_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_anomaly_mode_names_the_node(case, way):
    with torch.autograd.detect_anomaly():
        y = case.function(values())
        with pytest.raises(
            RuntimeError, match=f"{case.row.spelling}FunctionBackward' returned nan"
        ):
            y.backward(torch.full_like(y, float("nan")))


class OfTensors(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **kwargs or {})


class OfFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


UNUSUAL = {
    "double": lambda: torch.randn(5, dtype=torch.double),
    "meta": lambda: torch.randn(5, device="meta"),
    "integers": lambda: torch.arange(5),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "negated": lambda: torch._neg_view(torch.randn(5)),
    "subclass": lambda: torch.randn(5).as_subclass(Subclass),
    "number": lambda: 1.0,
    "none": lambda: None,
}
SURROUNDINGS = {
    "dispatch mode": OfTensors,
    "function mode": OfFunctions,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
    "fake tensors": torch._subclasses.fake_tensor.FakeTensorMode,
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_python_decides_about_unusual_tensors(make):
    with cpu_ops.in_cpp() as counter:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError):
            fused_act.mish(make())
        assert (counter.taken, counter.declined) == (0, 1)


@pytest.mark.parametrize("context", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_python_decides_in_unusual_surroundings(context):
    x = values()
    with cpu_ops.in_cpp() as counter:
        with context(), contextlib.suppress(RuntimeError, TypeError):
            fused_act.mish(torch.empty(5) if "Fake" in str(context) else x)
        assert (counter.taken, counter.declined) == (0, 1)


def test_what_is_no_bool_or_float_is_pythons(calls):
    fused_act.mish(torch.randn(5), inplace=1)
    assert calls.declined == 1
    fused_act.mish(torch.randn(5))
    path = cpu_ops.CSRC.paths["swish"]
    for arguments in ((), (False,), (False, 1.0), (False, (1,)), (False, ("1",)), (False, ())):
        assert path(torch.randn(5), *arguments) is NotImplemented
    assert path(torch.randn(5), False, (1.0, 1.0)) is NotImplemented


def test_a_default_device_changes_nothing(calls):
    with torch.device("cpu"):
        fused_act.mish(torch.randn(5))
    assert (calls.taken, calls.declined) == (1, 0)


@all_rows
def test_forward_mode(case, calls):
    """A dual tensor is torch's; so is a gradient that has a tangent, of a graph made before."""
    x, tangent = values().detach(), torch.randn(3, 5)
    results = []
    for function in (case.function, case.torch_function):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            found = [forward_ad.unpack_dual(function(dual)).tangent]
            ones = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2))
            with contextlib.suppress(NotImplementedError):
                (grad,) = torch.autograd.grad(y, leaf, ones)
                found.append(forward_ad.unpack_dual(grad).tangent)
        results.append(found)
    assert (calls.taken, calls.declined) == (1, 1)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@all_rows
def test_a_graph_of_before_is_differentiated_in_a_batch(case, calls):
    x = values(5)
    results = []
    for function in (case.function, case.torch_function):
        y = function(x)
        results += torch.autograd.grad(y, x, torch.eye(y.numel()), is_grads_batched=True)
    torch.testing.assert_close(*results)


@rows_in_place_or_not
@both_ways
@pytest.mark.usefixtures("way_to_ops")
@pytest.mark.parametrize("in_forward", [False, True], ids=["in backward", "in forward"])
def test_checkpoint_whose_passes_go_different_ways(case, way, inplace, in_forward):
    """One pass is under a mode, which Python takes: it saves as many tensors, and of one shape."""
    results = []
    for function in (case.function, case.torch_function):
        torch.manual_seed(0)
        x = values()
        with OfTensors() if in_forward else contextlib.nullcontext():
            run = functools.partial(two_activations, function, inplace)
            y = checkpoint(run, x, use_reentrant=False)
        with contextlib.nullcontext() if in_forward else OfTensors():
            y.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


def two_activations(function, inplace, x):
    y = function((function(x * 1, inplace=inplace) * 2).sin())
    return y.sin()


@all_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_gradients_in_a_batch_with_tangents(case, way):
    results = []
    for function in (case.function, case.torch_function):
        torch.manual_seed(0)
        x = values(4)
        y = function(x * 1)
        with forward_ad.dual_level():
            grads = torch.eye(y.numel())
            grads = forward_ad.make_dual(grads, torch.ones_like(grads))
            try:
                (jacobian,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
                results.append(forward_ad.unpack_dual(jacobian).tangent)
            except NotImplementedError as error:
                results.append(str(error).partition("because")[0])
    ours, theirs = results
    if isinstance(theirs, str):
        assert isinstance(ours, str)
    else:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["mish", "relu6", "tanh"])
def test_a_graph_that_another_thread_frees(name, calls):
    """Either thread finds the graph or learns that it is gone."""
    errors = []

    def differentiate(y, x, barrier, create_graph):
        barrier.wait()
        try:
            options = {"create_graph": create_graph, "retain_graph": False}
            torch.autograd.grad(y, x, torch.ones(64), **options)
        except RuntimeError as error:
            if "second time" not in str(error):
                errors.append(error)

    for _ in range(300):
        x, barrier = values(64), threading.Barrier(2)
        y = getattr(fused_act, name)(x)
        threads = [
            threading.Thread(target=differentiate, args=(y, x, barrier, create_graph))
            for create_graph in (False, True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_node_whose_hook_raised_says_so():
    x = values() * 1
    refused = graph.saved_tensors_hooks(lambda tensor: 1 / 0, lambda tensor: tensor)
    with cpu_ops.in_cpp(), refused, pytest.raises(ZeroDivisionError):
        fused_act.relu6(x, inplace=True)
    with pytest.raises(
        RuntimeError, match=r"ReLU6\w*Backward saved nothing, because a hook raised"
    ):
        x.sum().backward()


@all_rows
def test_a_mode_sees_the_op_in_backward(case, calls):
    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names = (*self.names, str(op))
            return op(*args, **kwargs or {})

    y = case.function(values())
    with Seen() as seen:
        y.sum().backward()
    assert [name for name in seen.names if name.startswith(f"fused_act_csrc.{case.name}_backward")]


@all_rows
@both_ways
@pytest.mark.usefixtures("way_to_ops")
def test_threads_share_a_graph(case, way):
    """Backward, second derivatives and what a node tells, at once: nobody waits for ever."""
    x = values(64)
    hooks = graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor * 1)
    with hooks if case.saves == "x" else contextlib.nullcontext():
        y = case.function(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    errors = []

    def work(create_graph):
        try:
            for _ in range(50):
                options = {"retain_graph": True, "create_graph": create_graph}
                (found,) = torch.autograd.grad(y.sum(), x, **options)
                torch.testing.assert_close(found.detach(), expected)
                assert y.grad_fn.saved_tensors
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors


class Marker:
    pass


@rows_in_place_or_not
def test_no_cycle_keeps_a_graph(case, inplace, calls):
    """With the collector off, what hangs at a node goes with the last reference to the output."""
    gc.collect()
    gc.disable()
    try:
        for use in ("nothing", "saved tensors", "backward", "create_graph"):
            x = values(8)
            y = case.function(x * 1, inplace=inplace)
            marker = Marker()
            gone = weakref.ref(marker)
            y.grad_fn.metadata["marker"] = marker
            del marker
            if use == "saved tensors":
                assert y.grad_fn.saved_tensors
                assert y.grad_fn._raw_saved_tensors
            if use == "backward":
                y.sum().backward()
            if use == "create_graph":
                torch.autograd.grad(y.sum(), x, create_graph=True)
            del y
            assert gone() is None, use
    finally:
        gc.enable()


@pytest.mark.full
@all_rows
def test_memory_stays_flat(case, calls):
    x = values(1 << 10)

    def steps(count):
        for _ in range(count):
            y = case.function(x * 2)
            torch.autograd.grad((y * case.function(x * 1, inplace=True)).sum(), x)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    steps(500)
    before = resident()
    steps(10_000)
    assert resident() - before < 2**20  # one tensor kept a step would be 40 MB


def test_a_node_keeps_its_backend():
    x = values()
    with cpu_ops.in_cpp():
        y = fused_act.mish(x)
    expected = torch.autograd.grad(fused_act.mish(x), x, torch.ones(3, 5))[0]
    with fused_act.use_backend("torch"):
        assert y.grad_fn.kernels is cpu_ops.CSRC.kernels["mish"]
        torch.testing.assert_close(torch.autograd.grad(y, x, torch.ones(3, 5))[0], expected)


@all_backends
def test_kernels_are_called_in_cpp(backend):
    x = torch.randn(5, device=DEVICE, requires_grad=True)
    with fused_act.use_backend(backend), cpu_ops.counted(dispatch.BACKENDS[backend]) as counter:
        fused_act.mish(x).sum().backward()
        fused_act.swish(x.detach(), 1.702, inplace=True)
    assert (counter.taken, counter.declined) == (2, 0)


def test_auto_takes_the_settled_backend_and_leaves_the_rest_to_torch(monkeypatch):
    x = torch.randn(5)
    monkeypatch.setattr(dispatch, "settled", dispatch.settled)
    monkeypatch.setattr(dispatch, "BACKENDS", {"csrc": cpu_ops.CSRC, **dispatch.BACKENDS})
    with cpu_ops.counted(cpu_ops.CSRC) as counter:
        fused_act.mish(x)
        assert counter.taken == 0  # the first CUDA tensor settles it
        dispatch.automatic.__wrapped__()
        fused_act.mish(x)
        assert (counter.taken, counter.declined) == (1, 0)
        assert torch.equal(fused_act.mish(x.double()), nn.functional.mish(x.double()))
        with fused_act.use_backend("torch"):
            fused_act.mish(x)
        assert (counter.taken, counter.declined) == (1, 1)


def test_a_path_lacks_no_op():
    kernels = cpu_ops.CSRC.ready().kernels["mish"]
    for field in ("forward_out", "backward"):
        with pytest.raises(RuntimeError, match=r"Mish.*FunctionBackward: an op is missing"):
            host.make_path(
                host.extension(), MishFunction.row, kernels._replace(**{field: None}), cpu_ops.CSRC
            )


def test_modules_are_copied_and_pickled(calls):
    model = nn.Sequential(nn.Linear(5, 5), fused_act.Mish(), fused_act.ReLU6(inplace=True))
    x = torch.randn(3, 5)
    expected = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    others.append(torch.load(stream, weights_only=False))
    assert all(torch.equal(other(x), expected) for other in others)
    assert copy.deepcopy(fused_act.MishFunction.row).name == "mish"


def test_the_profiler_names_op_and_node(calls):
    with torch.profiler.profile() as profile:
        fused_act.mish(values()).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"fused_act_csrc::mish", "fused_act_csrc::mish_backward"} <= names
    assert "MishFunctionBackward" in names


def test_a_long_chain_is_freed(calls):
    x = values(1)
    y = x
    for _ in range(100_000):
        y = fused_act.relu6(y)
    del y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_leaves_the_dtype(dtype, calls):
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_act.mish(values(dtype=dtype)).dtype is dtype


# Installs without a host extension for this torch: `python -m fused_act` says why, nothing warns.


def nothing(folder, extension):
    extension.unlink()


def for_another_torch(folder, extension):
    name = extension.name.replace(extensions.host_name(), "_host_torch_2_14_0_0123456789ab")
    extension.rename(extension.with_name(name))


def for_another_python(folder, extension):
    extension.rename(
        extension.with_name(f"{extensions.host_name()}.cpython-39-x86_64-linux-gnu.so")
    )


def truncated(folder, extension):
    extension.write_bytes(extension.read_bytes()[:4096])


def broken(folder, extension):
    command = [compiling.COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(extension)]
    source = "void missing(); void *needed = missing;"
    subprocess.run(command, input=source, text=True, check=True)


def left_out(folder, extension):
    extension.unlink()
    (folder / "left_out_host.txt").write_text("there is no C++ compiler")


CURE = "; where a C++ compiler is, reinstall with `pip install --no-build-isolation .`"
WITHOUT = {
    nothing: "this install has no host extension",
    for_another_torch: "built for torch 2.14.0, this is torch ",
    for_another_python: "built for another Python than this",
    truncated: "the host extension is truncated",
    broken: "the host extension does not load (",
    left_out: "the build left the host extension out: there is no C++ compiler",
}


USE = """
import fused_act, torch
fused_act.mish(torch.randn(5, requires_grad=True)).sum().backward()
"""


@pytest.mark.full
@pytest.mark.parametrize("breaks", WITHOUT, ids=lambda breaks: breaks.__name__)
def test_without_a_host_extension_for_this_torch(tmp_path, breaks):
    folder = tmp_path / "fused_act"
    ignored = shutil.ignore_patterns("_C.*", "_host_*", "__pycache__")
    shutil.copytree(Path(fused_act.__file__).parent, folder, ignore=ignored)
    extension = Path(shutil.copy(host.extension().__file__, folder))
    breaks(folder, extension)
    for code in (["-c", USE], ["-m", "fused_act"]):
        result = subprocess.run(
            [sys.executable, "-W", "error", *code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    (said,) = (line for line in result.stdout.splitlines() if line.startswith("host path"))
    assert said.startswith(f"host path  Python: {WITHOUT[breaks]}")
    assert said.endswith(CURE)
