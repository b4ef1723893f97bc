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
