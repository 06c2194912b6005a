"""New axes, checks of the arguments, and the colours, markers and legends that tell runs apart."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito (2008): distinguishable with any colour vision deficiency.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
LARGEST = r"$\lambda_{\max}$"
SMALL = "small"
"""Font size in legends and panels."""


def axes_or_new(ax: Axes | None, height: float = 3.4) -> Axes:
    """`ax`, or new axes in a figure of their own."""
    if ax is not None:
        return ax
    _, ax = plt.subplots(figsize=(5.0, height), layout="constrained")
    return clean(ax)


def clean(ax: Axes) -> Axes:
    """Sets the colour cycle of this package, and hides the frame on top and right."""
    ax.set_prop_cycle(color=COLOURS)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def runs_of(
    results: Any, kinds: type | tuple[type, ...], label: str | None, *, name: str, of: str
) -> dict[Any, Any]:
    """Normalises one result or several to `{run: result}`; one by itself gets `label` as its run.

    Args:
        results: a result, or `{run: result}`.
        kinds: the types of a result. If they include mappings, a mapping of mappings is several.
        label: the run of a single result.
        name: the plotting function, for error messages.
        of: the function that returns such results, for error messages.

    Raises:
        TypeError: a result of another type.
        ValueError: no result, or a label for several.
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
        raise ValueError(f"`{name}` got nothing to draw. Pass `{of}(...)`, or `{{run: that}}`.")
    if label and several:
        raise ValueError(
            f"`{name}` takes `label` for one run alone, and got {label!r} for {len(runs)} runs, "
            "whose names are their keys. Leave it out."
        )
    return runs


def mappings_of(
    results: Any, kind: type, label: str | None, *, name: str, of: str
) -> dict[Any, Mapping[Any, Any]]:
    """Like `runs_of`, for results that are mappings: `{run: {key: result of type kind}}`."""
    runs = runs_of(results, Mapping, label, name=name, of=of)
    for found in runs.values():
        runs_of(found, kind, None, name=name, of=of)
    return runs


def finished(ax: Axes, **labels: str) -> Axes:
    """Adds labels, a grid and a legend, and returns the axes."""
    ax.set(**labels)
    ax.grid(alpha=0.3)
    legend(ax)
    return ax


def legend(ax: Axes) -> None:
    """Adds a legend above the axes on the right, clear of data and of a title at `loc="left"`."""
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        place: dict[str, Any] = dict(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2
        )
        ax.legend(ncols=min(len(labels), 3), frameon=False, fontsize=SMALL, **place)


def marker(ax: Axes) -> str:
    """The marker of the next run on these axes."""
    return MARKERS[_drawn(ax) % len(MARKERS)]


def colour(ax: Axes) -> str:
    """The colour of the next run on these axes, for artists without a colour cycle."""
    return COLOURS[_drawn(ax) % len(COLOURS)]


def _drawn(ax: Axes) -> int:
    return len(ax.get_legend_handles_labels()[1])


def logarithmic_if_positive(ax: Axes, which: str) -> None:
    """Makes an axis logarithmic if the data of its lines are positive and span a factor of 3."""
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
    """Converts an array, or one of the fields of each result in a sequence, to float64."""
    if isinstance(values, list | tuple):
        values = [next((getattr(x, f) for f in fields if hasattr(x, f)), x) for x in values]
    return np.asarray(values, np.float64)
