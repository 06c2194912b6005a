"""Eigenvalues ↦ their density, their values by rank, and λ_max of each block of a network."""

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
from curvax.plotting.docstrings import documented
from curvax.plotting.rows import draw_rows


@documented
def spectral_density(
    spectrum: Any, *, width: float | None = None, ax: Axes | None = None, label: str | None = None
) -> Axes:
    """Draws the density of a spectrum on a logarithmic scale, with its standard error over probes.

    Ghorbani, Krishnan & Xiao, arXiv:1901.10159, Fig. 1.

    Args:
        spectrum: a `Spectrum` from `analysis.hessian_spectrum`, its `density`, or `{run: either}`.
        width: standard deviation of the Gaussian kernel in units of λ, the same for all runs; by
            default 1 % of the range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2)
        >>> spectrum = analysis.hessian_spectrum(loss, jnp.ones(3), probes=2)
        >>> plotting.spectral_density({"SGD": spectrum}).get_yscale()
        'log'
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


@documented
def eigenvalues(pairs: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws eigenvalues by rank, with residuals as bars and hollow dots where not converged.

    Args:
        pairs: `Eigenpairs` from `analysis.top_eigenpairs`, or `{run: Eigenpairs}`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis, plotting
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2)
        >>> ax = plotting.eigenvalues(analysis.top_eigenpairs(loss, jnp.ones(3), k=2))
        >>> ax.get_xlabel()
        'rank i'
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


@documented
def block_eigenvalues(blocks: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws λ_max of the diagonal Hessian block of each part of a network, hollow if not converged.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3.

    Args:
        blocks: `{block: BlockEigenvalue}` from `analysis.block_eigenvalues`, or
            `{run: {block: BlockEigenvalue}}`.

    Returns:
        The axes, with a row for each block and a dot for each run.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> from curvax import analysis, plotting
        >>> figure, ax = plt.subplots()
        >>> blocks = {"head": analysis.BlockEigenvalue(2.0, 0.0, True)}
        >>> plotting.block_eigenvalues({"SGD": blocks}, ax=ax).get_yticklabels()[0].get_text()
        'head'
        >>> plt.close(figure)
    """
    name = "block_eigenvalues"
    runs = mappings_of(blocks, BlockEigenvalue, label, name=name, of=name)
    values = {run: {b: float(x.value) for b, x in found.items()} for run, found in runs.items()}
    doubtful = {
        run: {b for b, x in found.items() if not x.converged} for run, found in runs.items()
    }
    return draw_rows(values, ax, f"{LARGEST} of the block's Hessian", doubtful=doubtful)


def _floor(density: SpectralDensity, highest: float, width: float) -> float:
    """The lowest density shown: a tenth of the peak at the lighter end of the spectrum."""
    ends = numbers(density.weights)[:, [0, -1]].mean(0).min()
    bell = ends / (width * np.sqrt(2 * np.pi))
    return float(np.clip(bell / 10, 1e-10 * highest, 1e-3 * highest))
