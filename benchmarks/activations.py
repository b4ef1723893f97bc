"""The gallery and the comparison sheet of all activations.

    python -m benchmarks activations [--results FOLDER]

activations.png shows each function with its derivative, as autograd gives it; dotted where the
derivative jumps, on grey where it is less than 0.01. activations.csv has a row for each:

- kinks, range, whether it is monotonic, the mean of its output for standard normal input (0 if it
  is zero-centred), where it saturates: all found by evaluating it in float64;
- instructions for an element of a bf16 tensor on sm_90, as benchmarks/results/machine_code has
  them; the bytes that its kernels move for it and save for backward;
- the time of forward and backward on this machine, ours and torch's, as a share of that of torch's
  ReLU, medians of calls that take turns. Where no GPU is, ours are torch's own ops.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import environment, options, pictures, timing
from benchmarks.pictures import BLUE, VERMILLION
from tests.shared.facts import ALL, Facts

WINDOW = (-6.0, 8.0)
POINTS = 4001
FLAT = 0.01  # a derivative of less is said to be saturated
JUMP = 0.05  # of the derivative, from one point of the window to the next
# What a core's own cache holds: beyond it, a CPU's times are those of what else uses its memory.
TIMED = {"cpu": (4, 64, 16, 16), "cuda": (64, 64, 16, 16)}
MACHINE_CODE = environment.ROOT / "results" / "machine_code" / "ours.csv"


def curves(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and dy/dx for a vector of float64, a row for each channel that is made of one."""
    x = x.detach().reshape(-1, 1).requires_grad_()
    y = module.double()(x)
    gradients = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in y.t()]
    return y.detach().t(), torch.cat(gradients, 1).t()


def kinks(x: Tensor, derivative: Tensor) -> list[float]:
    """Where the derivative jumps."""
    jumps = (derivative.diff().abs() > JUMP).any(0).nonzero().flatten()
    return [round(float(x[jump : jump + 2].mean()), 2) + 0.0 for jump in jumps]


def bound(value: float) -> str:
    """Rounded; beyond 100 it stands for infinity."""
    if abs(value) > 100:
        return "∞" if value > 0 else "-∞"
    return f"{value + 0.0:.2f}".rstrip("0").rstrip(".")


def saturated(derivative: Tensor) -> tuple[int, int]:
    """How many points, from the left and from the right, have a derivative of next to nothing."""
    steep = (derivative.abs() >= FLAT).any(0).nonzero().flatten()
    return int(steep[0]), derivative.size(1) - 1 - int(steep[-1])


def shape(facts: Facts) -> dict[str, str]:
    """What kind of function it is."""
    near = torch.linspace(*WINDOW, POINTS).double()
    x = torch.cat([torch.linspace(-1e5, WINDOW[0], POINTS).double(), near])
    x = torch.cat([x, torch.linspace(WINDOW[1], 1e5, POINTS).double()])
    y, derivative = curves(facts.module(), x)
    normal = torch.randn(2**18, generator=torch.Generator().manual_seed(0)).double()
    mean = float(curves(facts.module(), normal)[0].mean())
    ends = [name for name, count in zip(("below", "above"), saturated(derivative)) if count]
    return {
        "kinks": " ".join(map(bound, kinks(near, curves(facts.module(), near)[1]))),
        "range": f"{bound(float(y.min()))} to {bound(float(y.max()))}",
        "monotonic": "yes" if (derivative >= -1e-9).all() else "no",
        "mean_output": f"{round(mean, 2) + 0.0:.2f}",
        "saturates": " and ".join(ends),
    }


def instructions(op: str) -> dict[str, str]:
    """Instructions for an element, in training, by provider and direction; "" if nobody counted."""
    found = {
        (row["provider"], row["direction"]): row["instructions_per_element"]
        for row in environment.read_csv(MACHINE_CODE)
        if (row["activation"], row["dtype"], row["capability"]) == (op, "bfloat16", "90")
    }

    def first(provider: str, *directions: str) -> str:
        return next(filter(None, (found.get((provider, each)) for each in directions)), "")

    return {
        key: value
        for provider in ("triton", "cuda")
        for key, value in {
            f"{provider}_forward": first(provider, "forward with mask", "forward"),
            f"{provider}_backward": first(
                provider, "backward with mask", "backward", "backward from output"
            ),
        }.items()
    }


def bytes_of(facts: Facts) -> dict[str, float]:
    """For an element of a 16-bit `x`."""
    saved = facts.widens / 8 if facts.saved_unit == "bits" else 2
    written = saved if facts.saved_unit == "bits" else 0
    return {
        "moved_forward": 2 + 2 * facts.widens + written,
        "moved_backward": 2 * facts.widens + saved + 2,
        "saved": saved,
    }


