"""A neural tangent kernel ↦ an image of it, and the decay of its eigenvalues."""

from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

from curvax.plotting.canvas import axes_or_new, finished, numbers, runs_of
from curvax.plotting.docstrings import documented

ARRAYS = (np.ndarray, jax.Array)


@documented
def ntk(gram: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws a neural tangent kernel as an image over pairs of examples and outputs.

    Args:
        gram: an array [n, n] or [n, C, n, C] from `analysis.ntk`.
        label: title.

    Returns:
        The axes, with a colour bar; colours are symmetric around 0 if an entry is negative.

    Raises:
        TypeError: `gram` is not an array.
        ValueError: an array of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import plotting
        >>> plotting.ntk(jnp.eye(3)).get_xlabel()
        'example'
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


@documented
def ntk_spectrum(grams: Any, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draws the eigenvalues of a kernel by rank, with κ = λ_max/λ_min in the legend.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 1. Eigenvalues that are not positive are left out.

    Args:
        grams: a kernel [n, n] or [n, C, n, C] from `analysis.ntk`, or its eigenvalues [rows], or
            `{run: either}`.

    Raises:
        TypeError: an argument is not an array.
        ValueError: no array, an array of another shape, or a `label` for several.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import plotting
        >>> ax = plotting.ntk_spectrum({"init": jnp.diag(jnp.array([4.0, 2.0, 1.0]))})
        >>> ax.get_legend().get_texts()[0].get_text()
        'init, κ = 4'
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
    """Eigenvalues in descending order."""
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
