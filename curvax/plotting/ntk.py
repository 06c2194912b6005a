"""A neural tangent kernel ↦ its picture, and how fast its eigenvalues fall."""

from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

from curvax.plotting.canvas import axes_or_new, finished, numbers, runs_of

ARRAYS = (np.ndarray, jax.Array)


def ntk(gram: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The kernel between all pairs of examples (and of outputs within them).

    Args:
        gram: [n, n] or [n, C, n, C], of `ntk`.
        ax: where to; new axes by default.
        label: a title.

    Returns:
        The axes, with a colour bar; colours are symmetric around 0 where an entry is negative.

    Raises:
        TypeError: something else was given.
        ValueError: no such array.
    """
    ((_, gram),) = runs_of(gram, ARRAYS, label, name="ntk", of="ntk").items()
    kernel = _matrix(gram, "ntk")
    ax = axes_or_new(ax)
    highest = np.abs(kernel).max()
    signed = kernel.min() < 0
    colours: dict[str, Any] = dict(
        cmap="RdBu_r" if signed else "viridis", vmin=-highest if signed else 0
    )
    image = ax.imshow(kernel, vmax=highest, interpolation="nearest", **colours)
    ax.spines[:].set_visible(True)
    axis = "example" if np.ndim(gram) == 2 else "example and output"
    ax.set(xlabel=axis, ylabel=axis)
    ax.set_title(label or "", fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label="Θ(xᵢ, xⱼ)")
    return ax


def ntk_spectrum(grams: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The eigenvalues of a kernel by rank, its condition number κ = λ_max/λ_min in the legend.

    Chen et al., arXiv:2106.01548, Table 1.

    Args:
        grams: [n, n] or [n, C, n, C], of `ntk`, or the eigenvalues themselves, [rows], or
            `{run: any of these}`.
        ax: where to; new axes by default.
        label: of one run in the legend.

    Returns:
        The axes. Eigenvalues that are not positive are left out.

    Raises:
        TypeError: something else was given.
        ValueError: there is no run, a label for several, or no such array.
    """
    runs = runs_of(grams, ARRAYS, label, name="ntk_spectrum", of="ntk")
    ax = axes_or_new(ax)
    for run, gram in runs.items():
        values = _eigenvalues(gram)
        rank = 1 + np.arange(len(values))
        name = f"{run}, κ = {_condition(values):.3g}" if run else f"κ = {_condition(values):.3g}"
        ax.plot(rank, np.where(values > 0, values, np.nan), lw=1.5, label=name)
    ax.set_yscale("log")
    return finished(ax, xlabel="rank i", ylabel="eigenvalue λᵢ of the kernel")


def _eigenvalues(gram: Any) -> np.ndarray:
    """Descending."""
    if np.ndim(gram) == 1:
        return np.sort(numbers(gram))[::-1]
    return np.linalg.eigvalsh(_matrix(gram, "ntk_spectrum"))[::-1]


def _condition(values: np.ndarray) -> float:
    return values[0] / values[-1] if values[-1] > 0 else np.inf


def _matrix(gram: Any, name: str) -> np.ndarray:
    kernel = numbers(gram)
    half = kernel.ndim // 2
    if kernel.ndim not in (2, 4) or kernel.shape[:half] != kernel.shape[half:]:
        raise ValueError(
            f"`{name}` draws a kernel [n, n] or [n, C, n, C], and got an array of shape "
            f"{list(kernel.shape)}. Pass what `curvax.analysis.ntk` returned."
        )
    rows = int(np.prod(kernel.shape[:half]))
    return kernel.reshape(rows, rows)
