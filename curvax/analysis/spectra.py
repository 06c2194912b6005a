"""A loss and a point ↦ the spectrum of its curvature: ends, density, trace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.curvature_products import Curvature, Loss, Matrix, evaluate, matrix
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
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
    curvature: Curvature = "hessian",
    mode: str = "auto",
    end: str = "magnitude",
    method: str = "lanczos",
    tol: float | None = None,
    max_products: int = 1000,
    subspace: int | None = None,
    v0: Tree = None,
    key: jax.Array | int = 0,
    mean_over: AxisNames = None,
) -> Eigenpairs:
    """The k eigenpairs of a curvature matrix at one end of its spectrum.

    One product a step, and one for each pair at the end, whose residual is measured. Called
    eagerly it compiles once for a loss and shapes; in a jitted function it is part of it.

    Args:
        objective: an `Objective` (with `microbatch=` in the memory of so many examples), a `Sweep`
            over a loader, or a callable `params -> scalar`.
        params: the point θ.
        k: pairs, at most the number of parameters.
        curvature: "hessian", "gauss_newton", "fisher", "empirical_fisher", or a callable
            `(objective, params) -> product`.
        mode: of the products, as in `hvp` and `ggnvp`.
        end: "magnitude", "largest" or "smallest" (most negative).
        method: "lanczos" with full re-orthogonalisation and thick restarts, or "power": power
            iteration, pair after pair.
        tol: of each residual, relative to the largest magnitude found; 1e-6 by default, more in
            bfloat16.
        max_products: about that many at most.
        subspace: vectors that Lanczos keeps in memory, each the size of the parameters in float32;
            2k + 20 by default.
        v0: a start vector like `params`; drawn by default.
        key: a typed key or a seed for it.
        mean_over: the device axes to average over, inside pmap or shard_map.

    Returns:
        `Eigenpairs`, the most wanted first, in float32 or wider.

    Raises:
        ValueError: an option is none of those named, or k out of range.
    """
    of = matrix(curvature, mean_over, "top_eigenpairs", mode)
    if method not in METHODS:
        raise ValueError(
            f"`top_eigenpairs` takes `method` as one of {', '.join(map(repr, METHODS))}, and got "
            f"{method!r}."
        )
    own = dict(subspace=subspace) if method == "lanczos" else {}
    return evaluate(
        _eigenpairs, objective, params, v0, as_key(key), of=of, method=method, k=k, end=end,
        tol=tolerance(params) if tol is None else tol, max_products=max_products, **own,
    )  # fmt: skip


def tolerance(params: Tree) -> float:
    """A relative residual that products at these parameters can reach: 1e-6, or ε^¾ if more."""
    kinds = {jnp.result_type(x) for x in jax.tree.leaves(params) if trees.is_float(x)}
    return max([1e-6, *(float(jnp.finfo(kind).eps) ** 0.75 for kind in kinds)])


def start_vector(v0: Tree, key: jax.Array, params: Tree) -> Tree:
    """v0, or a Gaussian vector where there is none, in float32 or wider."""
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
    """The density of a spectrum, and its ends as Lanczos sees them: from inside."""

    density: SpectralDensity
    """Nodes and weights for each probe; `density.smoothed(grid, width)` has its error."""
    largest: jax.Array
    """The largest Ritz value over all probes, never above λ_max but for rounding."""
    smallest: jax.Array
    """The smallest one, never below λ_min."""
    bulk_ratio: jax.Array
    """λ₁/λ₅ of the largest Ritz values, scalar: how far the top stands out of the bulk. NaN
    without a basis, where copies of λ₁ pass for λ₅, or where there are no five."""


def hessian_spectrum(
    objective: Loss,
    params: Tree,
    *,
    curvature: Curvature = "hessian",
    mode: str = "auto",
    probes: int | Tree = 4,
    steps: int = 50,
    key: jax.Array | int = 0,
    keep_basis: bool = True,
    mean_over: AxisNames = None,
) -> Spectrum:
    """The spectral density of a curvature matrix, by stochastic Lanczos quadrature.

    `steps` products for each probe. Ghorbani, Krishnan & Xiao, arXiv:1901.10159, Algorithm 1. The
    bulk ratio is that of Jastrzebski et al., arXiv:2002.09572, and of Foret et al., SAM,
    arXiv:2010.01412, section 4.2.

    Args:
        objective: an `Objective`, a `Sweep`, or a callable `params -> scalar`.
        params: the point θ.
        curvature, mode: as in `top_eigenpairs`.
        probes: how many random sign vectors, or the vectors themselves, stacked along a new first
            axis. One at a time is in memory with its basis.
        steps: of Lanczos for each probe; no more than there are parameters are taken.
        key: a typed key or a seed for the probes.
        keep_basis: True keeps `steps` vectors in memory, each the size of the parameters in
            float32; False three, for the density alone.
        mean_over: the device axes to average over, inside pmap or shard_map.

    Returns:
        A `Spectrum`. Its Ritz values approach the ends from inside, each of a multiple eigenvalue
        once; `top_eigenpairs` gives the ends with their residuals.

    Raises:
        ValueError, TypeError: an option is none of those named, or no positive integer.
    """
    of = matrix(curvature, mean_over, "hessian_spectrum", mode)
    vectors, count = _given(probes, "hessian_spectrum")
    checks.check_count("hessian_spectrum", steps=steps)
    return evaluate(
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
    # Where a probe had nothing left to explore, Lanczos filled up with zeros of no weight.
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
    curvature: Curvature = "hessian",
    mode: str = "auto",
    probes: int | Tree = 16,
    key: jax.Array | int = 0,
    mean_over: AxisNames = None,
) -> Estimate:
    """The trace of a curvature matrix by Hutchinson's method, one product for each probe.

    Args:
        objective: an `Objective`, a `Sweep`, or a callable `params -> scalar`.
        params: the point θ.
        curvature, mode: as in `top_eigenpairs`.
        probes: how many random sign vectors, or the vectors themselves, stacked along a new first
            axis.
        key: a typed key or a seed for the probes.
        mean_over: the device axes to average over, inside pmap or shard_map.

    Returns:
        An `Estimate`: the mean over probes, a scalar, and its standard error.

    Raises:
        ValueError, TypeError: no such curvature, or `probes` is no positive integer.
    """
    of = matrix(curvature, mean_over, "curvature_trace", mode)
    vectors, count = _given(probes, "curvature_trace")
    return evaluate(_trace, objective, params, vectors, as_key(key), of=of, count=count)


def _trace(
    objective: Objective, params: Tree, vectors: Tree, key: jax.Array, *, of: Matrix, count: int
) -> Estimate:
    return estimate_trace(of.at(objective, params), _probes(vectors, count, key, params))


def _given(probes: int | Tree, where: str) -> tuple[Tree, int]:
    """(the vectors that were given, or how many to draw)"""
    if not isinstance(probes, (int, float)):
        return probes, 0
    checks.check_count(where, probes=probes)
    return None, int(probes)


def _probes(vectors: Tree, count: int, key: jax.Array, params: Tree) -> Tree:
    """The vectors that were given, or `count` of random signs, stacked along a new first axis."""
    if vectors is None:
        keys = jax.random.split(key, count)
        vectors = jax.vmap(rademacher, (0, None))(keys, trees.wide(params))
    return meshes.stacked_like(trees.wide(vectors), params)
