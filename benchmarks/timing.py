"""Times of calls that run in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from torch.utils import benchmark


def interleaved(calls: dict[str, Callable], rounds: int, seconds: float) -> dict[str, float]:
    """The median seconds of each call, on one CPU thread.

    Args:
        rounds: how often each takes its turn.
        seconds: about how long a turn is; a call is repeated for that long.
    """
    timers = {
        name: benchmark.Timer("call()", globals={"call": call}) for name, call in calls.items()
    }
    numbers = {}
    for name, timer in timers.items():
        timer.timeit(2)  # compiles, allocates
        numbers[name] = max(1, round(seconds / timer.timeit(5).median))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).median)
    return {name: statistics.median(found) for name, found in times.items()}
