"""The loss along a line or in a plane ↦ curves, contours, surfaces, and paths of runs on them."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet

from curvax.analysis import Landscape, Trajectory
from curvax.plotting.canvas import axes_or_new, clean, finished, legend, numbers, runs_of
from curvax.plotting.docstrings import documented
from curvax.plotting.scales import Limits, Scale, scale_of

COLOURS = "viridis"
ALONG = ("α along d₁", "β along d₂")


@documented
def landscape(
    l: Landscape,
    *,
    limits: Limits | None = None,
    logarithmic: bool | None = None,
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Draws the loss along a line as a curve, or in a plane as filled contours with a colour bar.

    A cross marks the central point of a plane. Li et al., arXiv:1712.09913.

    Args:
        l: a `Landscape` from `analysis.landscape`.
        limits: (lowest, highest) loss of the scale; by default those of the finite losses.
        logarithmic: use a logarithmic scale of the loss; by default for planes whose losses are
            positive and span a factor of ten.
        label: name of a curve in the legend; title of a plane.

    Raises:
        TypeError: `l` is not a `Landscape`.
        ValueError: no loss is finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> loss = lambda w: jnp.sum(w**2)
        >>> line = analysis.landscape(loss, jnp.zeros(2), jnp.array([1.0, 0.0]))
        >>> plotting.landscape(line, label="SGD").get_ylabel()
        'loss'
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


@documented
def landscape_surface(
    l: Landscape,
    *,
    limits: Limits | None = None,
    logarithmic: bool | None = None,
    ax: Any = None,
    label: str | None = None,
) -> Axes:
    """Draws the loss in a plane as a surface.

    Li et al., arXiv:1712.09913, Fig. 1.

    Args:
        l: a `Landscape` of two directions from `analysis.landscape`.
        limits: (lowest, highest) loss of heights and colours; losses beyond are clipped.
        logarithmic: heights are log₁₀ of the loss; default as in `landscape`.
        ax: three-dimensional axes, made with `projection="3d"`; by default new ones.
        label: title.

    Returns:
        The three-dimensional axes.

    Raises:
        TypeError: `l` is not a `Landscape`, or the axes are two-dimensional.
        ValueError: the landscape has one direction, or no loss is finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> loss = lambda w: jnp.sum(w**2)
        >>> plane = analysis.landscape(loss, jnp.zeros(2), jnp.eye(2), points=5)
        >>> plotting.landscape_surface(plane).name
        '3d'
    """
    ((_, l),) = runs_of(l, Landscape, label, name="landscape_surface", of="landscape").items()
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 4.2), subplot_kw=dict(projection="3d"))
    return _surface(ax, l, scale_of([numbers(l.losses)], limits, logarithmic), label)


@documented
def landscapes(
    runs: Mapping[str, Landscape], *, surface: bool = False, logarithmic: bool | None = None
) -> np.ndarray:
    """Draws the landscapes of several runs side by side, on one scale of heights and colours.

    Li et al., arXiv:1712.09913, Fig. 1; Foret et al., SAM, arXiv:2010.01412, Fig. 1.

    Args:
        runs: `{run: Landscape}`, all of one direction or all of two.
        surface: draw surfaces in three dimensions instead of contours.
        logarithmic: as in `landscape`, for all runs.

    Returns:
        The axes, an array [runs] in a figure of their own.

    Raises:
        TypeError: a value of `runs` is not a `Landscape`.
        ValueError: no run, lines together with planes, or no finite loss.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> loss = lambda w: jnp.sum(w**2)
        >>> plane = analysis.landscape(loss, jnp.zeros(2), jnp.eye(2), points=5)
        >>> [ax.get_title() for ax in plotting.landscapes({"SGD": plane, "SAM": plane})]
        ['SGD', 'SAM']
    """
    runs = runs_of(runs, Landscape, None, name="landscapes", of="landscape")
    lines = {l.losses.ndim for l in runs.values()}
    if len(lines) > 1:
        raise ValueError(
            "`landscapes` draws lines or planes on one scale, and got both. Draw the lines on one "
            "axes by `landscape(..., ax=ax, label=run)`, and the planes in another call."
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


@documented
def trajectory(t: Trajectory, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the path of a run in the plane of its principal components, with its end at the origin.

    The landscape along the same directions is a background:
    `trajectory(t, ax=landscape(landscape_along_them))`. Li et al., arXiv:1712.09913, section 7.2.

    Args:
        t: a `Trajectory` of two directions from `analysis.trajectory_directions`.
        label: name of the path in the legend.

    Raises:
        TypeError: `t` is not a `Trajectory`.
        ValueError: the trajectory does not have two directions.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> path = [jnp.array([4.0, 1.0]), jnp.array([1.0, -1.0]), jnp.array([-5.0, 0.0])]
        >>> plotting.trajectory(analysis.trajectory_directions(path)).get_xlabel()
        'first direction (96 % of variance)'
    """
    kind = dict(name="trajectory", of="trajectory_directions")
    ((_, t),) = runs_of(t, Trajectory, label, **kind).items()
    places = numbers(t.coordinates)
    if places.shape[1] != 2:
        raise ValueError(
            "`trajectory` draws a path in a plane, and got one along "
            f"{places.shape[1]} directions. Pass `trajectory_directions(path, k=2)`."
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
            "`plotting.landscape`, or compute a landscape of two directions."
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
