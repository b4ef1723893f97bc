"""How long the kernels take, next to everything a user could pick instead.

    python -m benchmarks speed [--quick | --full | --edges] [--sizes 2^14 2^27] [--dtypes bf16]

The yardstick is a copy that moves the same bytes, timed among the others: no kernel that has to
move these bytes is much faster. Every median comes as a share of it. Where that is over 100 %, the
call moved fewer bytes than the formula says: `torch.compile` saves a byte for ReLU6's gradient.

- kernel: raw ops without autograd, which write into an output that is there already, where the op
  can. Backward, and masks, are allocated, by ours and by the others alike. public: what users call,
  through autograd; backward is `torch.autograd.grad` alone, through a graph that is kept.
- call: on a GPU the time between two events around the call, the L2 cache cleared before it. Before
  the first event the GPU waits until the host has put the whole call into its queue, so the time is
  that of the device alone. What the call costs the host is a column of its own, host_us. `bound`
  says "host" where no wait was long enough, and "device" where the time is that of the device.
  graph: small tensors once more, 200 runs in one CUDA graph, the L2 cache warm; what is left is the
  kernel without its launch.
- All take turns, in rounds, each round in another order: heat and clocks, or a busy machine, meet
  all of them alike. The quantiles are those of all runs of all rounds.
- forward is that of training, in which our ReLU6 and CReLU also write a mask; inference writes
  none. PReLU and the learnable Swish have a weight for each channel, and CReLU makes two channels
  of one: their tensors have channels, up to 256.
- Without a GPU no kernel runs: what is compared is the fallback, what is compiled, and torch's own,
  on one CPU thread, caches warm.

By default the first dtype at 256 MiB (on a CPU 2^20 elements) and at four sizes from 2^10 to 2^22,
for which nothing is compiled on a GPU, since that takes most of the time; then the other dtypes at
256 MiB. --edges measures the first dtype in the other layouts and, on a GPU, 2^30 elements, and
writes speed_edges.csv. What does not fit into memory or into the time limit gets rows that say so.
Exit status: 0, 1 if something failed, 2 if it cannot be done, 130 if interrupted; the rows so far
are kept.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks import environment, options, providers, timing
from benchmarks.providers import DEVICE, DTYPES, FALLBACK, PROVIDERS, Provider
from fused_act.dispatch import Kernels
from fused_act.families.base import Row
from tests.shared.facts import FACTS

BYTES = """\
Bytes an element of x, of `s` bytes, that have to be moved:
  inference, forward   2 s     (read x, write y);  forward with a mask of bits   + 1/8
  backward             3 s     (read grad_output and x, write grad_input);  from a mask   2 s + 1/8
