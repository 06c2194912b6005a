"""Fields of results over the keys of the results: steps, radii or runs."""

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvax.plotting.canvas import marker


def draw_fields(
    ax: Axes, results: Mapping[Any, Any], fields: Mapping[str, str], label: str | None
) -> None:
    """Draws a curve for each field, or dots alone if the keys are names.

    Args:
        ax: axes.
        results: `{step, radius or run: result}`.
        fields: `{field of a result: name in the legend}`.
        label: prefix of these names.
    """
    for field, name in fields.items():
        values = {x: getattr(result, field) for x, result in results.items()}
        draw_curve(ax, values, f"{label}: {name}" if label else name)


def draw_curve(ax: Axes, values: Mapping[Any, Any], label: str, **style: Any) -> None:
    """Draws `{x: y}`, joined by a line if each x is a number."""
    joined = all(isinstance(x, numbers.Real) for x in values)
    y = [np.ravel(np.asarray(y, np.float64))[0] for y in values.values()]
    draw_line(ax, list(values), y, label, ls="-" if joined else "none", **style)


def draw_line(ax: Axes, x: Any, y: Any, label: str, *, ls: str = "-", **style: Any) -> None:
    """Draws a line with the next marker of the axes."""
    ax.plot(x, y, ls=ls, marker=marker(ax), ms=4.5, lw=1.5, label=label, **style)