def times(device: torch.device) -> dict[tuple[str, str], float]:
    """The seconds of forward and backward, by activation and whose module it is."""
    x, calls = torch.randn(TIMED[device.type], device=device, requires_grad=True), {}

    def call(module: nn.Module):
        leaves = [x, *module.parameters()]
        grad_output = torch.randn_like(module(x))
        return lambda: torch.autograd.grad(module(x), leaves, grad_output)

    for facts in ALL:
        calls[facts.title, "fused_act"] = call(facts.module().to(device))
        calls[facts.title, "torch"] = call(facts.torch_module().to(device))
    turn = timing.gpu_turn if device.type == "cuda" else timing.cpu_turn
    return timing.interleaved(calls, rounds=7, seconds=0.02, turn=turn)


def sheet(device: torch.device):
    """The rows of the comparison sheet."""
    found = times(device)
    for facts in ALL:
        yield {
            "activation": facts.title,
            **shape(facts),
            **instructions(facts.name),
            **bytes_of(facts),
            **{
                f"time_{whose}": found[facts.title, whose] / found["ReLU", "torch"]
                for whose in ("fused_act", "torch")
            },
            "paper": facts.paper,
            "error": "",
        }


def draw_member(axes: Axes, facts: Facts) -> None:
    x = torch.linspace(*WINDOW, POINTS).double()
    y, derivative = curves(facts.module(), x)
    left, right = saturated(derivative)
    axes.axvspan(WINDOW[0], x[left], color="0.93", linewidth=0)
    axes.axvspan(x[-1 - right], WINDOW[1], color="0.93", linewidth=0)
    for kink in kinks(x, derivative):
        axes.axvline(kink, color=VERMILLION, linewidth=0.8, linestyle="dotted")
    # A point without a value parts the line, which would join the sides of a jump by a slope.
    derivative[:, 1:][derivative.diff().abs() > JUMP] = torch.nan
    styles = ("-", (0, (1, 1)))
    for function, slope, style in zip(y, derivative, styles):
        axes.plot(x, function, color=BLUE, linewidth=1.8, linestyle=style)
        axes.plot(x, slope, color=VERMILLION, linewidth=1.4, linestyle=style)
    axes.set_title(facts.title)
    axes.set(xlim=WINDOW, ylim=(-2.2, 6.6))
    axes.set_xticks(range(-6, 9, 2))
    axes.set_yticks(range(-2, 7, 2))
    pictures.axes_through_origin(axes)
    axes.tick_params(labelsize=8)


def draw_gallery() -> Figure:
    figure = Figure(figsize=(8.8, 6.4), layout="constrained")
    panels = figure.subplots(3, 4, sharex=True, sharey=True)
    for axes, facts in zip(panels.flat, ALL):
        draw_member(axes, facts)
    legend = panels.flat[len(ALL)]
    legend.set_axis_off()
    legend.plot([], [], color=BLUE, linewidth=1.8, label="function")
    legend.plot([], [], color=VERMILLION, linewidth=1.4, label="derivative")
    legend.plot([], [], color="0.3", linestyle=(0, (1, 1)), label="second channel")
    legend.axvline(np.nan, color=VERMILLION, linewidth=0.8, linestyle="dotted", label="kink")
    legend.fill_between([], [], color="0.93", label=f"derivative below {FLAT:g}")
    legend.legend(loc="center", frameon=False, fontsize=9)
    return figure


def print_sheet(rows: list[dict]) -> None:
    header = (
        "", "kinks", "range", "monotonic", "mean output", "saturates", "Triton", "CUDA", "moved",
        "saved", "time", "torch's", "paper",
    )  # fmt: skip

    def pair(row: dict, prefix: str) -> str:
        cells = [row[f"{prefix}_{direction}"] for direction in ("forward", "backward")]
        return " / ".join(f"{float(cell):.1f}" for cell in cells) if all(cells) else ""

    lines = [
        (
            row["activation"],
            row["kinks"],
            row["range"],
            row["monotonic"],
            row["mean_output"],
            row["saturates"],
            pair(row, "triton"),
            pair(row, "cuda"),
            f"{row['moved_forward']:g} / {row['moved_backward']:g}",
            f"{row['saved']:g}",
            f"{row['time_fused_act']:.2f}",
            f"{row['time_torch']:.2f}",
            row["paper"],
        )
        for row in rows
    ]
    print(
        "\nInstructions and bytes, forward / backward, for an element in 16 bits; time of both, "
        "torch's ReLU being 1\n"
    )
    print(environment.table(header, lines))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)


def main(arguments: argparse.Namespace) -> list[dict]:
    environment.print_environment()
    device = environment.default_device()
    if device.type == "cpu":
        print("NO GPU: the modules call torch's own ops here; the times are those of one thread.")
        torch.set_num_threads(1)
    rows = environment.write_csv(arguments.results / "activations.csv", sheet(device))
    print_sheet(rows)
    pictures.save(arguments.results / "activations.png", draw_gallery)
    return rows
