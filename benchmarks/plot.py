"""Pictures of the results of the comparisons: of as many as are in the folder.

    python -m benchmarks plot [--results FOLDER]

- speed_by_size.png and speed_by_dtype.png, from speed.csv: the speed of the public functions, on a
  GPU that of the kernels, as a share of that of a copy of the same bytes. Bands and whiskers reach
  from the 20 % to the 80 % quantile of the time. What the host bounds is left out, see
  `benchmarks.speed_results.quotable`.
- speed_in_graphs.png, from speed.csv: kernels without their launch, on small tensors; and
  small_tensors.png, from kernels_alone.csv, which older results have: the same.
- networks.png, from networks.csv: time and memory of training steps, beside torch's own modules.
- memory.png, from memory.csv: what autograd saves for backward;
- rematerialization.png, from memory.csv: bytes and time of `rematerialize` and of checkpoints.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import environment, options, pictures
from benchmarks.networks import TRAINING, beside_torch, of_today
from benchmarks.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, SKY_BLUE, VERMILLION
from benchmarks.providers import DTYPES
from benchmarks.speed_results import quotable

STYLES = {
    "cuda": {"color": BLUE, "marker": "o"},
    "triton": {"color": SKY_BLUE, "marker": "s"},
    "compile(fused_act)": {"color": GREEN, "marker": "D"},
    "fallback": {"color": BLACK, "marker": "v"},
    "aten": {"color": VERMILLION, "marker": "^"},
    "compile(aten)": {"color": ORANGE, "marker": "P"},
    "naive": {"color": GREY, "marker": "X"},
}
SMALL_CASES = ("alone", "conv-act-conv")  # of memory.csv; the others are networks
# Ways to train a network, by provider and method; `ours` is the first of ours that was measured.
METHODS = {
    "torch": ("aten", "", VERMILLION),
    "fused_act": ("ours", "", BLACK),
    "rematerialize()": ("ours", "rematerialize", SKY_BLUE),
    "rematerialize(norm=True)": ("ours", "rematerialize-norm", BLUE),
    "checkpoint": ("aten", "checkpoint", GREY),
}
DIRECTIONS = ("forward", "backward")
MOST_COLUMNS = 3  # of panels, beside each other


class NothingToDraw(Exception):
    """The message says why."""


def select(rows: Iterable[dict], **wanted: str) -> list[dict]:
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def distinct(rows: Iterable[dict], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def known(rows: list[dict]) -> list[str]:
    """The providers that have a style, in its order."""
    found = distinct(rows, "provider")
    return [provider for provider in STYLES if provider in found]


def numel(row: dict) -> int:
    return int(row["numel"])


def tensor_bytes(row: dict) -> int:
    return numel(row) * DTYPES[row["dtype"]].itemsize


def drawn(rows: list[dict]) -> list[dict]:
    """What is drawn, of contiguous tensors: public functions, on a GPU kernels."""
    api = "kernel" if rows and rows[0]["gpu"] else "public"
    found = select(rows, api=api, launch="call", layout="contiguous")
    found = [row for row in found if row["share_of_copy"] and quotable(row)]
    if not found:
        raise NothingToDraw("it has no times to draw")
    return found


def shares(rows: list[dict]) -> np.ndarray:
    """Shares of a copy in percent, a line each: at the 80 % quantile, the median, the 20 %."""
    times = np.array([[float(row[name]) for name in ("q80", "median", "q20")] for row in rows])
    of_median = np.array([float(row["share_of_copy"]) for row in rows])
    return 100 * of_median * times[:, 1] / times.T


def power_of_2(number: int) -> str:
    exponent = math.log2(number)
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else str(number)


def new_figure(rows: list[dict], title: str, height: float) -> Figure:
    """An empty figure that says what it shows and where the numbers come from."""
    row = rows[0]
    where = row["gpu"] or f"NO GPU: {row['cpu']}"
    return bare_figure(f"{title}\n{where}, torch {row['torch']}, commit {row['commit']}", height)


def bare_figure(title: str, height: float) -> Figure:
    """An empty figure. Where rows name no machine, the page beside the picture does."""
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def add_legend(figure: Figure, order: Iterable[str] = (*STYLES, *METHODS)) -> None:
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= zip(labels, handles)
    labels = [label for label in order if label in found]
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def draw_shares(
    rows: list[dict], subject: str, x_label: str, draw: Callable[[Axes, list[dict]], None]
) -> Figure:
    """A panel for each activation and direction, which `draw` fills."""
    activations = distinct(rows, "activation")
    what = {"public": "public functions", "kernel": "kernels"}[rows[0]["api"]]
    title = f"Speed as a share of a copy of the same bytes: {what}, {subject}"
    figure = new_figure(rows, title, 1.2 + 2.1 * len(activations))
    panels = figure.subplots(len(activations), 2, sharex=True, sharey="row", squeeze=False)
    for activation, line in zip(activations, panels):
        for direction, axes in zip(DIRECTIONS, line):
            axes.set_title(f"{activation} {direction}")
            found = select(rows, activation=activation, direction=direction)
            if found:  # a run may have ended early
                draw(axes, found)
        line[0].set(ylabel="% of a copy", ylim=(0, line[0].get_ylim()[1]))
        for axes in line:  # now that this does not change the limits
            axes.axhline(100, color="0.3", linewidth=1, linestyle="--")
    for axes in panels[-1]:
        axes.set_xlabel(x_label)
    add_legend(figure)
    return figure


def draw_lines(axes: Axes, rows: list[dict]) -> None:
    axes.set_xscale("log", base=2)
    for provider in known(rows):
        found = sorted(select(rows, provider=provider), key=numel)
        low, median, high = shares(found)
        x = [numel(row) for row in found]
        pictures.line_with_band(axes, x, median, low, high, label=provider, **STYLES[provider])


def draw_bars(dtypes: dict[str, str], axes: Axes, rows: list[dict]) -> None:
    """Args: dtypes: the label of each, which all panels share."""
    names, places = known(rows), list(dtypes)
    width = 0.85 / len(names)
    for index, provider in enumerate(names):
        found = select(rows, provider=provider)
        low, median, high = shares(found)
        axes.bar(
            [places.index(row["dtype"]) + (index - (len(names) - 1) / 2) * width for row in found],
            median,
            width,
            yerr=(median - low, high - median),
            error_kw={"elinewidth": 0.8},
            color=STYLES[provider]["color"],
            label=provider,
        )
    axes.set_xticks(range(len(dtypes)), dtypes.values())
    axes.grid(axis="x", visible=False)


def draw_groups(
    axes: Axes,
    groups: list[str],
    bars: list[tuple[str, str, dict[str, float]]],
    number: str = "%.0f",
) -> None:
    """Horizontal bars with their values, in groups.

    Args:
        bars: of each of those who are compared, the label, the colour and the value in each group.
    """
    height = 0.85 / len(bars)
    for index, (label, color, values) in enumerate(bars):
        if not values:
            continue  # the legend would give it another colour
        offset = (index - (len(bars) - 1) / 2) * height
        positions = [groups.index(group) + offset for group in values]
        found = axes.barh(positions, list(values.values()), height, color=color, label=label)
        axes.bar_label(found, fmt=number, padding=2, fontsize=7)
    axes.set_yticks(range(len(groups)), groups)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)


def speed_by_size(rows: list[dict]) -> Figure:
    """Of the dtype with the most sizes."""
    rows = drawn(rows)
    by_dtype = [select(rows, dtype=dtype) for dtype in distinct(rows, "dtype")]
    rows = max(by_dtype, key=lambda found: len(distinct(found, "numel")))
    if len(distinct(rows, "numel")) == 1:
        raise NothingToDraw("it has one size only")
    return draw_shares(rows, rows[0]["dtype"], "elements", draw_lines)


def speed_by_dtype(rows: list[dict]) -> Figure:
    """At the largest size that all dtypes have: of as many bytes, or else of as many elements."""
    rows = drawn(rows)
    by_dtype = [select(rows, dtype=dtype) for dtype in distinct(rows, "dtype")]
    for size in (tensor_bytes, numel):
        common = set.intersection(*({size(row) for row in found} for found in by_dtype))
        if common:
            rows = [row for row in rows if size(row) == max(common)]
            dtypes = {row["dtype"]: f"{row['dtype']}, {power_of_2(numel(row))}" for row in rows}
            draw = partial(draw_bars, dtypes)
            return draw_shares(rows, "large tensors", "dtype, elements", draw)
    raise NothingToDraw("it has no size that all dtypes have")


def memory(rows: list[dict]) -> Figure:
    rows = [row for row in rows if row["saved_bytes"] and row["case"] in SMALL_CASES]
    rows = [row for row in rows if not row["method"]]
    if not rows:
        raise NothingToDraw("it has no bytes")
    rows = select(rows, dtype=rows[0]["dtype"])
    for row in rows:
        row["group"] = row["case"] + ("\nin place" if row["inplace"] == "True" else "")
    activations, names = distinct(rows, "activation"), known(rows)
    columns = min(len(activations), MOST_COLUMNS)
    lines = [activations[at : at + columns] for at in range(0, len(activations), columns)]
    groups = [
        distinct((row for row in rows if row["activation"] in line), "group") for line in lines
    ]
    title = f"Bytes saved for backward, for each element of {rows[0]['dtype']}"
    height = sum(0.5 + 0.14 * len(each) * (len(names) + 1) for each in groups)
    figure = new_figure(rows, title, 1.0 + height)
    sizes = [len(each) for each in groups]  # an activation that is never in place takes less
    panels = figure.subplots(
        len(lines), columns, sharex=True, sharey="row", squeeze=False, height_ratios=sizes
    )
    for index, (activation, axes) in enumerate(zip(activations, panels.flat)):
        bars = []
        for provider in names:
            found = select(rows, activation=activation, provider=provider)
            values = {row["group"]: float(row["saved_bytes"]) for row in found}
            bars.append((provider, STYLES[provider]["color"], values))
        draw_groups(axes, groups[index // columns], bars, "%.4g")
        axes.set_title(activation)
    for first in panels[:, 0]:
        first.invert_yaxis()
    for axes in panels.flat[len(activations) :]:
        axes.remove()
    for axes in panels.flat[len(activations) - columns : len(activations)]:
        axes.set_xlabel("bytes")
        axes.tick_params(labelbottom=True)
    add_legend(figure)
    return figure


def rematerialization(rows: list[dict]) -> Figure:
    """Bytes and time of each method in each network, as shares of torch's."""
    rows = [row for row in rows if row["saved_bytes"] and row["inplace"] == "False"]
    own = [row["provider"] for row in rows if row["method"] == "rematerialize"]
    if not own:
        raise NothingToDraw("it has no network with rematerialize")
    rows = select(rows, dtype=rows[0]["dtype"], activation=rows[0]["activation"])
    rows = [row for row in rows if row["case"] not in SMALL_CASES]
    networks = distinct(rows, "case")
    title = f"Training steps with {rows[0]['activation']}, {rows[0]['dtype']}, as shares of torch's"
    figure = new_figure(rows, title, 1.4 + 0.13 * len(networks) * (len(METHODS) + 1))
    panels = figure.subplots(1, 2, sharey=True)
    base = {row["case"]: row for row in select(rows, provider="aten", method="")}
    for axes, column, what in zip(panels, ("saved_bytes", "ms"), ("bytes saved", "time")):
        bars = []
        for label, (provider, method, color) in METHODS.items():
            found = select(rows, provider=own[0] if provider == "ours" else provider, method=method)
            of_torchs = {
                row["case"]: 100 * float(row[column]) / float(base[row["case"]][column])
                for row in found
                if row[column] and row["case"] in base
            }
            bars.append((label, color, of_torchs))
        draw_groups(axes, networks, bars)
        axes.set_xlabel(f"{what}, % of torch's")
    panels[0].invert_yaxis()
    add_legend(figure)
    return figure


