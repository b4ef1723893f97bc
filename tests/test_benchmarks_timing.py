"""How the benchmarks take times; those of a GPU are shown with a stand-in clock and queue."""

import contextlib
import types
import weakref
from functools import partial

import pytest
import torch

from benchmarks import timing
from tests.shared.benchmarks import StandInQueue

# As measured on an H200: what the host needs for Mish forward and backward through autograd, what
# its kernels take, and how long the cache takes to be cleared.
HOST, DEVICE, CLEARING = 554e-6, 318e-6, 60e-6


@pytest.fixture
def queue():
    return StandInQueue(clearing=CLEARING)


def test_all_take_a_turn_in_each_round_in_another_order():
    order = []
    timing.in_rounds([lambda name=name: order.append(name) for name in "abcde"], 4)
    rounds = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == list("abcde") for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4


def test_cpu_turns_last_as_long_as_asked_and_tell_the_time_of_one_run(monkeypatch):
    numbers = []

    class Timer:
        def __init__(self, statement, globals):
            assert eval(statement, globals) == "called"

        def timeit(self, number):
            numbers.append(number)
            return types.SimpleNamespace(median=0.002)

    monkeypatch.setattr(timing.benchmark, "Timer", Timer)
    turn = timing.cpu_turn(lambda: "called", 0.03)
    assert turn() == [0.002]
    assert numbers[-1] == 15


# Of a GPU


def test_events_alone_tell_the_time_of_the_host(queue):
    """What was wrong: without a wait the GPU is through before the host has put in the rest."""
    queue.clear_cache()
    start = queue.record()
    queue.launch(HOST, DEVICE)
    end = queue.record()
    queue.synchronize()
    assert start.elapsed_time(end) / 1000 > 0.9 * (HOST - CLEARING) > 1.3 * DEVICE


@pytest.mark.parametrize("host", [1e-6, 20e-6, HOST, 5e-3])
@pytest.mark.parametrize("device", [1.3e-6, DEVICE, 20e-3])
def test_the_wait_leaves_the_time_of_the_device(queue, host, device):
    turn = timing.GpuTurn(partial(queue.launch, host, device, launches=8), 0.003, queue)
    found = [seconds for _ in range(3) for seconds in turn()]
    assert found == pytest.approx([device] * len(found))
    assert not turn.is_bound_by_host
    assert turn.host_seconds == pytest.approx([host] * 3)


def test_the_wait_grows_with_the_host(queue):
    """The host slows down after it was timed: runs that this spoiled do not count."""
    calls = []

    def call():
        calls.append(None)
        queue.launch(1e-3 if len(calls) > slow_from else 10e-6, DEVICE)

    slow_from = 1000
    turn = timing.GpuTurn(call, 0.003, queue)
    slow_from = len(calls) + turn.host_calls
    assert turn() == pytest.approx([DEVICE] * turn.runs)
    assert len(calls) > slow_from + turn.runs  # some did not count
    assert turn.wait > 0.5e-3
    assert not turn.is_bound_by_host


def test_hiccups_of_the_host_do_not_make_it_the_bound(queue):
    """Each spoils its run; the next turn does not wait the longer for them."""
    calls = []

    def call():
        calls.append(None)
        queue.launch(15e-3 if len(calls) % 27 == 0 else 10e-6, 1e-6)

    turn = timing.GpuTurn(call, 0.003, queue)
    for _ in range(30):
        start = queue.now()
        assert turn() == pytest.approx([1e-6] * turn.runs)
        assert queue.now() - start < 0.2
    assert len(calls) > 30 * (turn.runs + turn.host_calls) + 10  # some did not count
    assert not turn.is_bound_by_host


def test_a_call_that_waits_for_the_gpu_says_that_the_host_bounds_it(queue):
    def call():
        queue.launch(HOST, DEVICE)
        queue.synchronize()
        queue.launch(HOST, DEVICE)

    turn = timing.GpuTurn(call, 0.003, queue)
    found = turn()
    assert turn.is_bound_by_host
    assert len(found) == turn.runs
    assert min(found) >= HOST
    start = queue.now()
    turn()
    assert queue.now() - start < 0.05  # there is no wait any more


def test_the_cache_is_cleared_before_each_run_but_not_within_a_graph(queue):
    turn = timing.GpuTurn(partial(queue.launch, 1e-6, DEVICE), 0.003, queue)
    before, launched = queue.clearings, queue.launches
    turn()
    runs = queue.launches - launched - turn.host_calls
    assert queue.clearings - before == runs == turn.runs
    before = queue.clearings
    timing.GpuTurn(partial(queue.launch, 1e-6, DEVICE), 0.003, queue, graph=True)()
    assert queue.clearings == before


@pytest.mark.parametrize("kernel", [1.3e-6, 40e-6])
@pytest.mark.parametrize("first_estimate", [1e-6, 1e-3])
def test_a_graph_has_as_many_runs_whatever_the_first_estimate(queue, kernel, first_estimate):
    """9 us were reported for 1.3, when a slow first run let only few runs into the graph."""
    host = iter([first_estimate])
    turn = timing.GpuTurn(lambda: queue.launch(next(host, 1e-6), kernel), 0.003, queue, graph=True)
    assert queue.captured == [timing.GRAPH_RUNS]
    assert timing.GRAPH_RUNS >= 200
    for seconds in turn():
        assert kernel <= seconds < 1.02 * kernel + queue.graph_start / 200 + 1e-9


def test_what_a_graph_writes_into_is_there_as_long_as_its_turns(queue):
    """A graph has addresses alone: `capture` keeps nothing of the call."""

    def call(out):
        queue.launch(1e-6, DEVICE)

    out = torch.empty(8)
    held = weakref.ref(out)
    turn = timing.GpuTurn(partial(call, out), 0.003, queue, graph=True)
    del out
    turn()
    assert held() is not None
    del turn
    assert held() is None


def test_a_capture_that_fails_leaves_its_stream(monkeypatch):
    """As `torch.cuda.graph` does it, whose end raises before it goes back."""
    main = types.SimpleNamespace(wait_stream=lambda other: None)
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(graph, stream=None):
        current[0] = stream or types.SimpleNamespace()
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    fakes = {
        "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: current[0],
        "stream": on,
        "graph": graph,
        "CUDAGraph": types.SimpleNamespace,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="during capture"):
        timing.CudaQueue.capture(object.__new__(timing.CudaQueue), int, 2)
    assert current[0] is main


def test_turns_last_about_as_long_as_asked(queue):
    turn = timing.GpuTurn(partial(queue.launch, 20e-6, 50e-6), 0.02, queue)
    start = queue.now()
    turn()
    assert 0.01 < queue.now() - start < 0.04


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_gpu_keeps_the_host_out(graph):
    """A kernel that takes a known time, behind a host that takes longer."""
    queue = timing.cuda_queue()

    def call():
        queue.wait(2e-4)
        if not torch.cuda.is_current_stream_capturing():
            until = queue.now() + 1e-3
            while queue.now() < until:
                pass

    turn = timing.GpuTurn(call, 0.02, graph=graph)
    # The least, and wide limits, since other processes may use the GPU. A graph is so long that it
    # always shares the GPU with them, and nothing of the host is in it.
    least = min(turn())
    assert least > 2e-5
    assert graph or least < 1e-3
    assert not turn.is_bound_by_host
    assert graph or min(turn.host_seconds) >= 1e-3


@pytest.mark.gpu
def test_a_gpu_whose_call_synchronizes_is_bound_by_the_host():
    turn = timing.GpuTurn(torch.cuda.synchronize, 0.003)
    turn()
    assert turn.is_bound_by_host
