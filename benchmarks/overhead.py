"""What a call costs on the host beside torch's own op, in microseconds.

    python -m benchmarks overhead [--rounds 31]

- host extension, python: 16 elements where a kernel runs, called in C++ and in Python. Without a
  GPU the kernel is torch's own, so that only the way to it differs; with `, ops.cu` it is an op of
  csrc/ with everything but the GPU, its math included. With a GPU it is that of each backend.
- triton, stub driver: how long it takes Triton to find out which of its compiled kernels a call
  needs, and how long it takes us, where the launch itself does nothing. It needs no GPU.
- fallback: functions and modules where no kernel runs, beside `torch.nn.functional` and `torch.nn`.
- compiled: the same under `torch.compile`, which checks at each call that no backend was forced.
- import: what `python -X importtime` says of `import torch, fused_act`.

All of a table take turns on one thread. `us` and `reference_us` are medians and `least_us` and
`reference_least_us` the least; `added_us` is the median of what ours took more in the same round.
Of 8 activations in a row, and of 35 blocks of convolution, normalization and activation, it is the
time of one activation; that of a block is what its network takes more than one with an identity.
A block under `rematerialize` (`-norm`: with `norm`) is beside the same block without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_act
from benchmarks import environment, options, timing
from fused_act import dispatch, host
from fused_act.dispatch import Backend
from tests.shared import compiling, cpu_ops

NUMEL = 16
SECONDS = 0.002  # of one turn
DEVICE = environment.default_device()

FUNCTIONS = (
    ("mish", fused_act.mish, "F.mish", F.mish),
    ("silu", fused_act.silu, "F.silu", F.silu),
    ("relu6", fused_act.relu6, "F.relu6", F.relu6),
)
MODULES = (
    ("Mish()", fused_act.Mish(), "nn.Mish()", nn.Mish()),
    ("SiLU()", fused_act.SiLU(), "nn.SiLU()", nn.SiLU()),
    ("ReLU6()", fused_act.ReLU6(), "nn.ReLU6()", nn.ReLU6()),
)
IN_PLACE = tuple(
    (f"{name}, in place", partial(ours, inplace=True), reference, partial(theirs, inplace=True))
    for name, ours, reference, theirs in FUNCTIONS
)


class SwishOfTorch(nn.Module):
    """Swish with a learnable beta, in torch's own ops."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class CReLUOfTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], -1)


WEIGHTED = (
    ("PReLU()", fused_act.PReLU(), "nn.PReLU()", nn.PReLU()),
    (
        "Swish(learnable=True)",
        fused_act.Swish(learnable=True),
        "x * sigmoid(beta * x)",
        SwishOfTorch(),
    ),
)
CRELU = (("CReLU(-1)", fused_act.CReLU(-1), "cat([relu(x), relu(-x)])", CReLUOfTorch()),)
WIDENED = (*FUNCTIONS, *WEIGHTED, *CRELU)
# The row of a call, where not every backend below has one.
ROWS = {"PReLU()": "prelu", "Swish(learnable=True)": "learnable_swish", "CReLU(-1)": "crelu"}

Activation = Callable[[Tensor], Tensor]


def no_grad(activation: Activation) -> Callable:
    return partial(activation, torch.randn(NUMEL, device=DEVICE))


def under_default_device(activation: Activation) -> Callable:
    x = torch.randn(NUMEL, device=DEVICE)

    def run():
        with torch.device("cpu"):
            for _ in range(UNDER_DEFAULT_DEVICE):
                activation(x)

    return run


def forward(activation: Activation) -> Callable:
    return partial(activation, torch.randn(NUMEL, device=DEVICE, requires_grad=True))


def forward_and_backward(activation: Activation) -> Callable:
    return in_a_row(activation, count=1)


def in_a_row(activation: Activation, count: int = 8) -> Callable:
    x = torch.randn(NUMEL, device=DEVICE, requires_grad=True)
    inputs = [x]
    if isinstance(activation, nn.Module):
        inputs += activation.to(DEVICE).parameters()
    with torch.no_grad():
        grad_output = torch.randn_like(activation(x.clone()))
    is_inplace = isinstance(activation, partial)

    def run():
        y = x * 1 if is_inplace else x
        for _ in range(count):
            y = activation(y)
        torch.autograd.grad(y, inputs, grad_output)

    return run


class Layer(nn.Module):
    """What stands for the activation in all blocks: one network runs them all, in one memory."""

    activation: Activation

    def forward(self, x: Tensor) -> Tensor:
        return Layer.activation(x)


@functools.cache
def blocks() -> nn.Module:
    layers = (
        layer
        for _ in range(BLOCKS)
        for layer in (nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), Layer())
    )
    return nn.Sequential(*layers).to(DEVICE)


def network(activation: Activation) -> Callable:
    model, x = blocks(), torch.randn(1, 8, 2, 2, device=DEVICE)

    def run():
        Layer.activation = staticmethod(activation)
        model(x).sum().backward()

    return run


