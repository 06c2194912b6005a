"""Extreme eigenpairs of a symmetric product by thick-restart Lanczos."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.devices import axes
from curvax.linalg import bases, decompositions
from curvax.linalg.flatten import ravel, unravel
from curvax.linalg.lanczos import normalised, widened
from curvax.linalg.probes import gaussian_probe

ENDS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "magnitude": jnp.abs,
    "largest": lambda values: values,
    "smallest": lambda values: -values,
}
"""The ends of the spectrum, each as a sort key that is largest for the most wanted eigenvalue."""

JOINED = 1_000_000
"""Size up to which vectors of several leaves are flattened to one array for the search.

A loop compiles instructions for every leaf, which for small vectors takes longer than copying them.
"""


class Eigenpairs(NamedTuple):
    """k eigenvalues, the most wanted first, with vectors and errors."""

    values: jax.Array
    """Eigenvalues λ, [k]."""
    vectors: Tree
    """Orthonormal eigenvectors, stacked along a new first axis [k, ...]."""
    residuals: jax.Array
    """‖C v - λ v‖, [k], from a product with each vector; bounds the distance to an eigenvalue."""
    converged: jax.Array
    """Whether residual <= tol·max|λ|, over all λ that the search saw, boolean [k]."""
    products: jax.Array
    """Products used, including those for the residuals."""


class _Search(NamedTuple):
    basis: Tree
    """m + 1 orthonormal vectors, the last ones 0 until they are computed."""
    matrix: jax.Array
    """The upper triangle of C in that basis, [m, m]."""
    kept: jax.Array
    """Number of vectors whose column of `matrix` is known."""
    products: jax.Array
    """Products used so far."""
    scale: jax.Array
    """The largest |λ| found so far."""
    settled: jax.Array
    """Whether the k residuals are small enough."""


def eigenpairs(
    product: Matvec,
    v0: Tree,
    k: int = 1,
    *,
    end: str = "magnitude",
    tol: float = 1e-6,
    max_products: int = 1000,
    subspace: int | None = None,
) -> Eigenpairs:
    """The k eigenpairs at one end of the spectrum.

    Lanczos with full re-orthogonalisation in a subspace of fixed size, restarted from its best
    Ritz vectors. If the Krylov space of `v0` is exhausted, the search continues with a random
    vector, so that multiple eigenvalues are found with their multiplicity. Wu & Simon,
    Thick-restart Lanczos, SIAM J. Matrix Anal. Appl. 22, 2000.

    Args:
        product: v ↦ C v, symmetric, on trees like `v0`.
        v0: a start vector, such as a Gaussian probe.
        k: number of pairs, at most the number of parameters.
        end: "magnitude", "largest" or "smallest" (most negative).
        tol: tolerance of each residual ‖C v - λ v‖, relative to the largest magnitude found.
        max_products: approximate maximum number of products; one subspace is always searched.
        subspace: vectors in memory; 2k + 20 by default.

    Returns:
        `Eigenpairs`.

    Raises:
        ValueError: k or `subspace` is out of range, or `end` unknown.
        TypeError: v0 is complex.
    """
    checks.refuse_complex(v0, "eigenpairs")
    size = sum(x.size for x in jax.tree.leaves(v0))
    m = _checked(k, size, end, max_products, subspace)
    search = functools.partial(_searched, k=k, m=m, end=end, tol=tol, max_products=max_products)
    apply, start = widened(product, v0), trees.wide(v0)
    if not _joinable(start, size):
        return search(apply, start)
    apart = lambda u: unravel(u, start)
    found = search(lambda u: ravel(apply(apart(u))), ravel(start))
    return found._replace(vectors=jax.vmap(apart)(found.vectors))


def _joinable(v: Tree, size: int) -> bool:
    """Whether a vector is small, has several leaves, and is not sharded."""
    leaves = jax.tree.leaves(v)
    divided = axes.manual() or any(map(trees.is_sharded, leaves))
    return len(leaves) > 1 and size <= JOINED and not divided


def _searched(
    apply: Matvec, v0: Tree, *, k: int, m: int, end: str, tol: float, max_products: int
) -> Eigenpairs:
    size = sum(x.size for x in jax.tree.leaves(v0))
    start = bases.with_row(bases.empty(m + 1, v0), 0, normalised(v0)[1])
    matrix = jnp.zeros((m, m), jnp.result_type(*jax.tree.leaves(start)))
    scale = jnp.zeros((), matrix.dtype)
    search = _Search(start, matrix, jnp.int32(0), jnp.int32(0), scale, jnp.bool_(False))
    # If the subspace is the whole space, there is no restart, and all of it is kept.
    keep = m if m == size else min(k + max(1, (m - k) // 3), m - 1)
    turn = lambda s: _restarted(*_extended(apply, v0, s, m), k=k, keep=keep, end=end, tol=tol)
    within = lambda s: (s.products == 0) | (s.products + m - s.kept <= max_products)
    search = axes.while_loop(lambda s: ~s.settled & within(s), turn, search)
    return _measured(apply, search, k, tol)


def _checked(k: int, size: int, end: str, max_products: int, subspace: int | None) -> int:
    """The size of the subspace, after checking the options."""
    checks.check_count("eigenpairs", k=k, max_products=max_products)
    if end not in ENDS:
        raise ValueError(
            f"`eigenpairs` takes `end` as one of {', '.join(map(repr, ENDS))}, and received "
            f"{end!r}."
        )
    if k > size:
        raise ValueError(
            f"`eigenpairs` takes `k` up to the {size} rows of the matrix, and received {k}."
        )
    m = min(size, 2 * k + 20 if subspace is None else subspace)
    if m < min(size, k + 2):
        raise ValueError(
            f"`eigenpairs` searches for {k} pairs in a subspace of at least {k + 2} vectors, and "
            f"`subspace={m}` is too small. Use {2 * k + 20}."
        )
    return m


def _extended(apply: Matvec, v0: Tree, search: _Search, m: int) -> tuple[_Search, jax.Array]:
    """(the search with its basis completed by Lanczos, the coupling β to the next vector)"""

    def body(i: jax.Array, carry: Tree) -> Tree:
        basis, matrix, _ = carry
        w = apply(bases.row(basis, i))
        w, parts = bases.orthogonal(w, basis)
        beta, v = normalised(w, scale=trees.norm(parts))
        v = axes.cond(beta > 0, lambda: v, lambda: _fresh(i, basis, v0))
        return bases.with_row(basis, i + 1, v), matrix.at[:, i].set(parts[:m]), beta

    start = (search.basis, search.matrix, jnp.zeros((), search.matrix.dtype))
    start = axes.carried(start, lambda carry: body(jnp.int32(0), carry))
    basis, matrix, beta = lax.fori_loop(search.kept, m, body, start)
    products = search.products + m - search.kept
    return search._replace(basis=basis, matrix=matrix, products=products), beta


def _fresh(i: jax.Array, basis: Tree, v0: Tree) -> Tree:
    """A random unit vector orthogonal to the basis; 0 if the basis spans the whole space."""
    key = axes.vary(jax.random.key(0), axes.varying(i))
    draw = gaussian_probe(jax.random.fold_in(key, i), v0)
    w, parts = bases.orthogonal(draw, basis)
    return normalised(w, scale=trees.norm(parts))[1]


def _restarted(
    search: _Search, beta: jax.Array, *, k: int, keep: int, end: str, tol: float
) -> _Search:
    """The search in a new basis of its best Ritz vectors and the next Lanczos vector."""
    m = len(search.matrix)
    upper = jnp.triu(search.matrix)
    ((values, rotation),) = decompositions.eigh(upper + jnp.triu(upper, 1).T)
    order = jnp.argsort(-ENDS[end](values))
    values, rotation = values[order], rotation[:, order]
    residuals = beta * jnp.abs(rotation[-1])
    ritz = bases.combination(rotation[:, :keep].T, bases.first(search.basis, m))
    beyond = bases.row(search.basis, m)
    basis = bases.with_row(bases.cleared(search.basis, ritz, keep), keep, beyond)
    scale = jnp.maximum(search.scale, jnp.max(jnp.abs(values)))
    return search._replace(
        basis=basis,
        matrix=jnp.diag(jnp.where(jnp.arange(m) < keep, values, 0)),
        kept=jnp.int32(keep),
        scale=scale,
        settled=jnp.all(residuals[:k] <= 0.5 * tol * scale),
    )


def _measured(apply: Matvec, search: _Search, k: int, tol: float) -> Eigenpairs:
    """The result, with values and residuals from one product with each vector."""

    def measure(v: Tree) -> tuple[jax.Array, jax.Array]:
        cv = apply(v)
        value = trees.dot(v, cv)
        return value, trees.norm(trees.add_scaled(cv, -value, v))

    vectors = bases.first(search.basis, k)
    values, residuals = lax.map(measure, vectors)
    return Eigenpairs(
        values, vectors, residuals, residuals <= tol * search.scale, search.products + k
    )
