"""Axes to draw on, runs told apart, and errors for what no picture can be made of."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

# Of Okabe and Ito (2008): told apart by every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
LARGEST = r"$\lambda_{\max}$"
SMALL = "small"
"""The size of text in legends and panels."""


def axes_or_new(ax: Axes | None, height: float = 3.4) -> Axes:
    """The axes that were given, or new ones in a figure of their own."""
    if ax is not None:
        return ax
    _, ax = plt.subplots(figsize=(5.0, height), layout="constrained")
    return clean(ax)


def clean(ax: Axes) -> Axes:
    """New axes in the colours of this package, without the frame on top and right."""
    ax.set_prop_cycle(color=COLOURS)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def runs_of(
    results: Any, kinds: type | tuple[type, ...], label: str | None, *, name: str, of: str
) -> dict[Any, Any]:
    """`{run: result}`: several as they were given, or one by itself under its label.

    Args:
        results: a result, or a mapping of runs to results.
        kinds: of a result. A mapping of mappings counts as several results.
        label: of one by itself.
        name: the function that draws.
        of: what returns such a result.

    Raises:
        TypeError: a result is of another kind.
        ValueError: there is none, or a label for several.
    """
    several = isinstance(results, Mapping) and (
        not issubclass(dict, kinds) or all(isinstance(x, Mapping) for x in results.values())
    )
    runs = dict(results) if several else {label or "": results}
    for run, result in runs.items():
        if not isinstance(result, kinds):
            place = f" for {run!r}" if several else ""
            raise TypeError(
                f"`{name}` draws what `{of}` returns, or `{{run: that}}`, and got a "
                f"`{type(result).__name__}`{place}. Pass `{of}(...)` itself, for each run."
            )
    if not runs:
        raise ValueError(f"`{name}` was given nothing to draw. Pass `{of}(...)`, or `{{run: it}}`.")
    if label and several:
        raise ValueError(
            f"`{name}` takes `label` for one run alone, and got {label!r} for {len(runs)}, which "
            "are named by their keys. Leave it out."
        )
    return runs


def mappings_of(
    results: Any, kind: type, label: str | None, *, name: str, of: str
) -> dict[Any, Mapping[Any, Any]]:
    """`{run: {what of it: result}}` of one run or several; arguments and errors as in `runs_of`."""
    runs = runs_of(results, Mapping, label, name=name, of=of)
    for found in runs.values():
        runs_of(found, kind, None, name=name, of=of)
    return runs


def finished(ax: Axes, **labels: str) -> Axes:
    """The axes with their labels, a grid and a legend."""
    ax.set(**labels)
    ax.grid(alpha=0.3)
    legend(ax)
    return ax


def legend(ax: Axes) -> None:
    """Above the axes on the right: over no data, and a title at `loc="left"` has room beside it."""
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        place: dict[str, Any] = dict(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2
        )
        ax.legend(ncols=min(len(labels), 3), frameon=False, fontsize=SMALL, **place)


def marker(ax: Axes) -> str:
    """That of the next run on these axes."""
    return MARKERS[_drawn(ax) % len(MARKERS)]


def colour(ax: Axes) -> str:
    """That of the next run on these axes, for what has no cycle of colours in matplotlib."""
    return COLOURS[_drawn(ax) % len(COLOURS)]


def _drawn(ax: Axes) -> int:
    return len(ax.get_legend_handles_labels()[1])


def logarithmic_if_positive(ax: Axes, which: str) -> None:
    """A logarithmic axis where all that its lines show is positive and far enough apart for ticks,
    a linear one where not."""
    shown = np.concatenate([getattr(line, f"get_{which}data")(orig=False) for line in ax.lines])
    shown = shown[np.isfinite(shown)]
    low, high = (shown.min(), shown.max()) if shown.size else (0.0, 0.0)
    apart = bool(0 < 3 * low < high)
    getattr(ax, f"set_{which}scale")("log" if apart else "linear")
    if apart and high < 100 * low:
        axis = getattr(ax, f"{which}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def numbers(values: Any, *fields: str) -> np.ndarray:
    """Numbers as float64, of an array or of a sequence of results with such a field."""
    if isinstance(values, list | tuple):
        values = [next((getattr(x, f) for f in fields if hasattr(x, f)), x) for x in values]
    return np.asarray(values, np.float64)
