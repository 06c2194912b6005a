"""The spectral density of a symmetric product, by stochastic Lanczos quadrature."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Scalar
from curvax.linalg import decompositions
from curvax.linalg.lanczos import lanczos


class SpectralDensity(NamedTuple):
    """A quadrature of the spectrum for each probe: φ(λ) ≈ mean over probes of Σⱼ wⱼ δ(λ - λⱼ)."""

    nodes: jax.Array
    """Ritz values λⱼ in ascending order, [probes, k]."""
    weights: jax.Array
    """Weights wⱼ >= 0, [probes, k]; each row sums to 1."""

    def smoothed(self, grid: jax.Array, width: Scalar) -> tuple[jax.Array, jax.Array]:
        """The density convolved with a Gaussian.

        Args:
            grid: values of λ, [n].
            width: standard deviation of the Gaussian, in the units of λ.

        Returns:
            (mean, standard error) over probes, [n] each, per unit of λ. The error is NaN for a
            single probe.
        """
        z = (grid[None, None] - self.nodes[..., None]) / width
        bells = jnp.exp(-0.5 * z**2) / (width * jnp.sqrt(2 * jnp.pi))
        rows = jnp.sum(self.weights[..., None] * bells, axis=1)
        return _mean_and_error(rows)

    def moment(self, f: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        """An estimate of trace f(C) / P for P parameters.

        Args:
            f: a function of λ, applied to the nodes [probes, k].

        Returns:
            (mean, standard error) over probes, scalars.
        """
        return _mean_and_error(jnp.sum(self.weights * f(self.nodes), axis=1))


def _mean_and_error(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = len(rows)
    mean = jnp.mean(rows, axis=0)
    return mean, jnp.std(rows, axis=0, ddof=1) / n**0.5 if n > 1 else trees.nan_like(mean)


def spectral_density(
    product: Matvec, probes: Tree, k: int, *, keep_basis: bool = True
) -> SpectralDensity:
    """Estimates the spectral density of a symmetric product by stochastic Lanczos quadrature.

        φ(λ) = 1/P Σᵢ δ(λ - λᵢ) ≈ mean over probes of Σⱼ wⱼ δ(λ - θⱼ)

    θⱼ are the eigenvalues of the Lanczos matrix T started at a probe, wⱼ the squared first entries
    of its eigenvectors. Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 38, 2017; Ghorbani, Krishnan
    & Xiao, arXiv:1901.10159, Algorithm 1.

    Args:
        product: v ↦ C v, symmetric.
        probes: random vectors with E[z zᵀ] = I, stacked along a new first axis of every leaf.
        k: Lanczos steps, and products, for each probe; the quadrature is exact for polynomials of
            degree 2k - 1.
        keep_basis: as in `lanczos`.

    Returns:
        A `SpectralDensity` of `nodes` and `weights`, with methods `smoothed` and `moment`.

    Raises:
        ValueError: k < 1.
        TypeError: the probes are complex.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> probes = jnp.array([[1.0, 1.0], [1.0, -1.0]])
        >>> density = curvax.spectral_density(lambda v: jnp.array([1.0, 3.0]) * v, probes, 2)
        >>> mean, error = density.moment(lambda x: x)
        >>> round(float(mean), 3), density.nodes.shape
        (2.0, (2, 2))
    """
    checks.refuse_complex(probes, "spectral_density")

    def quadrature(z: Tree) -> tuple[jax.Array, jax.Array]:
        matrix = lanczos(product, z, k, keep_basis=keep_basis).matrix
        ((nodes, vectors),) = decompositions.eigh(matrix)
        return nodes, vectors[0] ** 2

    return SpectralDensity(*lax.map(quadrature, probes))