def speed_in_graphs(rows: list[dict]) -> Figure:
    rows = select(rows, api="kernel", launch="graph", layout="contiguous")
    rows = [row for row in rows if quotable(row) and row["direction"] in DIRECTIONS]
    if not rows:
        raise NothingToDraw("it has no times in CUDA graphs to draw")
    rows = select(rows, dtype=rows[0]["dtype"])
    title = f"Kernels on small {rows[0]['dtype']} tensors, L2 cache warm: 200 in a CUDA graph"
    lines = [
        (f"{row['activation']} {row['direction']}", row["provider"], numel(row), row["median"])
        for row in sorted(rows, key=numel)
    ]
    return draw_microseconds(new_figure(rows, title, 4.6), lines)


def small_tensors(rows: list[dict]) -> Figure:
    directions = {"f": "forward", "b": "backward", "fm": "forward with mask"}
    lines = []
    for row in select(rows, section="small"):
        op, _, size = row["op"].partition(" 2^")
        name, _, direction = op.rpartition("_")
        what = f"{name} {directions[direction]}"
        lines.append((what, row["provider"], 2 ** int(size), row["ms"]))
    title = "Kernels alone on small bf16 tensors, L2 cache warm: 200 in a CUDA graph"
    return draw_microseconds(bare_figure(title, 4.6), lines)


