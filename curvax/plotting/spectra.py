"""Eigenvalues ↦ their density, their order, and where in a network they are."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from curvax.analysis import BlockEigenvalue, Spectrum
from curvax.linalg import Eigenpairs, SpectralDensity
from curvax.plotting.canvas import (
    LARGEST,
    axes_or_new,
    legend,
    logarithmic_if_positive,
    mappings_of,
    marker,
    numbers,
    runs_of,
)
from curvax.plotting.rows import draw_rows


def spectral_density(
    spectrum: Any, *, width: float | None = None, ax: Axes | None = None, label: str | None = None
) -> Axes:
    """The density of a spectrum on a logarithmic scale, with its standard error over probes.

    Ghorbani, Krishnan & Xiao, arXiv:1901.10159, Fig. 1: a bulk at 0 and single eigenvalues that
    stand out of it.

    Args:
        spectrum: a `Spectrum` of `hessian_spectrum`, or its density, or `{run: either}`.
        width: the standard deviation of the Gaussian that smooths, in units of λ, the same for all
            runs; 1 % of the range by default.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    kinds = (Spectrum, SpectralDensity)
    runs = runs_of(spectrum, kinds, label, name="spectral_density", of="hessian_spectrum")
    densities = {run: getattr(found, "density", found) for run, found in runs.items()}
    ax = axes_or_new(ax)
    nodes = np.concatenate([numbers(d.nodes).ravel() for d in densities.values()])
    extent = np.ptp(nodes) or max(abs(nodes[0]), 1.0)
    width = extent / 100 if width is None else width
    grid = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, 1000)
    bottom = ax.get_ylim()[0] if ax.lines else np.inf
    for run, density in densities.items():
        mean, error = map(numbers, density.smoothed(jnp.asarray(grid), width))
        floor = _floor(density, mean.max(), width)
        bottom = min(bottom, floor)
        (line,) = ax.plot(grid, np.maximum(mean, floor / 10), lw=1.3, label=run)
        band = [np.maximum(mean + sign * np.nan_to_num(error), floor / 10) for sign in (-1, 1)]
        ax.fill_between(grid, *band, color=line.get_color(), alpha=0.25, lw=0)
    ax.set_yscale("log")
    ax.set_ylim(bottom=bottom)
    ax.set(xlabel="eigenvalue λ", ylabel="density of eigenvalues")
    legend(ax)
    return ax


def eigenvalues(pairs: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Eigenvalues by rank, those that did not converge with hollow dots, residuals as bars.

    Args:
        pairs: `Eigenpairs` of `top_eigenpairs`, or `{run: Eigenpairs}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    runs = runs_of(pairs, Eigenpairs, label, name="eigenvalues", of="top_eigenpairs")
    ax = axes_or_new(ax)
    for run, found in runs.items():
        values, rank = numbers(found.values), 1 + np.arange(len(found.values))
        shape = marker(ax)
        (line,) = ax.plot(rank, values, f"{shape}-", ms=5, lw=1, label=run)
        own: dict[str, Any] = dict(color=line.get_color(), zorder=3)
        ax.vlines(rank, values - numbers(found.residuals), values + numbers(found.residuals), **own)
        open_ = ~np.asarray(found.converged)
        if open_.any():
            ax.plot(rank[open_], values[open_], "o", ms=3, mfc="white", mec=own["color"])
    logarithmic_if_positive(ax, "y")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="rank i", ylabel="eigenvalue λᵢ")
    ax.grid(axis="y", alpha=0.3)
    legend(ax)
    return ax


def block_eigenvalues(blocks: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """λ_max of the diagonal block of each part of a network, hollow where it did not converge.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3.

    Args:
        blocks: `{block: BlockEigenvalue}` of `block_eigenvalues`, or `{run: that}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes, a row for each block.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, or a label for several.
    """
    name = "block_eigenvalues"
    runs = mappings_of(blocks, BlockEigenvalue, label, name=name, of=name)
    values = {run: {b: float(x.value) for b, x in found.items()} for run, found in runs.items()}
    doubtful = {
        run: {b for b, x in found.items() if not x.converged} for run, found in runs.items()
    }
    return draw_rows(values, ax, f"{LARGEST} of the block's Hessian", doubtful=doubtful)


def _floor(density: SpectralDensity, highest: float, width: float) -> float:
    """Below what is left of the lighter end of the spectrum, where only Gaussian tails are."""
    ends = numbers(density.weights)[:, [0, -1]].mean(0).min()
    bell = ends / (width * np.sqrt(2 * np.pi))
    return float(np.clip(bell / 10, 1e-10 * highest, 1e-3 * highest))
