"""How tests run `python -m benchmarks`, and what several of them compare."""

import itertools
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import environment, providers


def status(*arguments: object) -> int:
    """Run `python -m benchmarks` with these arguments in this process; returns its exit status."""
    with pytest.raises(SystemExit) as ended:
        environment.run(partial(command.main, list(map(str, arguments))))
    return ended.value.code


def provider(name, function, **fields) -> providers.Provider:
    """One that computes every activation by `function`."""
    return providers.Provider(name, lambda activation, inplace: function, **fields)


def provider_called(name: str) -> providers.Provider:
    return next(provider for provider in providers.PROVIDERS if provider.name == name)


def gradient(activation, grad_output, x):
    """What torch's own op makes of `grad_output`."""
    x = x.clone().requires_grad_()
    y = activation.torch_forward(x, *providers.parameters(activation), inplace=False)
    return torch.autograd.grad(y, x, grad_output)[0]


def raise_value_error(x):
    raise ValueError("first line\nsecond line")


class Clock:
    """Says that a call took as long as the function that was called says."""

    def __init__(self):
        self.seconds = 0.0

    def turn(self, call, seconds):
        def turn():
            self.seconds = 0.001  # of those who say nothing: copies
            call()
            return [self.seconds]

        return turn

    def taking(self, *seconds):
        """A function of x whose calls take so long, but for the first, which prepares."""
        following = itertools.chain([0.0], itertools.cycle(seconds))

        def function(x):
            self.seconds = next(following)
            return x.clone()

        return function


CLOCK = Clock()


class StandInQueue:
    """A `timing.Queue` whose host and GPU have clocks of their own, which calls move on.

    Args:
        clearing: the seconds that clearing the cache takes the GPU.
    """

    step = 1e-6  # what any call costs the host
    graph_start = 8e-6  # of the GPU, for a graph

    def __init__(self, clearing):
        self.clearing = clearing
        self.host = self.gpu = 0.0  # the time of each; that of the GPU is when it will be through
        self.clearings = self.launches = 0
        self.captured = []
        self.recording = None

    def now(self):
        return self.host

    def put(self, seconds):
        self.host += self.step
        self.gpu = max(self.gpu, self.host) + seconds

    def clear_cache(self):
        self.clearings += 1
        self.put(self.clearing)

    def wait(self, seconds):
        self.put(seconds)

    def launch(self, host, device, launches=1):
        """A call that takes host and GPU so long, in so many launches."""
        self.launches += 1
        for _ in range(launches):
            self.host += host / launches
            if self.recording is not None:
                self.recording += device / launches
            else:
                self.gpu = max(self.gpu, self.host) + device / launches

    def record(self):
        self.put(0.0)
        return StandInEvent(self, self.gpu)

    def synchronize(self):
        self.host = max(self.host, self.gpu)

    def capture(self, call, runs):
        self.recording = 0.0
        for _ in range(runs):
            call()
        seconds, self.recording = self.recording, None
        self.captured.append(runs)
        return lambda: self.launch(50e-6, self.graph_start + seconds)


class StandInEvent:
    def __init__(self, queue, time):
        self.queue, self.time = queue, time

    def query(self):
        return self.queue.host >= self.time

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)
