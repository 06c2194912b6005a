"""Angles of gradients, shares of subspaces and divergences of predictions ↦ curves."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from curvax.analysis import Alignment, FisherKL
from curvax.plotting.canvas import axes_or_new, finished, logarithmic_if_positive, numbers, runs_of
from curvax.plotting.curves import draw_fields, draw_line
from curvax.plotting.docstrings import documented


@documented
def gradient_angles(series: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the angle between the gradient and the perturbed gradient along training, in degrees.

    Zhuang et al., GSAM, arXiv:2203.08065, section 4.

    Args:
        series: `(steps, angles)` with angles in radians or `GradientAngle` results from
            `analysis.gradient_angle`, or `{run: (steps, angles)}`.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> from curvax import plotting
        >>> figure, ax = plt.subplots()
        >>> plotting.gradient_angles({"SAM": ([0, 100], [0.1, 0.2])}, ax=ax).get_xlabel()
        'step'
        >>> plt.close(figure)
    """
    of = "(steps, [gradient_angle(...)])"
    runs = runs_of(series, tuple, label, name="gradient_angles", of=of)
    ax = axes_or_new(ax)
    for run, (steps, angles) in runs.items():
        draw_line(ax, numbers(steps), np.degrees(numbers(angles, "angle")), run)
    ax.set_ylim(bottom=0)
    return finished(ax, xlabel="step", ylabel="angle of ∇L(θ), ∇L(θ + ε̂) (degrees)")


@documented
def alignment(results: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the share of a vector in the span of the first i directions, over i.

        Σ_{j<=i} cos²(vⱼ, u)

    Gur-Ari, Roberts & Dyer, arXiv:1812.04754.

    Args:
        results: an `Alignment` from `analysis.alignment`, or `{run: Alignment}`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> found = analysis.alignment(jnp.array([3.0, 4.0]), list(jnp.eye(2)))
        >>> ax = plotting.alignment(found)
        >>> [round(float(y), 2) for y in ax.lines[0].get_ydata()]
        [0.36, 1.0]
    """
    runs = runs_of(results, Alignment, label, name="alignment", of="alignment")
    ax = axes_or_new(ax)
    for run, found in runs.items():
        shares = np.cumsum(numbers(found.cosines) ** 2)
        draw_line(ax, 1 + np.arange(len(shares)), shares, run)
    ax.set_ylim(0, 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finished(ax, xlabel="directions i", ylabel="share of ‖u‖² in the first i")


@documented
def fisher_kl(
    results: Mapping[Any, FisherKL],
    *,
    xlabel: str = "length of the step",
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Draws the Fisher form of steps and both KL divergences that it approximates.

    Martens, arXiv:1412.1193, section 6.

    Args:
        results: `{length of the step: FisherKL}` or `{run: FisherKL}` from `analysis.fisher_kl`.
        label: prefix in the legend, to tell these results from others on the same axes.

    Returns:
        The axes, logarithmic if all values are positive.

    Raises:
        TypeError: a value of `results` is not a `FisherKL`.
        ValueError: `results` is empty.

    Examples:
        >>> from curvax import analysis, plotting
        >>> short, long = analysis.FisherKL(0.01, 0.01, 0.01), analysis.FisherKL(1.0, 1.1, 0.9)
        >>> plotting.fisher_kl({0.1: short, 1.0: long}).get_yscale()
        'log'
    """
    found = runs_of(results, FisherKL, None, name="fisher_kl", of="fisher_kl")
    ax = axes_or_new(ax)
    names = {"quadratic": "½ dᵀF d", "forward": "KL(θ ‖ θ + d)", "reverse": "KL(θ + d ‖ θ)"}
    draw_fields(ax, found, names, label)
    logarithmic_if_positive(ax, "y")
    if not any(isinstance(x, str) for x in found):
        logarithmic_if_positive(ax, "x")
        ax.set_xlabel(xlabel)
    return finished(ax, ylabel="divergence (nats)")