Of CReLU, whose y and grad_output are twice as long, 3 s, + 1/4, 4 s and 3 s + 1/4. Weights are few.
"""
ON_GPU = DEVICE.type == "cuda"
LARGE = 2**28  # bytes of a tensor; several times what the largest L2 cache holds
SMALL = 2**20  # elements; above, a launch is a small part of the time
TENSORS = 24  # of the size of x, that all who take turns hold at the same time
QUANTILES = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)

OUT_OF_MEMORY = "out of memory"

COPY = Provider("copy", lambda *_: None)
OURS = {provider.name for provider in (*PROVIDERS, FALLBACK) if provider.is_ours}


def channels_last(*shape: int, **options) -> Tensor:
    if len(shape) == 1:
        shape = shape[0] // 256, 16, 4, 4
    return torch.empty(shape, memory_format=torch.channels_last, **options).normal_()


def odd(*shape: int, **options) -> Tensor:
    """No multiple of 16 elements, and no row of it either."""
    return torch.randn(*shape[:-1], shape[-1] // 16 * 16 - 1, **options)


def misaligned(*shape: int, **options) -> Tensor:
    return torch.randn(math.prod(shape) + 1, **options)[1:].view(shape)


# Tensors of a shape, or of about its number of elements.
LAYOUTS = {
    "contiguous": torch.randn,
    "channels_last": channels_last,
    "odd": odd,
    "misaligned": misaligned,
}


def with_channels(numel: int) -> tuple[int, int, int, int]:
    """A shape of images: up to 256 channels of up to 1024 pixels, but for what does not divide."""
    channels = max(1, min(256, numel // 64))
    pixels = min(1024, numel // channels)
    return numel // (channels * pixels), channels, pixels // 16, 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """What all providers compute, so that their times can be compared."""

    activation: Row
    dtype: str
    size: int
    layout: str

    def x(self, device: torch.device | str = DEVICE) -> Tensor:
        return self.tensor(1, device)

    def tensors(self) -> tuple[Tensor, ...]:
        """x, grad_output and the weight, if there is one."""
        x, grad_output = self.x(), self.tensor(self.widens())
        options = {"dtype": x.dtype, "device": x.device}
        channels = x.size(1) if x.dim() > 1 else 1
        return x, grad_output, *providers.weights(self.activation, channels, **options)

    def tensor(self, widens: int, device: torch.device | str = DEVICE) -> Tensor:
        """Args: widens: how many times the channels of x it has."""
        shape = (self.size,)
        if self.activation.family != "elementwise":
            images, channels, *pixels = with_channels(self.size)
            shape = images, widens * channels, *pixels
        return LAYOUTS[self.layout](*shape, dtype=DTYPES[self.dtype], device=device)

    def widens(self) -> int:
        return FACTS[self.activation.name].widens

    def numel(self) -> int:
        return self.x("meta").numel()

    def bytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    def directions(self) -> list[str]:
        """Inference is the same kernel as forward where no mask is written."""
        inference = ["inference"] if self.activation.Function.saves == "mask" else []
        return [*inference, "forward", "backward", "forward+backward"]


class Method(NamedTuple):
    """How times are taken: what makes the turns of each launch, how many, and how long they are."""

    turns: dict[str, Callable[[Callable, float], timing.Turn]]
    rounds: int
    seconds: float


@dataclasses.dataclass
class Contender:
    """One who takes turns.

    Args:
        make: `make(x, grad_output)`, with the weight behind if there is one, is the call to be
            timed.
        autograd: whether it is made and called with autograd on.
        samples: the seconds of its runs; none if it was `skipped` or met with an `error`.
    """

    provider: Provider
    api: str
    launch: str
    bytes: int
    make: Callable[..., Callable]
    autograd: bool = False
    turn: timing.Turn | None = None
    samples: list[float] = dataclasses.field(default_factory=list)
    skipped: str = ""
    error: str = ""

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Where it is made and takes its turns; what it raises ends its part, and no other's."""
        try:
            with self.provider.selected(), torch.set_grad_enabled(self.autograd):
                yield
        except Exception as error:
            self.turn, self.samples = None, []
            if is_out_of_memory(error):
                self.skipped = OUT_OF_MEMORY
            else:
                self.error = providers.error_text(error)

    def prepare(self, method: Method, tensors: Sequence[Tensor]) -> None:
        with self.at_work():
            call = self.make(*tensors)
            call()  # compiles
            self.turn = method.turns[self.launch](call, method.seconds)

    def take_turn(self) -> None:
        if self.turn is not None:
            with self.at_work():
                self.samples += self.turn()

    def times(self) -> list[float]:
        """Median, 20 % and 80 % quantile, in ms."""
        milliseconds = 1000 * torch.tensor(self.samples, dtype=torch.float64)
        return milliseconds.quantile(QUANTILES).tolist()

    def host_side(self) -> dict[str, object]:
        """What a call costs the host in µs, and whose time it is that was taken."""
        if not self.samples or not isinstance(self.turn, timing.GpuTurn):
            return {"host_us": "", "bound": ""}
        host_us = 1e6 * statistics.median(self.turn.host_seconds)
        return {
            "host_us": host_us if self.launch == "call" else "",
            "bound": "host" if self.turn.is_bound_by_host else "device",
        }