UNDER_DEFAULT_DEVICE, BLOCKS = 20, 35


class Direction(NamedTuple):
    """What is timed: `prepare(activation)` makes a run of so many `calls`, of functions."""

    prepare: Callable[[Activation], Callable]
    functions: tuple
    calls: int = 1
    seconds: float = SECONDS
    beside_identity: bool = False  # the run has more in it than calls
    more_rounds: int = 1  # times as many, where that more scatters


DIRECTIONS = {
    "no grad": Direction(no_grad, WIDENED),
    "no grad, default device": Direction(under_default_device, FUNCTIONS, UNDER_DEFAULT_DEVICE),
    "forward": Direction(forward, WIDENED),
    "forward and backward": Direction(forward_and_backward, WIDENED, 1, 2 * SECONDS),
    "8 in a row": Direction(in_a_row, (*FUNCTIONS, *IN_PLACE, *WEIGHTED), 8, 4 * SECONDS),
    "35 blocks": Direction(network, (*FUNCTIONS, *IN_PLACE, *WEIGHTED), BLOCKS, SECONDS, True, 10),
}
METHODS = {
    "rematerialize": fused_act.rematerialize,
    "rematerialize-norm": partial(fused_act.rematerialize, norm=True),
}


def ways() -> dict[str, tuple[Backend, Callable[[], contextlib.AbstractContextManager]]]:
    """The backend of each path that can run here, and what is to be entered for it."""
    backends = {}
    if DEVICE.type == "cuda":
        names = [name for name in dispatch.available_backends() if name != "torch"]
        backends = {f", {name}": dispatch.BACKENDS[name].ready() for name in names}
    elif compiling.COMPILER is None:
        print("no C++ compiler: nothing is measured where a kernel runs", file=sys.stderr)
    else:
        backends = {"": cpu_ops.TORCH_KERNELS, ", ops.cu": cpu_ops.CSRC}
    found = {}
    if isinstance(host.extension(), str):
        print(f"python alone is measured: {host.extension()}", file=sys.stderr)
    else:
        found = {
            f"host extension{name}": (each, partial(within, each))
            for name, each in backends.items()
        }
    return found | {
        f"python{name}": (each, partial(in_python, each)) for name, each in backends.items()
    }


@contextlib.contextmanager
def within(backend: Backend) -> Iterator[None]:
    if backend.name in dispatch.BACKENDS:
        with fused_act.use_backend(backend.name):
            yield
    else:
        with cpu_ops.forced(backend):
            yield


@contextlib.contextmanager
def in_python(backend: Backend) -> Iterator[None]:
    with within(backend), cpu_ops.python_way(backend):
        yield


