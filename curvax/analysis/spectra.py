"""A loss and a point ↦ the spectrum of a curvature matrix: extreme eigenpairs, density, trace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.curvature_products import CurvatureLike, Matrix, matrix
from curvax.analysis.evaluation import Loss, evaluate_products
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key
from curvax.devices import meshes
from curvax.devices.axes import AxisNames
from curvax.linalg import (
    Eigenpairs,
    Estimate,
    SpectralDensity,
    eigenpairs,
    estimate_trace,
    gaussian_probe,
    rademacher,
    spectral_density,
)
from curvax.linalg.deflation import deflated_power
from curvax.linalg.probes import as_key
from curvax.objective import Objective

METHODS: dict[str, Callable[..., Eigenpairs]] = {"lanczos": eigenpairs, "power": deflated_power}


def top_eigenpairs(
    objective: Loss,
    params: Tree,
    k: int = 1,
    *,
    curvature: CurvatureLike = "hessian",
    mode: str = "auto",
    end: str = "magnitude",
    method: str = "lanczos",
    tol: float | None = None,
    max_products: int = 1000,
    subspace: int | None = None,
    v0: Tree = None,
    key: Key = 0,
    mean_over: AxisNames = None,
) -> Eigenpairs:
    """Computes k eigenpairs of a curvature matrix at one end of its spectrum.

        C vᵢ = λᵢ vᵢ

    Each iteration takes one curvature product, and each pair one more for its residual. An eager
    call compiles once per loss and shapes; inside a jitted function the search is traced with it.

    Args:
        objective: an `Objective` (with `microbatch=` in the memory of that many examples), a
            `DatasetLoss` over a loader, or a callable `params -> scalar`.
        params: the point θ, a tree of real floating arrays.
        k: number of pairs, at most the number of parameters.
        curvature: "hessian", "gauss_newton", "fisher", "empirical_fisher", or a callable
            `(objective, params) -> product`.
        mode: differentiation mode of the products, as in `hvp` and `ggnvp`.
        end: "magnitude", "largest" or "smallest" (most negative).
        method: "lanczos" with full re-orthogonalisation and thick restarts, or "power" iteration
            with deflation.
        tol: bound on each residual ‖Cv - λv‖, relative to the largest |λ| found; by default 1e-6,
            in half precision more.
        max_products: approximate limit on the number of products.
        subspace: vectors that Lanczos keeps in memory, each as large as the parameters in float32;
            2k + 20 by default.
        v0: start vector, a tree like `params`; by default a Gaussian draw.
        key: typed key or seed of that draw.
        mean_over: device axes to average over, inside pmap or shard_map.

    Returns:
        `Eigenpairs` in the order of `end`, in float32 or wider: `values` [k], `vectors` stacked
        [k, ...], `residuals`, `converged`, `products`.

    Raises:
        ValueError: an unknown option, or k out of range.
        TypeError: a parameter is not a real floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2)
        >>> pairs = analysis.top_eigenpairs(loss, jnp.ones(3), k=2)
        >>> [round(float(x), 3) for x in pairs.values]
        [5.0, 2.0]
    """
    of = matrix(curvature, mean_over, "top_eigenpairs", mode)
    if method not in METHODS:
        raise ValueError(
            f"`top_eigenpairs` takes `method` as one of {', '.join(map(repr, METHODS))}, and "
            f"got {method!r}."
        )
    own = dict(subspace=subspace) if method == "lanczos" else {}
    return evaluate_products(
        _eigenpairs, objective, params, v0, as_key(key), of=of, method=method, k=k, end=end,
        tol=tolerance(params) if tol is None else tol, max_products=max_products, **own,
    )  # fmt: skip


def tolerance(params: Tree) -> float:
    """The relative residual that products in this precision reach: the larger of 1e-6 and ε^¾."""
    kinds = {jnp.result_type(x) for x in jax.tree.leaves(params) if trees.is_float(x)}
    return max([1e-6, *(float(jnp.finfo(kind).eps) ** 0.75 for kind in kinds)])


def start_vector(v0: Tree, key: jax.Array, params: Tree) -> Tree:
    """v0, by default a Gaussian vector, in float32 or wider."""
    v0 = gaussian_probe(key, trees.wide(params)) if v0 is None else v0
    return meshes.laid_like(trees.wide(v0), params)


def _eigenpairs(
    objective: Objective,
    params: Tree,
    v0: Tree,
    key: jax.Array,
    *,
    of: Matrix,
    method: str,
    **search: Any,
) -> Eigenpairs:
    v0 = start_vector(v0, key, params)
    return METHODS[method](of.at(objective, params), v0, **search)


class Spectrum(NamedTuple):
    """Result of `hessian_spectrum`: the spectral density, and bounds on its ends from inside."""

    density: SpectralDensity
    """Nodes and weights of each probe; `density.smoothed(grid, width)` is the density as a function
    and its standard error."""
    largest: jax.Array
    """The largest Ritz value over all probes, scalar; at most λ_max up to rounding."""
    smallest: jax.Array
    """The smallest Ritz value over all probes, scalar; at least λ_min up to rounding."""
    bulk_ratio: jax.Array
    """λ₁/λ₅ of the largest Ritz values, scalar: the separation of the outliers from the bulk. NaN
    with fewer than five values, or without a basis, where λ₁ occurs in copies."""


def hessian_spectrum(
    objective: Loss,
    params: Tree,
    *,
    curvature: CurvatureLike = "hessian",
    mode: str = "auto",
    probes: int | Tree = 4,
    steps: int = 50,
    key: Key = 0,
    keep_basis: bool = True,
    mean_over: AxisNames = None,
) -> Spectrum:
    """Estimates the spectral density of a curvature matrix by stochastic Lanczos quadrature.

        φ(λ) ≈ mean over probes z of Σᵢ wᵢ(z) δ(λ - θᵢ(z))

    θᵢ and wᵢ are the Ritz values and Gauss weights of `steps` Lanczos steps from z, one product
    each. Ghorbani, Krishnan & Xiao, arXiv:1901.10159, Algorithm 1. Bulk ratio: Jastrzebski et al.,
    arXiv:2002.09572; Foret et al., SAM, arXiv:2010.01412, section 4.2.

    Args:
        objective: an `Objective`, a `DatasetLoss`, or a callable `params -> scalar`.
        params: the point θ.
        curvature, mode: as in `top_eigenpairs`.
        probes: number of random sign vectors, or the vectors themselves, trees like `params`
            stacked along a new first axis; processed one at a time.
        steps: Lanczos steps for each probe; at most the number of parameters are taken.
        key: typed key or seed of the probes.
        keep_basis: True re-orthogonalises and holds `steps` vectors, each as large as the
            parameters in float32; False holds three, which suffices for the density.
        mean_over: device axes to average over, inside pmap or shard_map.

    Returns:
        A `Spectrum`. Its Ritz values bound the ends from inside and count a multiple eigenvalue
        once; `top_eigenpairs` gives the ends with residuals.

    Raises:
        ValueError, TypeError: an unknown option, or a count that is not a positive integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2)
        >>> spectrum = analysis.hessian_spectrum(loss, jnp.ones(3), probes=2)
        >>> round(float(spectrum.smallest), 2), round(float(spectrum.largest), 2)
        (1.0, 5.0)
    """
    of = matrix(curvature, mean_over, "hessian_spectrum", mode)
    vectors, count = _vectors_or_count(probes, "hessian_spectrum")
    checks.check_count("hessian_spectrum", steps=steps)
    return evaluate_products(
        _spectrum, objective, params, vectors, as_key(key), of=of, count=count, steps=steps,
        keep_basis=keep_basis,
    )  # fmt: skip


def _spectrum(
    objective: Objective,
    params: Tree,
    vectors: Tree,
    key: jax.Array,
    *,
    of: Matrix,
    count: int,
    steps: int,
    keep_basis: bool,
) -> Spectrum:
    probes = _probes(vectors, count, key, params)
    steps = min(steps, sum(x.size for x in jax.tree.leaves(params)))
    density = spectral_density(of.at(objective, params), probes, steps, keep_basis=keep_basis)
    return _spectrum_of(density, keep_basis)


def _spectrum_of(density: SpectralDensity, keep_basis: bool) -> Spectrum:
    # Once a probe's Krylov space is exhausted, Lanczos returns zeros of weight zero.
    seen = density.weights > (10 * jnp.finfo(density.weights.dtype).eps) ** 2
    top = jnp.max(jnp.sort(jnp.where(seen, density.nodes, -jnp.inf), axis=1), axis=0)[::-1]
    smallest = jnp.min(jnp.where(seen, density.nodes, jnp.inf))
    known = keep_basis and len(top) >= 5
    ratio = jnp.where(jnp.isfinite(top[4]), top[0] / top[4], jnp.nan) if known else jnp.nan
    return Spectrum(density, top[0], smallest, jnp.asarray(ratio, top.dtype))


def curvature_trace(
    objective: Loss,
    params: Tree,
    *,
    curvature: CurvatureLike = "hessian",
    mode: str = "auto",
    probes: int | Tree = 16,
    key: Key = 0,
    mean_over: AxisNames = None,
) -> Estimate:
    """Estimates the trace of a curvature matrix by Hutchinson's method.

        tr C ≈ mean over probes z of zᵀ C z

    One product for each probe.

    Args:
        objective: an `Objective`, a `DatasetLoss`, or a callable `params -> scalar`.
        params: the point θ.
        curvature, mode: as in `top_eigenpairs`.
        probes: number of random sign vectors, or the vectors themselves, trees like `params`
            stacked along a new first axis.
        key: typed key or seed of the probes.
        mean_over: device axes to average over, inside pmap or shard_map.

    Returns:
        An `Estimate`: the mean over probes, a scalar, and its standard error (NaN for one probe).

    Raises:
        ValueError, TypeError: an unknown option, or `probes` is not a positive integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2)
        >>> trace = analysis.curvature_trace(loss, jnp.ones(3))
        >>> round(float(trace.mean), 3)  # exact: sign vectors, diagonal Hessian
        8.0
    """
    of = matrix(curvature, mean_over, "curvature_trace", mode)
    vectors, count = _vectors_or_count(probes, "curvature_trace")
    return evaluate_products(_trace, objective, params, vectors, as_key(key), of=of, count=count)


def _trace(
    objective: Objective, params: Tree, vectors: Tree, key: jax.Array, *, of: Matrix, count: int
) -> Estimate:
    return estimate_trace(of.at(objective, params), _probes(vectors, count, key, params))


def _vectors_or_count(probes: int | Tree, where: str) -> tuple[Tree, int]:
    """(vectors, 0), or (None, the number to draw)."""
    if not isinstance(probes, (int, float)):
        return probes, 0
    checks.check_count(where, probes=probes)
    return None, int(probes)


def _probes(vectors: Tree, count: int, key: jax.Array, params: Tree) -> Tree:
    """The vectors, or `count` random sign vectors, stacked along a new first axis."""
    if vectors is None:
        keys = jax.random.split(key, count)
        vectors = jax.vmap(rademacher, (0, None))(keys, trees.wide(params))
    return meshes.stacked_like(trees.wide(vectors), params)
