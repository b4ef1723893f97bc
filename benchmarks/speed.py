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
then the other dtypes at 256 MiB. On a GPU code is compiled for large tensors of the first dtype
alone, since that takes most of the time. --edges measures the first dtype: on a GPU 2^30 elements,
then the other layouts; it writes speed_edges.csv. What does not fit into memory or into the time
limit gets rows that say so. Exit status: 0, 1 if something failed, 2 if it cannot be done, 130 if
interrupted; the rows so far are kept.
"""

from __future__ import annotations

import argparse
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

from benchmarks import environment, options, providers, speed_results, timing, workloads
from benchmarks.providers import COPY, DEVICE, DTYPES, FALLBACK, PROVIDERS, Provider
from benchmarks.workloads import LAYOUTS, Workload

ON_GPU = DEVICE.type == "cuda"
LARGE = 2**28  # bytes of a tensor; several times what the largest L2 cache holds
SMALL = 2**20  # elements; above, a launch is a small part of the time
TENSORS = 24  # of the size of x, that all who take turns hold at the same time
QUANTILES = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)

OUT_OF_MEMORY = "out of memory"


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
        """Context for making and timing a contender. An exception inside ends this one only."""
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
                before = self.is_bound_by_host()
                found = self.turn()
                if self.is_bound_by_host() != before:  # times of the device alone are not alike
                    self.samples = []
                self.samples += found

    def is_bound_by_host(self) -> bool:
        return getattr(self.turn, "is_bound_by_host", False)

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
            "bound": "host" if self.is_bound_by_host() else "device",
        }


def is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator raises a RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
        bytes_ = workloads.bytes_moved(
            direction, DTYPES[workload.dtype], workload.numel(), has_mask, workload.widens()
        )
        if kernels is not None and workloads.offers(kernels, direction):
            parameters = providers.parameters(workload.activation)
            make = partial(workloads.kernel_call, kernels, parameters, direction)
            make = workloads.with_fp32_weights(make) if provider.is_ours else make
            found += [Contender(provider, "kernel", launch, bytes_, make) for launch in launches]
        if function is not None:
            make, autograd = (
                partial(workloads.public_call, function, direction),
                direction != "inference",
            )
            for launch in launches:
                # Autograd runs backward on the stream of forward, which is not that of a capture.
                if (launch, direction) != ("graph", "backward"):
                    found.append(Contender(provider, "public", launch, bytes_, make, autograd))
    copies = dict.fromkeys((one.launch, one.bytes) for one in found)
    return [
        *(
            Contender(COPY, "kernel", *copy, partial(workloads.copy_call, copy[1]))
            for copy in copies
        ),
        *found,
    ]


def measure(
    workload: Workload, compared: Sequence[Provider], method: Method, skipped: str = ""
) -> Iterator[dict]:
    """One row for each contender in each direction of `workload`.

    Args:
        skipped: why nothing is to be measured, if so.
    """
    tensors, nothing = (), {"skipped": skipped}
    if not skipped:
        try:
            tensors = workload.tensors()
        except Exception as error:
            # An error may be what one of another workload has left behind.
            is_skipped = is_out_of_memory(error)
            reason = OUT_OF_MEMORY if is_skipped else providers.error_text(error)
            nothing = {"skipped" if is_skipped else "error": reason}
    torch.compiler.reset()  # compiled code shares one cache, which after 8 entries is not used
    functions = {}
    for provider in compared:
        function = provider.function(workload.activation, False)
        functions[provider] = function and provider.compile(function)
    launches = [name for name in method.turns if name != "graph" or workload.numel() <= SMALL]
    for direction in workload.directions():
        found = contenders(workload, direction, functions, launches)
        if not tensors:
            found = [dataclasses.replace(one, **nothing) for one in found]
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
        return list(dict.fromkeys(itertools.product(dtypes, arguments.sizes, layouts)))
    if arguments.full:
        layouts = arguments.layouts or list(LAYOUTS)
        return list(itertools.product(dtypes, (2**n for n in range(10, 31)), layouts))
    large = {name: LARGE // DTYPES[name].itemsize if ON_GPU else 2**20 for name in dtypes}
    first = dtypes[0]
    if arguments.edges:
        found = [(first, large[first], layout) for layout in arguments.layouts or others]
        return [(first, 2**30, contiguous), *found] if ON_GPU else found
    if arguments.quick:
        sizes = [large[first], 2**14] if ON_GPU else [large[first]]
        return [(first, numel, layout) for layout in layouts for numel in sizes]
    sizes = [2**n for n in (10, 14, 18, 22)]
    found = [
        (first, large[first], layouts[0]),
        *((first, numel, layouts[0]) for numel in sizes),
        *((dtype, large[dtype], layouts[0]) for dtype in dtypes[1:]),
        *((first, large[first], layout) for layout in layouts[1:]),
    ]
    return list(dict.fromkeys(found))


def takes_part(provider: Provider, workload: Workload, arguments: argparse.Namespace) -> bool:
    """Whether a provider is timed. On a GPU code is compiled where it says most.

    Compiling takes most of the time there, so it is done for large tensors of the first dtype,
    unless sizes are asked for.
    """
    if not (ON_GPU and provider.compiles) or arguments.full or arguments.sizes:
        return True
    is_first = (workload.dtype, workload.layout) == (arguments.dtypes[0], "contiguous")
    return is_first and workload.bytes() >= LARGE


def measure_all(
    arguments: argparse.Namespace, compared: Sequence[Provider], method: Method
) -> Iterator[dict]:
    deadline = time.monotonic() + time_limit(arguments)
    workloads = [
        Workload(activation, *what)
        for what in grid(arguments)
        for activation in dict.fromkeys(arguments.activations)
    ]
    # Graphs are kept, which compiled code that reuses its saved buffers would not allow.
    with torch._functorch.config.patch(donated_buffer=False):
        for workload in environment.progress(workloads, len(workloads)):
            found = [each for each in compared if takes_part(each, workload, arguments)]
            yield from measure(workload, found, method, reason_to_skip(workload, deadline))


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
        "--full", action="store_true", help="every dtype, every 2^n, every layout: many hours"
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
    options.add_time_limit(parser, "150 on a GPU, but for --full")


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
    print(workloads.BYTES)
    torch.manual_seed(0)
    found = measure_all(arguments, compared, method)
    name = "speed_edges.csv" if arguments.edges else "speed.csv"
    rows = environment.write_csv(arguments.results / name, found)
    speed_results.print_results(rows)
    speed_results.print_verdicts(rows)
    return rows