def is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator raises a RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def bytes_moved(
    direction: str, dtype: torch.dtype, numel: int, has_mask: bool, widens: int = 1
) -> int:
    """Args: widens: how many elements of y there are for one of x."""
    x, y = numel * dtype.itemsize, widens * numel * dtype.itemsize
    mask = (widens * numel + 7) // 8
    forward = x + y + (mask if has_mask else 0)
    backward = y + x + (mask if has_mask else x)
    return {
        "inference": x + y,
        "forward": forward,
        "backward": backward,
        "forward+backward": forward + backward,
    }[direction]


def copy_call(bytes_: int, x: Tensor, *others: Tensor) -> Callable[[], Tensor]:
    """A copy that reads half of `bytes_` and writes the other half."""
    source = torch.randint(256, (bytes_ // 2,), dtype=torch.uint8, device=x.device)
    return partial(torch.empty_like(source).copy_, source)


def kernel_call(
    kernels: Kernels,
    parameters: tuple[float, ...],
    direction: str,
    x: Tensor,
    grad_output: Tensor,
    *weights: Tensor,
) -> Callable[[], object]:
    """The ops behind one direction, below autograd."""
    parameters = *weights, *parameters
    saved, layout = x, ()
    if kernels.forward_with_mask is not None and direction != "inference":
        op = kernels.forward_with_mask
        if kernels.forward_with_mask_out is not None:
            op = partial(kernels.forward_with_mask_out, out=torch.empty_like(x))
        found = op(x, *parameters)
        saved, layout = found[1] if isinstance(found, tuple) else found, (x.stride(),)
    elif kernels.forward_out is not None:
        op = partial(kernels.forward_out, out=torch.empty_like(x))
    else:
        op = kernels.forward
    forward = partial(op, x, *parameters)
    backward = kernels.backward
    if backward is None:
        saved, backward = kernels.forward(x, *parameters), kernels.backward_from_output
    if direction in ("inference", "forward"):
        return forward
    backward = partial(backward, grad_output, saved, *parameters, *layout)
    return backward if direction == "backward" else lambda: (forward(), backward())


def with_fp32_weights(make: Callable[..., Callable]) -> Callable[..., Callable]:
    """As our raw ops take them."""
    return lambda x, grad_output, *weights: make(x, grad_output, *map(Tensor.float, weights))


def public_call(
    function: Callable[..., Tensor],
    direction: str,
    x: Tensor,
    grad_output: Tensor,
    *weights: Tensor,
) -> Callable[[], object]:
    """One direction of `function` as a user runs it."""
    if direction == "inference":
        return partial(function, x, *weights)
    leaves = [each.detach().requires_grad_() for each in (x, *weights)]
    if direction == "backward":
        y = function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, grad_output, retain_graph=True)
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad_output)
    return partial(function, *leaves)


def offers(kernels: Kernels, direction: str) -> bool:
    """Whether the ops of one direction are all there."""
    forward = kernels.forward is not None
    backward = kernels.backward is not None or kernels.backward_from_output is not None
    return {"backward": backward, "forward+backward": forward and backward}.get(direction, forward)


def contenders(
    workload: Workload,
    direction: str,
    functions: dict[Provider, Callable | None],
    launches: Sequence[str],
) -> list[Contender]:
    """All that are timed in one direction, and the copies of as many bytes.

    Args:
        functions: the public function of each provider; None where it has none.
    """
    found = []
    for provider, function in functions.items():
        kernels = provider.kernels(workload.activation) if provider.kernels else None
        has_mask = kernels is not None and kernels.forward_with_mask is not None
        bytes_ = bytes_moved(
            direction, DTYPES[workload.dtype], workload.numel(), has_mask, workload.widens()
        )
        if kernels is not None and offers(kernels, direction):
            parameters = providers.parameters(workload.activation)
            make = partial(kernel_call, kernels, parameters, direction)
            make = with_fp32_weights(make) if provider.is_ours else make
            found += [Contender(provider, "kernel", launch, bytes_, make) for launch in launches]
        if function is not None:
            make, autograd = partial(public_call, function, direction), direction != "inference"
            for launch in launches:
                # Autograd runs backward on the stream of forward, which is not that of a capture.
                if (launch, direction) != ("graph", "backward"):
                    found.append(Contender(provider, "public", launch, bytes_, make, autograd))
    copies = dict.fromkeys((one.launch, one.bytes) for one in found)
    return [
        *(Contender(COPY, "kernel", *copy, partial(copy_call, copy[1])) for copy in copies),
        *found,
    ]


