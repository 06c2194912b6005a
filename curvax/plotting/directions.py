"""Where gradients and updates point, and what a step does to predictions ↦ curves."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from curvax.analysis import Alignment, FisherKL
from curvax.plotting.canvas import axes_or_new, finished, logarithmic_if_positive, numbers, runs_of
from curvax.plotting.curves import draw_fields, draw_line


def gradient_angles(series: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The angle between the gradient and the perturbed one along training, in degrees.

    Zhuang et al., GSAM, arXiv:2203.08065, section 4.

    Args:
        series: `(steps, angles)`, the angles in radians or each a `GradientAngle`, or
            `{run: that}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    of = "(steps, [gradient_angle(...)])"
    runs = runs_of(series, tuple, label, name="gradient_angles", of=of)
    ax = axes_or_new(ax)
    for run, (steps, angles) in runs.items():
        draw_line(ax, numbers(steps), np.degrees(numbers(angles, "angle")), run)
    ax.set_ylim(bottom=0)
    return finished(ax, xlabel="step", ylabel="angle of ∇L(θ), ∇L(θ + ε̂) (degrees)")


def alignment(results: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """How much of a vector lies in the span of the first directions, more and more of them.

    Gur-Ari, Roberts & Dyer, arXiv:1812.04754.

    Args:
        results: an `Alignment` of `alignment`, or `{run: Alignment}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes: Σ_{j<=i} cos² over i, the last of which is the share.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    runs = runs_of(results, Alignment, label, name="alignment", of="alignment")
    ax = axes_or_new(ax)
    for run, found in runs.items():
        shares = np.cumsum(numbers(found.cosines) ** 2)
        draw_line(ax, 1 + np.arange(len(shares)), shares, run)
    ax.set_ylim(0, 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finished(ax, xlabel="directions i", ylabel="share of ‖u‖² in the first i")


def fisher_kl(
    results: Mapping[Any, FisherKL],
    *,
    xlabel: str = "length of the step",
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """The Fisher form of steps beside the divergences that it approximates.

    Martens, arXiv:1412.1193, section 6.

    Args:
        results: `{length of the step, or run: FisherKL}`, each of `fisher_kl`.
        xlabel: what the keys are, where they are numbers.
        ax: where to; new axes by default.
        label: of all these among others on the same axes.

    Returns:
        The axes, logarithmic where all is positive.

    Raises:
        TypeError: something else was given.
        ValueError: there is none.
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