def draw_microseconds(figure: Figure, lines: list[tuple[str, str, int, str]]) -> Figure:
    """Args: lines: what was computed, by which provider, of how many elements, in how many ms."""
    ops = list(dict.fromkeys(op for op, *_ in lines))
    columns = min(4, (len(ops) + 1) // 2)
    lines_of_panels = -(-len(ops) // columns)
    figure.set_figheight(0.8 + 1.9 * lines_of_panels)
    panels = figure.subplots(lines_of_panels, columns, sharex=True, sharey=True, squeeze=False)
    for op, axes in zip(ops, panels.flat):
        for provider, style in STYLES.items():
            found = [(x, 1000 * float(ms)) for of, by, x, ms in lines if (of, by) == (op, provider)]
            if found:
                axes.plot(*zip(*found), label=provider, **style)
        axes.set_title(op)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    for axes in panels.flat[len(ops) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("µs")
    for axes in panels.flat[len(ops) - panels.shape[1] : len(ops)]:
        axes.set_xlabel("elements")
        axes.tick_params(labelbottom=True)
    add_legend(figure)
    return figure


# Of networks.csv.
MODES = {
    "torch": VERMILLION,
    "fused": BLACK,
    "fused triton": GREEN,
    "fused remat": SKY_BLUE,
    "fused remat norm": BLUE,
    "checkpoint": GREY,
}


def networks(rows: list[dict]) -> Figure:
    """Time and memory of a training step, as shares of those with torch's own modules."""
    rows = [of_today(row) for row in rows]
    ratios = {
        (net, mode): found
        for (net, direction, mode), found in beside_torch(rows).items()
        if direction == TRAINING
    }
    if not ratios:
        raise NothingToDraw("it has no training step beside one of torch's")
    nets = list(dict.fromkeys(net for net, _ in ratios))
    modes = [mode for mode in MODES if any((net, mode) in ratios for net in nets)]
    title = "Training steps, eager, as shares of torch's"
    height = 1.2 + 0.13 * len(nets) * (len(modes) + 1)
    # The first results do not say where they come from.
    figure = new_figure(rows, title, height) if "gpu" in rows[0] else bare_figure(title, height)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, what in zip(panels, ("time", "memory"), ("time", "memory of a step")):
        bars = []
        for mode in modes:
            found = {
                net: getattr(ratios[net, mode], column) for net in nets if (net, mode) in ratios
            }
            values = {net: 100 * share for net, share in found.items() if not math.isnan(share)}
            bars.append((mode, MODES[mode], values))
        draw_groups(axes, nets, bars)
        axes.set_xlabel(f"{what}, % of torch's")
    panels[0].invert_yaxis()
    add_legend(figure, MODES)
    return figure


PICTURES = {
    "small_tensors.png": ("kernels_alone.csv", small_tensors),
    "networks.png": ("networks.csv", networks),
    "speed_by_size.png": ("speed.csv", speed_by_size),
    "speed_by_dtype.png": ("speed.csv", speed_by_dtype),
    "speed_in_graphs.png": ("speed.csv", speed_in_graphs),
    "memory.png": ("memory.csv", memory),
    "rematerialization.png": ("memory.csv", rematerialization),
}


def draw(folder: Path, picture: str) -> bool:
    """Draw one picture; if it cannot be, say why."""
    table, make = PICTURES[picture]
    try:
        rows = environment.read_csv(folder / table)
        pictures.save(folder / picture, partial(make, rows))
    except OSError as error:
        print(f"no {picture}: {error.filename}: {error.strerror}")
    except KeyError as error:
        print(f"no {picture}: {folder / table} has no column {error}")
    except NothingToDraw as error:
        print(f"no {picture}: {folder / table}: {error}")
    else:
        return True
    return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_results(parser)


def main(arguments: argparse.Namespace) -> list[dict]:
    folder = arguments.results
    drawn = [draw(folder, picture) for picture in PICTURES]
    if not any(drawn):
        environment.refuse(f"nothing to draw in {folder}: run the comparisons first")
    return []
