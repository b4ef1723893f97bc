"""Times of calls that run in turn, so that what slows the machine slows all of them alike.

A turn runs one call for a while and returns the seconds of its runs, one or several of them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Sequence

from torch.utils import benchmark

Turn = Callable[[], list[float]]


def cpu_turn(call: Callable, seconds: float) -> Turn:
    """Turns that run `call` on one thread for about `seconds`, caches warm."""
    timer = benchmark.Timer("call()", globals={"call": call})
    timer.timeit(2)  # compiles, allocates
    number = max(1, round(seconds / timer.timeit(5).median))
    return lambda: [timer.timeit(number).median]


def gpu_turn(call: Callable, seconds: float) -> Turn:
    """Turns of runs between two events each, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    # The warm-up is short, since six more runs come before those that count.
    options = {"warmup": 1, "rep": 1000 * seconds, "return_mode": "all"}
    return lambda: [milliseconds / 1000 for milliseconds in do_bench(call, **options)]


def graph_turn(call: Callable, seconds: float) -> Turn:
    """Turns of a CUDA graph of many runs: no launch in between, and the L2 cache is warm."""
    from triton.testing import do_bench_cudagraph

    # It replays the graph ten times.
    options = {"rep": 1000 * seconds / 10, "return_mode": "all"}
    return lambda: [milliseconds / 1000 for milliseconds in do_bench_cudagraph(call, **options)]


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
