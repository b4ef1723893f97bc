"""How long compiled code takes with fused_act, beside the same code with torch's own op.

    python -m benchmarks compile [--sizes 2^18] [--dtypes fp32 bf16] [--network]

- alone: f(x)
- chain: f(x * w + b) * s, which becomes one kernel forward and one backward
- network, with --network: a MobileNetV2 of three blocks on 8 images of 32 x 32 pixels

forward runs without autograd. A ratio below 1 means that ours is faster; noise is that of torch's
own code to itself. Times are those of a whole call, the host's part included: medians of rounds in
which all run in turn, on one thread where no GPU is. `speed` has the device's part alone. Much
larger tensors on a CPU are new memory at each call, and page faults would count more than the code.
torch has no Swish with another beta than 1: its definition, x * sigmoid(beta * x), is compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_act
from benchmarks import environment, options, providers, timing
from benchmarks.providers import DEVICE, DTYPES
from benchmarks.small_networks import digits_network
from fused_act.activations.swish import torch_forward as definition_of_swish

FUNCTIONS = {
    "mish": (fused_act.mish, F.mish),
    "silu": (fused_act.silu, F.silu),
    "swish 1.702": (partial(fused_act.swish, beta=1.702), partial(definition_of_swish, beta=1.702)),
    "relu6": (fused_act.relu6, F.relu6),
}
MODULES = {
    "mish": (fused_act.Mish, nn.Mish),
    "silu": (fused_act.SiLU, nn.SiLU),
    "relu6": (fused_act.ReLU6, nn.ReLU6),
}
IMAGES = (8, 1, 32, 32)
DIRECTIONS = ("forward", "forward+backward")
SECONDS = 0.01  # of one turn


@dataclasses.dataclass(frozen=True)
class CompiledPair:
    """Code with fused_act beside the same code with torch's own.

    Args:
        ours, torchs: `f(x) -> y` with fused_act, and with torch's own.
        inputs: what the gradient is taken of, for each of them.
    """

    function: str
    name: str
    ours: Callable[[Tensor], Tensor]
    torchs: Callable[[Tensor], Tensor]
    x: Tensor
    inputs: tuple[Sequence[Tensor], Sequence[Tensor]]


def elementwise_pairs(dtype: torch.dtype, numel: int) -> Iterator[CompiledPair]:
    x, w, b, s = (torch.randn(numel, dtype=dtype, device=DEVICE) for _ in range(4))
    x.requires_grad_()

    def chain(f, x):
        return f(x * w + b) * s

    for function, (ours, torchs) in FUNCTIONS.items():
        yield CompiledPair(function, "alone", ours, torchs, x, ([x], [x]))
        yield CompiledPair(
            function, "chain", partial(chain, ours), partial(chain, torchs), x, ([x], [x])
        )


def network_pairs(dtype: torch.dtype) -> Iterator[CompiledPair]:
    x = torch.randn(IMAGES, dtype=dtype, device=DEVICE)
    for function, modules in MODULES.items():
        ours, torchs = (digits_network(module).to(DEVICE, dtype) for module in modules)
        parameters = list(ours.parameters()), list(torchs.parameters())
        yield CompiledPair(function, "network", ours, torchs, x, parameters)


def prepared(
    function: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor], direction: str
) -> Callable[[], object]:
    """One direction of the compiled `function`."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    if direction == "forward":
        return torch.no_grad()(partial(compiled, x))
    grad_output = torch.ones_like(function(x))
    return lambda: torch.autograd.grad(compiled(x), inputs, grad_output)


def measure(pair: CompiledPair, direction: str, rounds: int) -> dict:
    torch.compiler.reset()
    torchs = prepared(pair.torchs, pair.x, pair.inputs[1], direction)
    calls = {
        "ours": prepared(pair.ours, pair.x, pair.inputs[0], direction),
        "torch": torchs,
        "torch again": torchs,
    }
    times = timing.interleaved(calls, rounds, SECONDS)
    return {
        "function": pair.function,
        "case": pair.name,
        "dtype": providers.dtype_name(pair.x.dtype),
        "direction": direction,
        "numel": pair.x.numel(),
        "ours_ms": 1000 * times["ours"],
        "torch_ms": 1000 * times["torch"],
        "ratio": times["ours"] / times["torch"],
        "noise": times["torch again"] / times["torch"],
    }


def print_results(rows: list[dict]) -> None:
    header = ("", "ours, ms", "torch, ms", "ratio", "noise")
    lines = [
        (
            f"{row['function']} {row['case']} {row['dtype']} {row['direction']}, "
            f"{options.size_name(row['numel'])}",
            f"{row['ours_ms']:.3f}",
            f"{row['torch_ms']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['noise']:.2f}",
        )
        for row in rows
    ]
    print(f"\n{environment.table(header, lines)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)
    options.add_sizes(parser, [2**18], "2^18")
    # On a GPU it is compiling that takes the time.
    options.add_dtypes(parser, ["bf16"] if DEVICE.type == "cuda" else ["fp32", "bf16"])
    options.add_rounds(parser, 21)
    parser.add_argument("--network", action="store_true", help="also a network; takes minutes")


def measure_all(arguments: argparse.Namespace) -> Iterator[dict]:
    for dtype in (DTYPES[name] for name in arguments.dtypes):
        pairs = itertools.chain.from_iterable(
            elementwise_pairs(dtype, numel) for numel in arguments.sizes
        )
        if arguments.network:
            pairs = itertools.chain(pairs, network_pairs(dtype))
        for pair, direction in itertools.product(pairs, DIRECTIONS):
            print(pair.function, pair.name, dtype, direction, file=sys.stderr)
            yield measure(pair, direction, arguments.rounds)


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    torch.manual_seed(0)
    rows = environment.write_csv(arguments.results / "compile.csv", measure_all(arguments))
    print_results(rows)
    return rows
