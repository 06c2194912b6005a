"""Numbers for each block and run ↦ a row for each block, with a dot for each run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvax.plotting.canvas import axes_or_new, legend, logarithmic_if_positive, marker

Values = Mapping[str, Mapping[str, float]]
"""`{run: {block: value}}`"""


def draw_rows(
    runs: Values, ax: Axes | None, xlabel: str, *, doubtful: Mapping[str, set[str]] | None = None
) -> Axes:
    """Draws the blocks from top to bottom in the order of the first run.

    Args:
        runs: `{run: {block: value}}`.
        ax: axes; rows of an earlier call keep their places.
        xlabel: label of the values.
        doubtful: `{run: blocks that are drawn hollow}`.
    """
    names = list(dict.fromkeys(name for values in runs.values() for name in values))
    ax = axes_or_new(ax, height=1.2 + 0.24 * len(names))
    _join(ax, names, runs)
    for run, values in runs.items():
        hollow = (doubtful or {}).get(run, set())
        (line,) = ax.plot(list(values.values()), list(values), marker(ax), ms=6, label=run)
        _hollow(ax, {name: values[name] for name in values if name in hollow}, line.get_color())
    logarithmic_if_positive(ax, "x")
    ax.margins(y=0.5 / max(1, len(names) - 1))  # half a row above and below
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.set_xlabel(xlabel)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    legend(ax)
    return ax


def _join(ax: Axes, names: list[str], runs: Values) -> None:
    """Joins the dots of each row by a grey line, the spread over runs."""
    spread = np.array([[values.get(name, np.nan) for name in names] for values in runs.values()])
    known = np.isfinite(spread)
    low = np.where(known, spread, np.inf).min(0)
    high = np.where(known, spread, -np.inf).max(0)
    ax.hlines(names, np.minimum(low, high), high, color="0.85", lw=2, zorder=1)


def _hollow(ax: Axes, values: Mapping[str, float], colour: Any) -> None:
    if values:
        ax.plot(list(values.values()), list(values), "o", ms=3, mfc="white", mec=colour)
