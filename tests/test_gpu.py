"""What only a GPU can show: streams, graph capture, memory, devices, more than 2^31 elements."""

import concurrent.futures
import gc
import subprocess
import sys
import textwrap

import pytest
import torch

import fused_act
from tests.shared import accuracy
from tests.shared.cases import CASES, all_backends, all_dtypes, all_rows, elementwise_rows
from tests.shared.layouts import random

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("forced")]

one_case_with_each_saving = pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)


def forward_backward(case, x, grad_output):
    """y and grad_input, both without a graph."""
    x = x.detach().requires_grad_()
    y = case.function(x)
    return y.detach(), torch.autograd.grad(y, x, grad_output)[0]


@all_rows
def test_auto_takes_a_kernel(case):
    x = torch.randn(3, device="cuda", requires_grad=True)
    # By the node's own name: the type of a node that the host extension makes has no name.
    name = case.function(x).grad_fn.name()
    assert name == f"{case.row.spelling}FunctionBackward"


@all_rows
@all_backends
def test_current_stream(case, backend):
    x = torch.randn(2**20, device="cuda")
    expected = case.function(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        y = case.function(late)
    stream.synchronize()
    assert torch.equal(y, expected)


@one_case_with_each_saving
@all_backends
def test_four_streams_at_once(case, backend):
    """1,000 calls, forward and backward, a stream after the other: the bits of a serial run."""
    inputs = [random(4099, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    weights = [torch.randn_like(x) for x in inputs]
    expected = [forward_backward(case, x, weight) for x, weight in zip(inputs, weights)]
    streams = [torch.cuda.Stream() for _ in inputs]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(1000):
        for stream, x, weight, serial, count in zip(streams, inputs, weights, expected, wrong):
            with torch.cuda.stream(stream):
                for ours, theirs in zip(forward_backward(case, x, weight), serial):
                    count += (ours != theirs).any()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0, 0, 0]


@all_rows
@all_backends
def test_threads_equal_serial(case, backend):
    inputs = [random(4099 + i, device="cuda", dtype=torch.bfloat16) for i in range(64)]
    weights = [torch.randn_like(case.function(x)) for x in inputs]
    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        parallel = list(
            pool.map(lambda x, weight: forward_backward(case, x, weight), inputs, weights)
        )
    for found, x, weight in zip(parallel, inputs, weights):
        for ours, theirs in zip(found, forward_backward(case, x, weight)):
            assert torch.equal(ours, theirs)


@all_rows
@all_backends
@all_dtypes
def test_captured_graph(case, backend, dtype):
    """100 replays of forward and backward, each with new inputs."""
    x = random(4097, device="cuda", dtype=dtype)
    weight = torch.randn_like(case.function(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward(case, x, weight)  # compiles and loads, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(case, x, weight)
    for _ in range(100):
        x.copy_(random(4097, device="cuda"))
        weight.normal_()
        graph.replay()
        for ours, theirs in zip(captured, forward_backward(case, x, weight)):
            assert torch.equal(ours, theirs)


@all_backends
def test_cold_capture_works_or_says_so(backend):
    """The very first call within a capture, which may have to compile or to load."""
    code = f"""
        import torch, fused_act
        fused_act.use_backend({backend!r})
        x = torch.linspace(-8, 8, 4097, device="cuda")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                y = fused_act.mish(x)
            graph.replay()
        except Exception as error:
            assert str(error)
            print("refused:", type(error).__name__, error)
            torch.cuda.synchronize()
            y = fused_act.mish(x)
        torch.testing.assert_close(y, torch.nn.functional.mish(x))
        print("right in the end")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert "right in the end" in result.stdout, result.stdout + result.stderr
    print(result.stdout)


@elementwise_rows
@all_backends
def test_second_device(case, backend):
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = (random(4097, device="cuda:1") for _ in range(2))
    with torch.cuda.device(0):
        y, grad = forward_backward(case, x, weight)
    assert y.device == grad.device == x.device
    accuracy.assert_near(case, "forward", y, x)
    accuracy.assert_near(case, "derivative", grad, x, weight, y=y)


@one_case_with_each_saving
@all_backends
def test_memory_stays_flat(case, backend):
    """10,000 steps of training leave no more memory allocated than there was before."""
    leaf, weight = (random(4099, device="cuda") for _ in range(2))
    leaf.requires_grad_()

    def step():
        y = case.function(leaf * 1, inplace=True)
        torch.autograd.grad(case.function(y), leaf, weight)

    step()
    torch.cuda.synchronize()
    gc.collect()  # or what an earlier test left, freed in the meantime, would hide a leak
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    for _ in range(10_000):
        step()
    torch.cuda.synchronize()
    # The engine may free a step's gradient, 16 KiB, when the step is over. Of a leak in each step
    # there would be megabytes.
    assert torch.cuda.memory_allocated() <= before + 2**16
    assert torch.cuda.max_memory_allocated() <= peak + 2**16


@one_case_with_each_saving
@all_backends
def test_out_of_memory_in_backward(case, backend):
    """It raises, as any allocation may, and the next call works."""
    gc.collect()
    torch.cuda.empty_cache()  # or the gradient may fit beside x, in a segment of another test
    x = torch.linspace(-8, 8, 2**26, device="cuda", requires_grad=True)
    y = case.function(x)
    weight = torch.ones_like(y)
    (expected,) = torch.autograd.grad(y, x, weight, retain_graph=True)
    total = torch.cuda.get_device_properties(0).total_memory
    expected = expected.cpu()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        with pytest.raises(RuntimeError):  # of which torch.OutOfMemoryError is one
            torch.autograd.grad(y, x, weight, retain_graph=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(torch.autograd.grad(y, x, weight)[0].cpu(), expected)


@one_case_with_each_saving
@all_backends
def test_more_than_2_to_the_31_elements(case, backend):
    """Right at both ends and on both sides of element 2^31, of x and of the mask."""
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 6 * 2 * numel:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(numel, device="cuda", dtype=torch.float16)
    parts = [slice(0, 5000), slice(2**31 - 5000, 2**31), slice(2**31, numel)]
    for part in parts:
        x[part] = random(x[part].numel(), device="cuda")
    x.requires_grad_()
    y = case.function(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for part in parts:
        inputs = x.detach()[part]
        accuracy.assert_near(case, "forward", y.detach()[part], inputs)
        accuracy.assert_near(case, "derivative", grad[part], inputs, y=y[part])


def test_a_forked_child_uses_the_gpu():
    """Nothing that importing does keeps a forked child from using the GPU."""
    code = """
        import os, torch, fused_act
        assert not torch.cuda.is_initialized()
        child = os.fork()
        if child == 0:
            x = torch.linspace(-8, 8, 9, device="cuda")
            torch.testing.assert_close(fused_act.mish(x), torch.nn.functional.mish(x))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_available_backends_names_the_kernels():
    assert {"triton", "torch"} <= set(fused_act.available_backends())
