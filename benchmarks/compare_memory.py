"""How much memory the activations hold for backward, next to everything a user could pick instead.

    python -m benchmarks.compare_memory [--dtypes bf16 fp32] [--compile-networks]

An activation seldom stands alone: what the next layer saves as well costs nothing more. So there
are four cases, and all figures are bytes for each element that an activation computes:

- alone: `activation(x.clone())`, where only the activation can keep the clone;
- conv-act-conv: 1 x 1 convolutions around it. The second saves the activation's output, whoever
  computes it. Parameters and the input do not count;
- mobilenet_v2 and csp: training steps of small networks, with normalization, where convolutions and
  norms save theirs too. Compiled networks take minutes, so they have to be asked for.

saved is what autograd was given to save, each storage once. On a GPU the allocator tells two more:
held after forward, the output included, and the peak on the way through forward and backward.
Compiled code is not repeated in place, as the compiler makes the same of both; it compiles the
whole case.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import environment, providers
from benchmarks.networks import csp_network, digits_network
from benchmarks.providers import DEVICE, DTYPES, Provider
from fused_act.activation import Activation
from fused_act.activations import ACTIVATIONS

CHANNELS = 32
# Small on a CPU, where Triton's interpreter takes a second for 2^20 elements.
SHAPE = (64, CHANNELS, 128, 64) if DEVICE.type == "cuda" else (4, CHANNELS, 16, 8)
IMAGES = (256, 1, 64, 64) if DEVICE.type == "cuda" else (4, 1, 16, 16)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Alone(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module]):
        super().__init__()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x.clone())


class ConvActConv(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module]):
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.activation = activation()
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


NETWORKS = {"mobilenet_v2": digits_network, "csp": csp_network}
CASES = {"alone": Alone, "conv-act-conv": ConvActConv, **NETWORKS}


def saved_bytes(forward: Callable[[], Tensor], not_counted: list[Tensor]) -> int:
    """Bytes of the storages that autograd saves in `forward`, but for those of `not_counted`."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph keeps what is saved while the output lives, so no address comes twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(sizes.values())


def allocator_bytes(
    forward: Callable[[], Tensor], inputs: list[Tensor], grad_output: Tensor
) -> tuple[int, int]:
    """What the allocator holds after forward and at the peak, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = forward()
    held = torch.cuda.memory_allocated() - before
    torch.autograd.grad(output, inputs, grad_output)
    return held, torch.cuda.max_memory_allocated() - before


def activation_numel(case: str, shape: tuple[int, ...]) -> int:
    """The elements that all activations of a case compute for an input of `shape`."""
    numels = []

    def count(x: Tensor) -> Tensor:
        numels.append(x.numel())
        return x

    CASES[case](lambda: Call(count))(torch.zeros(shape))
    return sum(numels)


def measure(
    provider: Provider, activation: Activation, dtype: torch.dtype, case: str, inplace: bool
) -> dict[str, float]:
    """The figures of one provider in one case, in bytes."""
    is_network = case in NETWORKS
    x = torch.randn(IMAGES if is_network else SHAPE, dtype=dtype, device=DEVICE)
    # The layout that Inductor gives convolutions; it would save a converted copy of the input.
    x = x.to(memory_format=torch.channels_last).requires_grad_(not is_network)
    function = provider.function(activation, inplace)
    module = CASES[case](lambda: Call(function))
    module = module.to(DEVICE, dtype, memory_format=torch.channels_last)
    inputs = [*module.parameters()] if is_network else [x, *module.parameters()]
    run = provider.prepare(module)
    with provider.selected():
        # Compiles what is to be compiled, and lets libraries take their workspaces.
        output = run(x)
        grad_output = torch.randn_like(output)
        torch.autograd.grad(output, inputs, grad_output)
        del output
        # Compiled code drops the clone of the case alone, and saves x in its place.
        not_counted = [] if case == "alone" else [x, *module.parameters(), *module.buffers()]
        found = {"saved_bytes": saved_bytes(lambda: run(x), not_counted)}
        if DEVICE.type == "cuda":
            held, peak = allocator_bytes(lambda: run(x), inputs, grad_output)
            found |= {"held_bytes": held, "peak_bytes": peak}
    return found


def cases(compared: list[Provider], arguments: argparse.Namespace) -> list[tuple]:
    """(activation, dtype, case, inplace, provider) of all rows."""
    return [
        (activation, dtype, case, inplace, provider)
        for activation, dtype, case, inplace, provider in itertools.product(
            ACTIVATIONS, arguments.dtypes, CASES, (False, True), compared
        )
        if provider.function(activation, inplace) is not None
        and not (provider.compiles and inplace)
        and not (provider.compiles and case in NETWORKS and not arguments.compile_networks)
    ]


def measured(case: tuple) -> dict:
    """The row of one case, in bytes for each element that an activation computes."""
    activation, dtype, name, inplace, provider = case
    numel = activation_numel(name, IMAGES if name in NETWORKS else SHAPE)
    row = {
        "provider": provider.name,
        "activation": activation.name,
        "dtype": dtype,
        "case": name,
        "inplace": inplace,
        "numel": numel,
        "saved_bytes": "",
        "held_bytes": "",
        "peak_bytes": "",
        "error": "",
    }
    try:
        found = measure(provider, activation, DTYPES[dtype], name, inplace)
    except Exception as error:
        return row | {"error": providers.error_text(error)}
    return row | {column: bytes_ / numel for column, bytes_ in found.items()}


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["error"]:
        return "failed"
    figures = (row["saved_bytes"], row["held_bytes"], row["peak_bytes"])
    return " / ".join(f"{figure:.3f}" for figure in figures if figure != "")


def print_results(rows: list[dict], names: list[str]) -> None:
    figures = "saved / held / peak" if DEVICE.type == "cuda" else "saved for backward"
    print(f"\nBytes an element: {figures}\n")
    found = {}
    for row in rows:
        inplace = " in place" if row["inplace"] else ""
        key = f"{row['activation']} {row['dtype']} {row['case']}{inplace}"
        found.setdefault(key, {})[row["provider"]] = row
    lines = [(key, *(cell(cells.get(name)) for name in names)) for key, cells in found.items()]
    print(environment.table(["", *names], lines))
    providers.print_errors(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    environment.add_results_argument(parser)
    parser.add_argument(
        "--dtypes", choices=DTYPES, nargs="+", default=["bf16"], help="default: bf16"
    )
    parser.add_argument(
        "--compile-networks", action="store_true", help="compile the networks, too; takes minutes"
    )
    return parser.parse_args()


def main() -> list[dict]:
    arguments = parse_arguments()
    environment.print_environment()
    compared = providers.available()
    if DEVICE.type == "cpu":
        print("NO GPU: no allocator to ask, and no CUDA C++ kernel ran.")
    torch.manual_seed(0)
    all_cases = cases(compared, arguments)
    rows = environment.write_csv(
        arguments.results / "memory.csv",
        map(measured, environment.progress(all_cases, len(all_cases))),
    )
    print_results(rows, [provider.name for provider in compared])
    return rows


if __name__ == "__main__":
    environment.run(main)
