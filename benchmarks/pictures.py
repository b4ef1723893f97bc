"""What all pictures have in common: their colours, their style and a few ways to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# From the palette of Okabe and Ito, whose colours all readers can tell apart.
BLACK, GREY = "#000000", "#999999"
BLUE, SKY_BLUE, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILLION, ORANGE = "#D55E00", "#E69F00"

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "font.size": 9,
    "grid.color": "0.92",
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "savefig.dpi": 200,
}


def save(path: Path, draw: Callable[[], Figure]) -> None:
    """Save what `draw` draws in the style of all pictures, and say where it is."""
    with rc_context(STYLE):
        draw().savefig(path)
    print(path)


def line_with_band(
    axes: Axes, x: Sequence, middle: Sequence, low: Sequence, high: Sequence, **line: object
) -> None:
    """A line in a band from `low` to `high`.

    Args:
        line: how `Axes.plot` is to draw the line; the band has its colour.
    """
    axes.plot(x, middle, **line)
    axes.fill_between(x, low, high, color=line["color"], alpha=0.2, linewidth=0)


def mean_and_range(axes: Axes, curves: np.ndarray, **line: object) -> None:
    """The mean of `curves`, one for each seed with a value for each epoch, and their range."""
    epochs = np.arange(1, curves.shape[1] + 1)
    line_with_band(axes, epochs, curves.mean(0), curves.min(0), curves.max(0), **line)


def axes_through_origin(axes: Axes) -> None:
    """Two grey lines through the origin in place of a frame and a grid."""
    axes.grid(visible=False)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor="0.35")
