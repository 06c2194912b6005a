"""The loss on a line or in a plane ↦ curves, contours, surfaces, and the path of a run on them."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet

from curvax.analysis import Landscape, Trajectory
from curvax.plotting.canvas import axes_or_new, clean, finished, legend, numbers, runs_of
from curvax.plotting.scales import Limits, Scale, scale_of

COLOURS = "viridis"
ALONG = ("α along d₁", "β along d₂")


def landscape(
    l: Landscape,
    *,
    limits: Limits | None = None,
    logarithmic: bool | None = None,
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """The loss along a line as a curve, or in a plane as filled contours with a colour bar.

    A cross marks the point that is looked around.

    Args:
        l: a `Landscape` of `landscape`.
        limits: (lowest, highest) loss of the scale; by default of what there is.
        logarithmic: a logarithmic scale of the loss; by default in a plane where its losses are
            positive and span a factor of ten.
        ax: where to; new axes by default.
        label: of a curve among others; the title of a plane.

    Returns:
        The axes.

    Raises:
        TypeError: something else was given.
        ValueError: no loss is finite.
    """
    ((_, l),) = runs_of(l, Landscape, label, name="landscape", of="landscape").items()
    ax = axes_or_new(ax)
    scale = scale_of([numbers(l.losses)], limits, logarithmic)
    if l.losses.ndim == 1:
        return _curve(ax, l, scale, limits, label)
    filled = _contours(ax, l, scale)
    ax.figure.colorbar(filled, ax=ax, label="loss", ticks=scale.ticks, format="%g")
    ax.set_title(label or "", fontsize="medium")
    return ax


def landscape_surface(
    l: Landscape,
    *,
    limits: Limits | None = None,
    logarithmic: bool | None = None,
    ax: Any = None,
    label: str | None = None,
) -> Axes:
    """The loss in a plane as a surface over it.

    Args:
        l: a `Landscape` of two directions.
        limits: (lowest, highest) loss of height and colours; what is higher is cut off.
        logarithmic: heights are log₁₀ of the loss; by default as in `landscape`.
        ax: three-dimensional axes, of `projection="3d"`; new ones by default.
        label: a title.

    Returns:
        The three-dimensional axes.

    Raises:
        TypeError: something else was given, or axes of two dimensions.
        ValueError: the landscape has one direction; no loss is finite.
    """
    ((_, l),) = runs_of(l, Landscape, label, name="landscape_surface", of="landscape").items()
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 4.2), subplot_kw=dict(projection="3d"))
    return _surface(ax, l, scale_of([numbers(l.losses)], limits, logarithmic), label)


def landscapes(
    runs: Mapping[str, Landscape], *, surface: bool = False, logarithmic: bool | None = None
) -> np.ndarray:
    """The landscapes of several runs, side by side on one scale of heights and colours.

    Li et al., arXiv:1712.09913, Fig. 1; Foret et al., SAM, arXiv:2010.01412, Fig. 1.

    Args:
        runs: `{run: Landscape}`, all of one direction or all of two.
        surface: surfaces in three dimensions instead of contours.
        logarithmic: as in `landscape`, for all.

    Returns:
        The axes, [runs], in a figure of their own.

    Raises:
        TypeError: something else was given.
        ValueError: no run; lines beside planes; no loss is finite.
    """
    runs = runs_of(runs, Landscape, None, name="landscapes", of="landscape")
    lines = {l.losses.ndim for l in runs.values()}
    if len(lines) > 1:
        raise ValueError(
            "`landscapes` draws lines or planes on one scale, and got some of each. Draw the lines "
            "by `landscape(..., ax=ax, label=run)`, on one axes, and the planes apart."
        )
    scale = scale_of([numbers(l.losses) for l in runs.values()], None, logarithmic)
    if surface:
        return _surfaces(runs, scale)
    share: dict[str, Any] = dict(sharex=True, sharey=True, squeeze=False)
    size = (3.0 * len(runs) + 0.7, 3.1)
    figure, panels = plt.subplots(1, len(runs), figsize=size, layout="constrained", **share)
    for ax, (run, l) in zip(panels[0], runs.items()):
        if l.losses.ndim == 1:
            _curve(clean(ax), l, scale, None, None)
        else:
            filled = _contours(ax, l, scale)
        ax.set_title(run, fontsize="medium")
        ax.label_outer()
    if lines == {2}:
        figure.colorbar(filled, ax=panels, label="loss", ticks=scale.ticks, format="%g")
    return panels[0]


def trajectory(t: Trajectory, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The path of a run in the plane that explains most of it, its end at the origin.

    Draw it on the landscape along the same directions:
    `trajectory(t, ax=landscape(landscape_along_them))`. Li et al., arXiv:1712.09913, section 7.2.

    Args:
        t: a `Trajectory` of two directions.
        ax: where to; new axes by default.
        label: of this path in the legend.

    Returns:
        The axes.

    Raises:
        TypeError: something else was given.
        ValueError: the trajectory has one direction, or more than two.
    """
    kind = dict(name="trajectory", of="trajectory_directions")
    ((_, t),) = runs_of(t, Trajectory, label, **kind).items()
    places = numbers(t.coordinates)
    if places.shape[1] != 2:
        raise ValueError(
            "`trajectory` draws a path in a plane, and got one along "
            f"{places.shape[1]} directions. Ask for `trajectory_directions(path, k=2)`."
        )
    ax = axes_or_new(ax)
    halo = [patheffects.withStroke(linewidth=3.5, foreground="white")]
    colour = "#d55e00"
    ax.plot(*places.T, "o-", ms=3, lw=1.5, color=colour, label=label or "", path_effects=halo)
    ax.plot(*places[0], "o", ms=7, mfc="white", mec=colour, mew=1.5)
    ax.plot(*places[-1], "X", ms=8, mfc=colour, mec="white")
    for axis, share, which in zip((ax.xaxis, ax.yaxis), t.explained, ("first", "second")):
        axis.set_label_text(f"{which} direction ({100 * float(share):.0f} % of variance)")
    legend(ax)
    return ax


