"""What a call costs on the host beside torch's own, in microseconds, for 16 elements on a CPU.

    python -m benchmarks overhead [--rounds 31]

- fallback: functions and modules where no kernel runs, beside `torch.nn.functional` and `torch.nn`.
- compiled: the same under `torch.compile`, which checks at each call that no backend was forced.
- kernels: all of a call but the kernel. A stub, forced, stands in for a backend: its kernels
  allocate what real ones return and compute nothing. Beside it stand such a kernel alone and, where
  x requires grad, the shortest `torch.autograd.Function` that calls it, saves as much and returns
  as much: that is autograd's own price.
- import: what `python -X importtime` says of `import torch, fused_act`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_act
from benchmarks import environment, options, timing
from benchmarks.providers import FEATURED
from fused_act import dispatch
from fused_act.dispatch import Backend, Kernels
from fused_act.families.elementwise import Elementwise

NUMEL = 16
SECONDS = 0.002  # of one turn

PUBLIC = (
    ("mish", fused_act.mish, "F.mish", F.mish),
    ("silu", fused_act.silu, "F.silu", F.silu),
    ("relu6", fused_act.relu6, "F.relu6", F.relu6),
    ("Mish()", fused_act.Mish(), "nn.Mish()", nn.Mish()),
    ("SiLU()", fused_act.SiLU(), "nn.SiLU()", nn.SiLU()),
    ("ReLU6()", fused_act.ReLU6(), "nn.ReLU6()", nn.ReLU6()),
)


def stub_kernels(activation: Elementwise) -> Kernels:
    def forward(x, *parameters):
        return torch.empty_like(x)

    def forward_with_mask(x, *parameters):
        return torch.empty_like(x), torch.empty(NUMEL // 8, dtype=torch.uint8)

    with_mask = forward_with_mask if activation.saves == "mask" else None
    return activation.eager._replace(forward=forward, forward_with_mask=with_mask)


@contextlib.contextmanager
def forced_stub() -> Iterator[dict[str, Kernels]]:
    """Force the stub for as long as this is entered; gives its kernels."""
    kernels = {activation.name: stub_kernels(activation) for activation in FEATURED}
    previous = dispatch.forced
    dispatch.forced = Backend("stub", lambda: None, lambda: kernels, ("cpu",)).ready()
    try:
        yield kernels
    finally:
        dispatch.forced = previous


def shortest_function(kernels: Kernels) -> Callable[[Tensor], object]:
    """The `apply` of a Function that does for autograd what ours must, and nothing else."""

    def forward(ctx, x):
        if kernels.forward_with_mask is None:
            ctx.save_for_backward(x)
            return kernels.forward(x)
        y, mask = kernels.forward_with_mask(x)
        anchor = y.new_empty(0)
        ctx.save_for_backward(mask, anchor)
        return y, anchor

    methods = {"forward": staticmethod(forward)}
    return type("Shortest", (torch.autograd.Function,), methods).apply


def row(path: str, call: str, grad: bool, ours: float, reference: str, theirs: float) -> dict:
    return {
        "path": path,
        "call": call,
        "requires_grad": grad,
        "us": 1e6 * ours,
        "reference": reference,
        "reference_us": 1e6 * theirs,
        "added_us": 1e6 * (ours - theirs),
    }


def public_rows(path: str, prepare: Callable[[Callable], Callable], rounds: int) -> Iterator[dict]:
    for (call, ours, reference, theirs), grad in itertools.product(PUBLIC, (False, True)):
        torch.compiler.reset()  # compiled code shares one cache, which is limited
        x = torch.randn(NUMEL, requires_grad=grad)
        calls = {call: partial(prepare(ours), x), reference: partial(prepare(theirs), x)}
        times = timing.interleaved(calls, rounds, SECONDS)
        yield row(path, call, grad, times[call], reference, times[reference])


def kernel_rows(rounds: int) -> Iterator[dict]:
    with forced_stub() as kernels:
        for activation in FEATURED:
            ours, stub = getattr(fused_act, activation.name), kernels[activation.name]
            inference, training = torch.randn(NUMEL), torch.randn(NUMEL, requires_grad=True)
            calls = {
                "inference": partial(ours, inference),
                "kernel": partial(stub.forward, inference),
                "training": partial(ours, training),
                "training kernel": partial(stub.forward_with_mask or stub.forward, inference),
                "Function": partial(shortest_function(stub), training),
            }
            times = timing.interleaved(calls, rounds, SECONDS)
            for call, grad, reference, theirs in (
                ("inference", False, "the kernel alone", "kernel"),
                ("training", True, "the kernel alone", "training kernel"),
                ("training", True, "the shortest Function", "Function"),
            ):
                yield row("kernels", activation.name, grad, times[call], reference, times[theirs])


def import_rows(runs: int = 5) -> Iterator[dict]:
    command = [sys.executable, "-X", "importtime", "-c", "import torch, fused_act"]
    found = {"torch": [], "fused_act": []}
    for _ in range(runs):
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for name, seconds in found.items():
            (cumulative,) = re.findall(rf"(\d+) \| {name}$", report, re.MULTILINE)
            seconds.append(1e-6 * int(cumulative))
    torchs, ours = (statistics.median(seconds) for seconds in found.values())
    yield row("import", "import torch, fused_act", False, torchs + ours, "import torch", torchs)


def print_results(rows: list[dict]) -> None:
    header = ("", "x requires grad", "us", "beside", "us", "added")
    for path in dict.fromkeys(found["path"] for found in rows):
        lines = [
            (
                found["call"],
                "yes" if found["requires_grad"] else "no",
                f"{found['us']:.2f}",
                found["reference"],
                f"{found['reference_us']:.2f}",
                f"{found['added_us']:+.2f}",
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
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    found = itertools.chain(
        public_rows("fallback", lambda call: call, arguments.rounds),
        kernel_rows(arguments.rounds),
        public_rows("compiled", compiled, arguments.rounds),
        import_rows(),
    )
    rows = environment.write_csv(arguments.results / "overhead.csv", found)
    print_results(rows)
    return rows