def measure(
    workload: Workload, compared: Sequence[Provider], method: Method, skipped: str = ""
) -> Iterator[dict]:
    """One row for each contender in each direction of `workload`.

    Args:
        skipped: why nothing is to be measured, if so.
    """
    tensors = ()
    if not skipped:
        try:
            tensors = workload.tensors()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            skipped = OUT_OF_MEMORY
    torch.compiler.reset()  # compiled code shares one cache, which after 8 entries is not used
    functions = {}
    for provider in compared:
        function = provider.function(workload.activation, False)
        functions[provider] = function and provider.compile(function)
    launches = [name for name in method.turns if name != "graph" or workload.numel() <= SMALL]
    for direction in workload.directions():
        found = contenders(workload, direction, functions, launches)
        if skipped:
            found = [dataclasses.replace(one, skipped=skipped) for one in found]
        else:
            for one in found:
                one.prepare(method, tensors)
            timing.in_rounds([one.take_turn for one in found], method.rounds)
        copies = {
            (one.launch, one.bytes): one.times()[0]
            for one in found
            if one.provider is COPY and one.samples
        }
        clocks = environment.clocks()
        for one in found:
            yield row(workload, direction, one, copies.get((one.launch, one.bytes))) | clocks


def row(workload: Workload, direction: str, contender: Contender, copy: float | None) -> dict:
    """Args: copy: the median of the copy of as many bytes, in ms."""
    times = contender.times() if contender.samples else None
    return {
        "provider": contender.provider.name,
        "activation": workload.activation.name,
        "dtype": workload.dtype,
        "direction": direction,
        "layout": workload.layout,
        "numel": workload.numel(),
        "api": contender.api,
        "launch": contender.launch,
        **dict(zip(("median", "q20", "q80"), times or ("", "", ""))),
        "unit": "ms",
        "samples": len(contender.samples),
        "bytes": contender.bytes,
        "gbps": contender.bytes / times[0] / 1e6 if times else "",
        "share_of_copy": copy / times[0] if times and copy else "",
        **contender.host_side(),
        "skipped": contender.skipped,
        "error": contender.error,
    }


def reason_to_skip(workload: Workload, deadline: float) -> str:
    if time.monotonic() > deadline:
        return "over the time limit"
    needed, there = (bytes_ / 2**30 for bytes_ in (TENSORS * workload.bytes(), memory_bytes()))
    if needed > there:
        return f"over the cap: {TENSORS} such tensors take {needed:.0f} of {there:.0f} GiB"
    return ""