def _curve(ax: Axes, l: Landscape, scale: Scale, limits: Limits | None, label: str | None) -> Axes:
    ax.plot(numbers(l.coordinates[0]), numbers(l.losses), lw=1.5, label=label or "")
    if scale.logarithmic:
        ax.set_yscale("log")
    ax.set_ylim(*(limits or (None, None)))
    return finished(ax, xlabel=ALONG[0], ylabel="loss")


def _contours(ax: Axes, l: Landscape, scale: Scale) -> ContourSet:
    x, y = map(numbers, l.coordinates)
    losses = np.ma.masked_invalid(numbers(l.losses).T)
    extend: Any = scale.beyond(numbers(l.losses))
    filled = ax.contourf(x, y, losses, scale.levels, norm=scale.norm, cmap=COLOURS, extend=extend)
    ax.contour(x, y, losses, scale.levels[::3], colors="white", linewidths=0.5, alpha=0.6)
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        ax.plot(0, 0, "+", ms=9, mew=1.5, color="white")
    ax.set(xlabel=ALONG[0], ylabel=ALONG[1])
    return filled


def _surface(ax: Any, l: Landscape, scale: Scale, label: str | None) -> Axes:
    if l.losses.ndim == 1:
        raise ValueError(
            "`landscape_surface` draws the loss over a plane, and got a line. Draw it by "
            "`plotting.landscape`, or look along two directions."
        )
    if not hasattr(ax, "plot_surface"):
        raise TypeError(
            "`landscape_surface` draws on three-dimensional axes, and got flat ones. Make them by "
            '`plt.subplots(subplot_kw={"projection": "3d"})`.'
        )
    losses, name, ends = numbers(l.losses).T, "loss", scale[:2]
    losses = np.where(np.isfinite(losses), np.clip(losses, *ends), np.nan)
    if scale.logarithmic:
        losses, name, ends = np.log10(losses), "log₁₀ loss", tuple(np.log10(ends))
    x, y = np.meshgrid(*map(numbers, l.coordinates))
    counts = dict(rcount=60, ccount=60)
    ax.plot_surface(
        x, y, losses, cmap=COLOURS, vmin=ends[0], vmax=ends[1], lw=0.1, edgecolor="0.3", **counts
    )
    ax.set_zlim(*ends)
    ax.set(xlabel=ALONG[0], ylabel=ALONG[1], zlabel=name)
    ax.set_title(label or "", fontsize="medium")
    ax.zaxis.labelpad = 8
    ax.set_box_aspect(None, zoom=0.9)
    return ax


def _surfaces(runs: Mapping[str, Landscape], scale: Scale) -> np.ndarray:
    _, panels = plt.subplots(
        1, len(runs), figsize=(4.2 * len(runs), 4), squeeze=False, subplot_kw=dict(projection="3d")
    )
    for ax, (run, l) in zip(panels[0], runs.items()):
        _surface(ax, l, scale, run)
    return panels[0]
