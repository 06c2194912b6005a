"""A symmetric product and probes ↦ its spectral density, by stochastic Lanczos quadrature."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.linalg.lanczos import lanczos


class SpectralDensity(NamedTuple):
    """A quadrature of the spectrum for each probe: φ(λ) ≈ mean over probes of Σⱼ wⱼ δ(λ - λⱼ)."""

    nodes: jax.Array
    """Ritz values λⱼ, ascending, [probes, k]."""
    weights: jax.Array
    """wⱼ >= 0, [probes, k]; each row sums to 1."""

    def smoothed(self, grid: jax.Array, width: jax.Array | float) -> tuple[jax.Array, jax.Array]:
        """The density under a Gaussian of that standard deviation, and its standard error.

        Args:
            grid: λ, [n].
            width: in the units of λ.

        Returns:
            (mean, standard error over probes), [n] each, per unit of λ; the error of a single
            probe is NaN.
        """
        z = (grid[None, None] - self.nodes[..., None]) / width
        bells = jnp.exp(-0.5 * z**2) / (width * jnp.sqrt(2 * jnp.pi))
        rows = jnp.sum(self.weights[..., None] * bells, axis=1)
        return _mean_and_error(rows)

    def moment(self, f: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        """trace f(C) / P and its standard error over probes: `f` is applied to each λ."""
        return _mean_and_error(jnp.sum(self.weights * f(self.nodes), axis=1))


def _mean_and_error(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = len(rows)
    mean = jnp.mean(rows, axis=0)
    return mean, jnp.std(rows, axis=0, ddof=1) / n**0.5 if n > 1 else trees.nan_like(mean)


def spectral_density(
    product: Callable[[Tree], Tree], probes: Tree, k: int, *, keep_basis: bool = True
) -> SpectralDensity:
    """Stochastic Lanczos quadrature: k nodes and weights for each probe.

    Args:
        product: v ↦ C v, symmetric.
        probes: a tree whose leaves stack the probes along a new first axis, E[z zᵀ] = I.
        k: Lanczos steps, and products, for each probe. The quadrature is exact for polynomials of
            degree 2k - 1.
        keep_basis: as in `lanczos`.

    Returns:
        A `SpectralDensity`. Ubaru, Chen & Saad (2017); Ghorbani, Krishnan & Xiao,
        arXiv:1901.10159, Algorithm 1.

    Raises:
        ValueError: k < 1.
        TypeError: the probes are complex.
    """
    checks.refuse_complex(probes, "spectral_density")

    def one(z: Tree) -> tuple[jax.Array, jax.Array]:
        nodes, vectors = jnp.linalg.eigh(lanczos(product, z, k, keep_basis=keep_basis).matrix)
        return nodes, vectors[0] ** 2

    return SpectralDensity(*lax.map(one, probes))
