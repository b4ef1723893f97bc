"""Times of calls that run in turn, so that what slows the machine slows all of them alike.

A turn runs one call for a while and returns the seconds of its runs, one or several of them.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch.utils import benchmark

Turn = Callable[[], list[float]]

CACHE = 2**28  # bytes; several times what the largest L2 cache holds
GRAPH_RUNS = 200  # so many that the start of the graph is less than 1 % of a kernel of 1 µs
HOST_CALLS = 10  # timed together; few enough that the queue never fills up, which would block
# Seconds. A call that takes the host longer than the longest wait waits for the GPU by itself.
SHORTEST_WAIT, LONGEST_WAIT = 1e-5, 0.02


def cpu_turn(call: Callable, seconds: float) -> Turn:
    """Turns that run `call` on one thread for about `seconds`, caches warm."""
    timer = benchmark.Timer("call()", globals={"call": call})
    timer.timeit(2)  # compiles, allocates
    number = max(1, round(seconds / timer.timeit(5).median))
    return lambda: [timer.timeit(number).median]


class Event(Protocol):
    """A point in the queue of a GPU; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the GPU has come to it."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds to `end`. The GPU must have come to both."""


class Queue(Protocol):
    """What a host and a GPU do to be timed; tests put a simulation in its place."""

    def now(self) -> float:
        """The clock of the host, in seconds."""

    def clear_cache(self) -> None:
        """Let the GPU overwrite its L2 cache."""

    def wait(self, seconds: float) -> None:
        """Keep the GPU busy for so long, with nothing that takes memory."""

    def record(self) -> Event: ...

    def synchronize(self) -> None: ...

    def capture(self, call: Callable, runs: int) -> Callable[[], object]:
        """One launch of so many runs of `call`."""


class CudaQueue:
    """The current stream of the current CUDA device."""

    def __init__(self) -> None:
        self.cache = torch.empty(CACHE, dtype=torch.int8, device="cuda")
        self.cycles_per_second = 1e9
        self.wait(0.01)  # the GPU may have idled at a low clock
        start = self.record()
        self.wait(0.01)
        end = self.record()
        self.synchronize()
        self.cycles_per_second = 1e7 / (start.elapsed_time(end) / 1000)

    now = staticmethod(time.perf_counter)
    synchronize = staticmethod(torch.cuda.synchronize)

    def clear_cache(self) -> None:
        self.cache.zero_()

    def wait(self, seconds: float) -> None:
        torch.cuda._sleep(round(seconds * self.cycles_per_second))

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def capture(self, call: Callable, runs: int) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph does not leave its stream where a capture fails; the outer block does.
        with torch.cuda.stream(stream):
            call()  # compiles and allocates, which a capture must not
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(runs):
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay


@functools.cache
def cuda_queue() -> CudaQueue:
    return CudaQueue()


class GpuTurn:
    """Turns of runs of `call`, each between two events with nothing but the GPU's work in between.

    Before a run the GPU clears its L2 cache and then waits until the host has put the whole call
    into the queue: it finds the work ready, and the events tell the time of the device. If the GPU
    comes to the call while the host is still at it, the run does not count and the GPU waits twice
    as long for the rest of the turn. A call for which no wait is long enough, such as one that
    synchronizes, is timed without one and `is_bound_by_host`.

    `host_seconds` are what a call takes the host, timed at the start of each turn with an empty
    queue.

    Args:
        seconds: about how long a turn is.
        queue: that of the current device, if it is not another.
        graph: run the call `GRAPH_RUNS` times in one CUDA graph, and leave the L2 cache warm.
    """

    def __init__(
        self, call: Callable, seconds: float, queue: Queue | None = None, graph: bool = False
    ):
        self.queue = queue or cuda_queue()
        self.runs_a_launch = GRAPH_RUNS if graph else 1
        # A graph stores addresses alone, so `call` is kept to keep its tensors alive.
        self.call = call
        self.launch = self.queue.capture(call, GRAPH_RUNS) if graph else call
        self.clears_cache = not graph
        self.is_bound_by_host = False
        self.host_seconds: list[float] = []
        self.launch()  # compiles, allocates
        self.wait = SHORTEST_WAIT
        self.wait_for_host(2)
        start = self.queue.now()
        for _ in range(3):
            self.one_run()
        self.queue.synchronize()
        period = (self.queue.now() - start) / 3
        self.runs = max(1, round(seconds / period))
        self.host_calls = max(1, min(HOST_CALLS, round(seconds / period)))

    def __call__(self) -> list[float]:
        self.host_seconds.append(self.wait_for_host(self.host_calls))
        timed = []
        while len(timed) < self.runs:
            start, end, was_late = self.one_run()
            if was_late and not self.is_bound_by_host:
                self.wait_longer()
                if self.is_bound_by_host:  # times with a wait and without one are not alike
                    timed.clear()
            else:
                timed.append((start, end))
        self.queue.synchronize()
        return [start.elapsed_time(end) / 1000 / self.runs_a_launch for start, end in timed]

    def one_run(self) -> tuple[Event, Event, bool]:
        """The events around one launch, and whether the GPU came to it before the host was done."""
        if self.clears_cache:
            self.queue.clear_cache()
        if not self.is_bound_by_host:
            self.queue.wait(self.wait)
        start = self.queue.record()
        self.launch()
        end = self.queue.record()
        return start, end, start.query()

    def wait_longer(self) -> None:
        self.is_bound_by_host = self.wait >= LONGEST_WAIT
        self.wait = min(2 * self.wait, LONGEST_WAIT)

    def wait_for_host(self, calls: int) -> float:
        """Set the wait to twice what a call takes the host, and return that, in seconds."""
        self.queue.synchronize()
        start = self.queue.now()
        for _ in range(calls):
            self.launch()
        end = self.queue.now()
        self.queue.synchronize()
        host = (end - start) / calls
        self.wait = min(max(2 * host, SHORTEST_WAIT), LONGEST_WAIT)
        return host


gpu_turn = GpuTurn
graph_turn = functools.partial(GpuTurn, graph=True)


def in_rounds(turns: Sequence[Callable[[], object]], rounds: int) -> None:
    """Let each take one turn a round, in an order that is drawn anew: nobody follows the same."""
    for number in range(rounds):
        for turn in random.Random(number).sample(turns, len(turns)):
            turn()


def interleaved(
    calls: dict[Hashable, Callable],
    rounds: int,
    seconds: float,
    turn: Callable[[Callable, float], Turn] = cpu_turn,
) -> dict[Hashable, float]:
    """The median seconds of each call.

    Args:
        rounds: how often each takes its turn.
        seconds: about how long a turn is; a call is repeated for that long.
    """
    turns = {name: turn(call, seconds) for name, call in calls.items()}
    times = {name: [] for name in calls}
    in_rounds([lambda name=name: times[name].extend(turns[name]()) for name in calls], rounds)
    return {name: statistics.median(found) for name, found in times.items()}
