"""What torch.profiler records of a call: the work of the GPU, and the memory of a CPU."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import memory
from benchmarks.memory import ON_GPU
from benchmarks.providers import error_text

ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # the categories of what takes its time


def synchronize() -> None:
    """Wait until the GPU, where there is one, has done all."""
    if ON_GPU:
        torch.cuda.synchronize()


def trace(call: Callable[[], object], **options: object) -> list[dict]:
    """The events of `call`, as in a Chrome trace. Args: options: those of the profiler."""
    with profile(**options) as profiler:
        call()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"))["traceEvents"]


def microseconds_on_device(events: Iterable[dict]) -> float:
    """The time of all kernels, copies and fills in a trace."""
    return sum(event["dur"] for event in events if event.get("cat") in ON_THE_DEVICE)


def running_maximum(events: Iterable[dict]) -> int:
    """The most bytes that were allocated and not yet freed, of those that a trace has begun with 0.

    The events of a trace need not be in the order of time: backward has a thread of its own.
    """
    found = [event for event in events if event["name"] == "[memory]"]
    most = held = 0
    for event in sorted(found, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        if event["args"]["Device Type"] == 0:  # a CPU
            held += event["args"]["Bytes"]
            most = max(most, held)
    return most


def most_allocated(call: Callable[[], object]) -> int:
    """The most bytes that `call` has allocated at any time, beyond what was allocated before."""
    if ON_GPU:
        found = {}
        with memory.allocated(found):
            call()
        return found["peak"]
    return running_maximum(trace(call, activities=[ProfilerActivity.CPU], profile_memory=True))


def device_ms(call: Callable[[], object], calls: int) -> float | None:
    """What the GPU works in one of some `calls`; None, and one line says why, if that fails."""
    try:
        events = trace(lambda: [call() for _ in range(calls)], activities=[ProfilerActivity.CUDA])
        found = microseconds_on_device(events)
        reason = "" if found else "torch.profiler saw no work of the GPU"
    except Exception as error:  # a full disk, no memory: no reason to lose what was timed before
        found, reason = 0.0, error_text(error)
    if reason:
        say_once(f"without device_ms and bound: {reason}")
        return None
    return found / 1000 / calls


@functools.cache
def say_once(line: str) -> None:
    print(line)