def turn_in(
    way: Callable[[], contextlib.AbstractContextManager],
    call,
    seconds,
    block: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> timing.Turn:
    """Turns that run within `way` and `block`."""
    with way(), block():
        turn = timing.cpu_turn(call, seconds)

    def run():
        with way(), block():
            return turn()

    return run


def in_turn(turns: list[timing.Turn], rounds: int) -> list[list[float]]:
    """The seconds of each, round by round."""
    times = [[] for _ in turns]

    def take(turn, seconds):
        seconds.extend(turn())

    timing.in_rounds([partial(take, *each) for each in zip(turns, times)], rounds)
    return times


def row(
    path: str,
    call: str,
    direction: str,
    reference: str,
    ours: list[float],
    theirs: list[float],
    nothing: list[float] = (),
    calls: int = 1,
) -> dict:
    """Of the seconds that each took in each round: so many calls, and what is no part of them."""
    nothing = nothing or [0.0] * len(ours)

    def median(a: list[float], b: list[float]) -> float:
        return 1e6 / calls * statistics.median(x - y for x, y in zip(a, b))

    return {
        "path": path,
        "call": call,
        "direction": direction,
        "us": median(ours, nothing),
        "reference": reference,
        "reference_us": median(theirs, nothing),
        "added_us": median(ours, theirs),
        "least_us": 1e6 / calls * (min(ours) - min(nothing)),
        "reference_least_us": 1e6 / calls * (min(theirs) - min(nothing)),
    }


def kernel_rows(rounds: int) -> Iterator[dict]:
    found = ways()
    for name, direction in DIRECTIONS.items():
        prepare, seconds = direction.prepare, direction.seconds
        for call, ours, reference, theirs in direction.functions if found else ():
            turns = {
                path: turn_in(way, prepare(ours), seconds)
                for path, (backend, way) in found.items()
                if ROWS.get(call, "mish") in backend.ready().kernels
            }
            turns["torch"] = timing.cpu_turn(prepare(theirs), seconds)
            if direction.beside_identity:
                turns["identity"] = timing.cpu_turn(prepare(lambda x: x), seconds)
            every = in_turn(list(turns.values()), rounds * direction.more_rounds)
            times = dict(zip(turns, every))
            nothing = times.pop("identity", [])
            torchs = times.pop("torch")
            for path, seconds_of_path in times.items():
                yield row(
                    path, call, name, reference, seconds_of_path, torchs, nothing, direction.calls
                )


def rematerialize_rows(rounds: int) -> Iterator[dict]:
    """A block of 35, within `rematerialize` and beside the same without it."""
    for (name, method), (call, ours, *_) in itertools.product(METHODS.items(), FUNCTIONS):
        found = {path: way for path, (_, way) in ways().items()}
        within_method = [turn_in(way, network(ours), SECONDS, method) for way in found.values()]
        without = [turn_in(way, network(ours), SECONDS) for way in found.values()]
        times = in_turn([*within_method, *without], 4 * rounds)
        for path, ours_within, ours_without in zip(found, times, times[len(found) :]):
            direction = f"35 blocks, {name}"
            yield row(path, call, direction, "without", ours_within, ours_without, calls=BLOCKS)


def triton_rows(rounds: int) -> Iterator[dict]:
    """What Triton's `kernel[grid]` and what a `Launcher` takes beside the bare launch."""
    if importlib.util.find_spec("triton") is None:
        print("no triton: its launch is not measured", file=sys.stderr)
        return
    from tests.shared import triton_driver

    stub = triton_driver.Stub()
    stub.launch = lambda *args: None
    with triton_driver.stubbed(stub):
        launch, *call = triton_driver.example()
        launch(*call)
        if not launch.compiled:
            print("this triton is not known: kernel[grid] launches", file=sys.stderr)
            return
        (compiled,) = launch.compiled.values()
        blocks, arguments, constants = call
        values = [each.data_ptr() if hasattr(each, "data_ptr") else each for each in arguments]
        bare = partial(
            compiled.run,
            *(blocks, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None),
            *(*values, *launch.functions, *constants),
        )
        runs = {
            "Launcher": partial(launch, *call),
            "kernel[grid]": partial(triton_driver.launch_publicly, launch, *call),
        }
        turns = [timing.cpu_turn(run, SECONDS) for run in (*runs.values(), bare)]
        *times, of_bare = in_turn(turns, rounds)
    for name, seconds in zip(runs, times):
        yield row("triton, stub driver", name, "launch", "the bare launch", seconds, of_bare)


def public_rows(path: str, prepare: Callable[[Callable], Callable], rounds: int) -> Iterator[dict]:
    for direction, grad in (("no grad", False), ("forward", True)):
        for call, ours, reference, theirs in (*FUNCTIONS, *MODULES):
            torch.compiler.reset()  # compiled code shares one cache, which is limited
            x = torch.randn(NUMEL, requires_grad=grad)
            turns = [timing.cpu_turn(partial(prepare(f), x), SECONDS) for f in (ours, theirs)]
            yield row(path, call, direction, reference, *in_turn(turns, rounds))


def import_rows(runs: int = 5) -> Iterator[dict]:
    command = [sys.executable, "-X", "importtime", "-c", "import torch, fused_act"]
    found = {"torch": [], "fused_act": []}
    for _ in range(runs):
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for name, seconds in found.items():
            (cumulative,) = re.findall(rf"(\d+) \| {name}$", report, re.MULTILINE)
            seconds.append(1e-6 * int(cumulative))
    together = [a + b for a, b in zip(found["torch"], found["fused_act"])]
    yield row("import", "import torch, fused_act", "", "import torch", together, found["torch"])
    yield from extension_rows(runs)


def extension_rows(runs: int) -> Iterator[dict]:
    """What loading the host extension takes, which the first use of a backend does."""
    code = (
        "import time, torch, fused_act; from fused_act import host; start = time.perf_counter(); "
        "host.extension(); print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    seconds = [float(run(command).stdout) for _ in range(runs)]
    yield row("import", "the host extension", "", "nothing", seconds, [0.0] * runs)


def print_results(rows: list[dict]) -> None:
    header = ("", "direction", "us", "beside", "us", "added", "least", "beside")
    for path in dict.fromkeys(found["path"] for found in rows):
        lines = [
            (
                found["call"],
                found["direction"],
                f"{found['us']:.2f}",
                found["reference"],
                f"{found['reference_us']:.2f}",
                f"{found['added_us']:+.2f}",
                f"{found['least_us']:.2f}",
                f"{found['reference_least_us']:.2f}",
            )
            for found in rows
            if found["path"] == path
        ]
        print(f"\n{path}\n\n{environment.table(header, lines)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)
    options.add_rounds(parser, 31)


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    found = itertools.chain(
        kernel_rows(arguments.rounds),
        rematerialize_rows(arguments.rounds),
        triton_rows(arguments.rounds),
        public_rows("fallback", lambda call: call, arguments.rounds),
        public_rows("compiled", compiled, arguments.rounds),
        import_rows(),
    )
    try:
        rows = environment.write_csv(arguments.results / "overhead.csv", found)
    finally:
        torch.set_num_threads(threads)
    print_results(rows)
    return rows