def memory_bytes() -> int:
    if ON_GPU:
        return torch.cuda.get_device_properties(DEVICE).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def grid(arguments: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Dtype, size and layout of what is measured, what matters most first."""
    contiguous, *others = LAYOUTS
    dtypes, layouts = arguments.dtypes, arguments.layouts or [contiguous]
    if arguments.sizes:
        return list(itertools.product(dtypes, arguments.sizes, layouts))
    if arguments.full:
        layouts = arguments.layouts or list(LAYOUTS)
        return list(itertools.product(dtypes, (2**n for n in range(10, 31)), layouts))
    large = {name: LARGE // DTYPES[name].itemsize if ON_GPU else 2**20 for name in dtypes}
    first = dtypes[0]
    if arguments.edges:
        found = [(first, large[first], layout) for layout in arguments.layouts or others]
        return [*found, (first, 2**30, contiguous)] if ON_GPU else found
    if arguments.quick:
        sizes = [large[first], 2**14] if ON_GPU else [large[first]]
        return [(first, numel, layouts[0]) for numel in sizes]
    sizes = [2**n for n in (10, 14, 18, 22)]
    found = [
        (first, large[first], layouts[0]),
        *((first, numel, layouts[0]) for numel in sizes),
        *((dtype, large[dtype], layouts[0]) for dtype in dtypes[1:]),
        *((first, large[first], layout) for layout in layouts[1:]),
    ]
    return list(dict.fromkeys(found))


def takes_part(provider: Provider, workload: Workload, arguments: argparse.Namespace) -> bool:
    """On a GPU, where compiling takes most of the time, nothing is compiled for small tensors."""
    sizes_are_asked_for = arguments.full or arguments.sizes
    return not (
        ON_GPU and provider.compiles and not sizes_are_asked_for and workload.bytes() < LARGE
    )


def measure_all(
    arguments: argparse.Namespace, compared: Sequence[Provider], method: Method
) -> Iterator[dict]:
    deadline = time.monotonic() + time_limit(arguments)
    workloads = [
        Workload(activation, *what)
        for what in grid(arguments)
        for activation in arguments.activations
    ]
    # Graphs are kept, which compiled code that reuses its saved buffers would not allow.
    with torch._functorch.config.patch(donated_buffer=False):
        for workload in environment.progress(workloads, len(workloads)):
            found = [each for each in compared if takes_part(each, workload, arguments)]
            yield from measure(workload, found, method, reason_to_skip(workload, deadline))


def quotable(row: dict[str, str]) -> bool:
    """Whether a time of speed.csv is that of the device.

    Where there is no column `bound`, which older files do not have, the host had a part in the time
    between two events wherever it took longer than the clearing of the L2 cache and the kernels:
    for kernels on 2^22 elements and fewer, and for public functions of less than 0.6 ms, which is
    what the slowest took the host. Their CUDA graphs had so few runs that they took as long as a
    graph needs to start.
    """
    if not row["median"]:
        return False
    if row.get("bound") or not row["gpu"]:
        return row.get("bound") != "host"
    if row["api"] == "kernel":
        return row["launch"] == "call" and int(row["numel"]) > 2**22
    return row["launch"] == "call" and float(row["median"]) >= 0.6


def comparison(row: dict) -> tuple:
    """What has to be alike for two rows to be compared."""
    columns = ("api", "launch", "activation", "direction", "dtype", "numel", "layout")
    return tuple(row[column] for column in columns)


def by_comparison(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """The rows by what was computed and how, then by who computed it."""
    found = {}
    for row in rows:
        found.setdefault(comparison(row), {})[row["provider"]] = row
    return found


def describe(compared: tuple) -> str:
    _, _, activation, direction, dtype, numel, layout = compared
    return f"{activation} {direction} {dtype} {options.size_name(numel)} {layout}"


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["error"] or row["skipped"]:
        return "failed" if row["error"] else "skipped"
    share = f" {row['share_of_copy']:5.0%}" if row["share_of_copy"] else ""
    host = f" {row['host_us']:4.0f} µs" if row["host_us"] else ""
    bound = " HOST" if row["bound"] == "host" else ""
    return f"{row['median']:.4f}{share}{host}{bound}"


def print_results(rows: list[dict]) -> None:
    compared = by_comparison(rows)
    for api, launch in dict.fromkeys(key[:2] for key in compared):
        found = {key: by_name for key, by_name in compared.items() if key[:2] == (api, launch)}
        names = dict.fromkeys(name for by_name in found.values() for name in by_name)
        lines = [
            (describe(key), *(cell(by_name.get(provider)) for provider in names))
            for key, by_name in found.items()
        ]
        print(
            f"\n{api}, {launch}: median in ms, share of a copy of the same bytes, on a GPU what a "
            "call costs the host; HOST where the median is not that of the device alone\n"
        )
        print(environment.table(["", *names], lines))
    providers.print_errors(rows)
    for reason, count in collections.Counter(row["skipped"] for row in rows).items():
        if reason:
            print(f"{count} rows skipped: {reason}")


class Verdict(NamedTuple):
    """One of ours beside the best alternative; `ratio` > 1 is what it gains."""

    ratio: float
    word: str

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x {self.word:6}"


def verdict(own: dict, other: dict) -> Verdict:
    """Even where the ranges from the 20 % to the 80 % quantile overlap."""
    word = "even"
    if own["q80"] < other["q20"]:
        word = "faster"
    elif own["q20"] > other["q80"]:
        word = "slower"
    return Verdict(other["median"] / own["median"], word)


def verdicts(rows: list[dict]) -> list[tuple[tuple, dict, dict[str, Verdict]]]:
    """What was compared, the row of the best alternative, and what that makes of each of ours."""
    found = []
    for compared, by_provider in by_comparison(rows).items():
        timed = {name: row for name, row in by_provider.items() if row["samples"]}
        ours = [name for name in timed if name in OURS]
        others = [row for name, row in timed.items() if name not in OURS and name != COPY.name]
        if ours and others:
            best = min(others, key=lambda row: row["median"])
            found.append((compared, best, {name: verdict(timed[name], best) for name in ours}))
    return sorted(found, key=lambda one: max(one[2].values()))


def print_verdicts(rows: list[dict]) -> None:
    found = verdicts(rows)
    if not found:
        return
    names = dict.fromkeys(name for *_, by_name in found for name in by_name)
    lines = [
        (
            f"{compared[0]}, {compared[1]}: {describe(compared)}",
            *(str(by_name.get(name, "-")) for name in names),
            f"{best['provider']} {best['median']:.4f}",
        )
        for compared, best, by_name in found
    ]
    print("\nOurs beside the best alternative: what is lost comes first, then what is gained\n")
    print(environment.table(["", *names, "best alternative, ms"], lines))
    print("\nEven means that the ranges from the 20 % to the 80 % quantile overlap.")
    for name in names:
        words = collections.Counter(by_name[name].word for *_, by_name in found if name in by_name)
        print(
            name, *(f"{word} in {words[word]}" for word in ("slower", "even", "faster")), sep=", "
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="one dtype, one or two sizes")
    extent.add_argument(
        "--edges",
        action="store_true",
        help="other layouts, and 2^30 elements on a GPU; writes speed_edges.csv",
    )
    extent.add_argument(
        "--full", action="store_true", help="every dtype, every 2^n, every layout: an hour or more"
    )
    options.add_sizes(extent, None, "see above")
    options.add_dtypes(parser, list(DTYPES))
    parser.add_argument(
        "--layouts",
        choices=LAYOUTS,
        nargs="+",
        help="default: contiguous; with --full all, with --edges all others",
    )
    options.add_activations(parser)
    names = [provider.name for provider in (*PROVIDERS, FALLBACK)]
    parser.add_argument("--providers", choices=names, nargs="+", default=names, help="default: all")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start nothing further after so long; default: 150 on a GPU, but for --full",
    )


def time_limit(arguments: argparse.Namespace) -> float:
    if arguments.time_limit is not None:
        return arguments.time_limit
    return 150.0 if ON_GPU and not arguments.full else math.inf


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    there = [*providers.available(), *([] if ON_GPU else [FALLBACK])]
    compared = [provider for provider in there if provider.name in arguments.providers]
    if not compared:
        environment.refuse(f"none of {', '.join(arguments.providers)} can run here")
    if ON_GPU:
        turns = {"call": timing.gpu_turn, "graph": timing.graph_turn}
        method = Method(turns, rounds=3 if arguments.quick else 5, seconds=0.003)
    else:
        print("NO GPU: these are times of one CPU thread, caches warm; no kernel ran on a GPU.")
        torch.set_num_threads(1)  # several wait for each other on a busy machine
        turns = {"call": timing.cpu_turn}
        method = Method(turns, rounds=5 if arguments.quick else 9, seconds=0.005)
    print(BYTES)
    torch.manual_seed(0)
    found = measure_all(arguments, compared, method)
    name = "speed_edges.csv" if arguments.edges else "speed.csv"
    rows = environment.write_csv(arguments.results / name, found)
    print_results(rows)
    print_verdicts(rows)
    return rows
