"""Sharpness results ↦ profiles over radii, group sizes and training, histograms over draws."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvax.analysis import MSharpness, RandomSharpness, SurrogateGap
from curvax.plotting.canvas import (
    LARGEST,
    axes_or_new,
    colour,
    finished,
    legend,
    mappings_of,
    marker,
    numbers,
    runs_of,
)
from curvax.plotting.curves import draw_curve, draw_fields, draw_line
from curvax.plotting.docstrings import documented


@documented
def sharpness_profile(profiles: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the sharpness over the radius of the ball.

    Args:
        profiles: `(rhos, values)` with numbers or `Sharpness` results from `analysis.sharpness`, or
            `{run: (rhos, values)}`.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> from curvax import plotting
        >>> figure, ax = plt.subplots()
        >>> plotting.sharpness_profile(([0.05, 0.1], [0.2, 0.5]), ax=ax).get_xlabel()
        'radius ρ'
        >>> plt.close(figure)
    """
    runs = runs_of(profiles, tuple, label, name="sharpness_profile", of="rhos, sharpness")
    ax = axes_or_new(ax)
    for run, (rhos, values) in runs.items():
        draw_line(ax, numbers(rhos), numbers(values, "value"), run)
    return finished(ax, xlabel="radius ρ", ylabel="sharpness, max L(θ + ε) − L(θ)")


@documented
def m_sharpness(results: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the m-sharpness over the group size m, with its standard error over groups.

    Foret et al., SAM, arXiv:2010.01412, section 4.1 and Fig. 3.

    Args:
        results: `{m: MSharpness}` from `analysis.m_sharpness`, or `{run: {m: MSharpness}}`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> fine = analysis.MSharpness(0.2, jnp.array([0.1, 0.3]))
        >>> coarse = analysis.MSharpness(0.1, jnp.array([0.1]))
        >>> ax = plotting.m_sharpness({4: fine, 8: coarse})
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['4', '8']
    """
    runs = mappings_of(results, MSharpness, label, name="m_sharpness", of="m_sharpness")
    ax = axes_or_new(ax)
    for run, found in runs.items():
        values = [float(x.value) for x in found.values()]
        bars = [_standard_error(numbers(x.groups)) for x in found.values()]
        style: dict[str, Any] = dict(ls="-", marker=marker(ax), ms=4.5, capsize=2)
        ax.errorbar(list(found), values, bars, label=run, **style)
    sizes = sorted({m for found in runs.values() for m in found})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, map(str, sizes))
    ax.minorticks_off()
    return finished(ax, xlabel="group size m", ylabel="m-sharpness")


@documented
def surrogate_gap(
    gaps: Any,
    largest: Mapping[Any, Any] | None = None,
    *,
    xlabel: str = "step",
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Draws both estimates of λ_max from surrogate gaps, and optionally the exact λ_max.

    A second axis on the right shows the gap h if ρ is the same for all. Zhuang et al., GSAM,
    arXiv:2203.08065, Lemma 3.3 and Fig. 4.

    Args:
        gaps: `{step: SurrogateGap}` from `analysis.surrogate_gap`; keys may also be radii or runs.
        largest: `{key of gaps: λ_max}`, as numbers or `analysis.top_eigenpairs(...).values`.
        label: prefix in the legend, to tell these results from others on the same axes.

    Raises:
        TypeError: a value of `gaps` is not a `SurrogateGap`.
        ValueError: `gaps` is empty.

    Examples:
        >>> from curvax import analysis, plotting
        >>> gap = analysis.SurrogateGap(0.1, 20.0, 12.0, loss=1.0, gradient_norm=0.4)
        >>> ax = plotting.surrogate_gap({0: gap, 100: gap}, {0: 11.0, 100: 13.0})
        >>> len(ax.lines)
        3
    """
    found = runs_of(gaps, SurrogateGap, None, name="surrogate_gap", of="surrogate_gap")
    ax = axes_or_new(ax)
    names = {"sigma_max": "2h/ρ²", "sigma_max_corrected": "2(h − ρ‖∇L‖)/ρ²"}
    draw_fields(ax, found, names, label)
    if largest:
        draw_curve(ax, largest, f"{label}: {LARGEST}" if label else LARGEST, color="black")
    if not any(isinstance(x, str) for x in found):
        ax.set_xlabel(xlabel)
    _add_gap_axis(ax, list(found.values()))
    return finished(ax, ylabel="largest eigenvalue of the Hessian")


@documented
def random_sharpness(r: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws a histogram of the loss rise over random perturbations, its mean and standard error.

    Foret et al., SAM, arXiv:2010.01412, Theorem 2 assumes that the mean is >= 0.

    Args:
        r: a `RandomSharpness` from `analysis.random_sharpness`, or `{run: RandomSharpness}`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> rises = analysis.RandomSharpness(0.1, 0.03, 1.0, jnp.array([0.05, 0.1, 0.15]))
        >>> plotting.random_sharpness(rises).get_ylabel()
        'draws'
    """
    runs = runs_of(r, RandomSharpness, label, name="random_sharpness", of="random_sharpness")
    ax = axes_or_new(ax)
    everything = np.concatenate([numbers(found.differences) for found in runs.values()])
    bins = list(np.histogram_bin_edges(everything, bins="auto"))
    for run, found in runs.items():
        mean, error = float(found.value), np.nan_to_num(float(found.standard_error))
        own: dict[str, Any] = dict(color=colour(ax))
        ax.hist(numbers(found.differences), bins, alpha=0.45, lw=0, label=run, **own)
        ax.axvline(mean, lw=1.5, **own)
        ax.errorbar(mean, 0.97, xerr=error, capsize=3, transform=ax.get_xaxis_transform(), **own)
    ax.axvline(0, color="0.3", lw=0.8, ls="--")
    ax.set(xlabel="rise of the loss, L(θ + ε) − L(θ)", ylabel="draws")
    legend(ax)
    return ax


def _standard_error(groups: np.ndarray) -> float:
    return float(np.std(groups, ddof=1) / len(groups) ** 0.5) if len(groups) > 1 else np.nan


def _add_gap_axis(ax: Axes, gaps: list[SurrogateGap]) -> None:
    """Adds an axis on the right that converts 2h/ρ² to h, if ρ is the same for all gaps."""
    squares = np.array([2 * float(x.gap) / float(x.sigma_max) for x in gaps if x.sigma_max != 0])
    if not squares.size or np.ptp(squares) > 1e-3 * squares.max() or ax.child_axes:
        return
    square = squares.mean()
    functions = (lambda s: s * square / 2, lambda h: 2 * h / square)
    right = ax.secondary_yaxis("right", functions=functions)
    right.set_ylabel(f"surrogate gap h (ρ = {square**0.5:.3g})")
