"""Lanczos tridiagonalisation of a symmetric product v ↦ C v."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Scalar
from curvax.devices import axes
from curvax.linalg import bases


class Lanczos(NamedTuple):
    """The result of k Lanczos steps: Qᵀ C Q = T tridiagonal, with Q e₁ = v₀ / ‖v₀‖."""

    diagonal: jax.Array
    """The diagonal α of T, [k]."""
    off_diagonal: jax.Array
    """The off-diagonal β >= 0 of T, [k - 1]; 0 once the Krylov space of v₀ is exhausted."""
    basis: Tree
    """The orthonormal columns of Q, stacked along a new first axis [k, ...]; None if not kept."""
    residual: jax.Array
    """‖C Q - Q T‖, the next β; 0 if the eigenvalues of T are eigenvalues of C."""

    @property
    def matrix(self) -> jax.Array:
        """T, [k, k]."""
        beta = self.off_diagonal
        return jnp.diag(self.diagonal) + jnp.diag(beta, 1) + jnp.diag(beta, -1)


def lanczos(product: Matvec, v0: Tree, k: int, *, keep_basis: bool = True) -> Lanczos:
    """Tridiagonalises a symmetric product by k steps of Lanczos.

        C qᵢ = βᵢ₋₁ qᵢ₋₁ + αᵢ qᵢ + βᵢ qᵢ₊₁,   q₁ = v₀ / ‖v₀‖

    The extreme eigenvalues of the matrix T with diagonal α and off-diagonal β approximate those of
    C. Lanczos, J. Res. Natl. Bur. Stand. 45, 1950.

    Args:
        product: v ↦ C v, symmetric.
        v0: the start vector, of any norm but 0.
        k: steps and products, at least 1 and usefully at most the number of parameters.
        keep_basis: whether to keep all k vectors in memory and to re-orthogonalise against them,
            twice at every step. False runs the three-term recurrence alone, whose rounding errors
            produce spurious copies of converged eigenvalues.

    Returns:
        A `Lanczos` of `diagonal`, `off_diagonal`, `basis`, `residual`, and the property `matrix`.

    Raises:
        ValueError: k < 1.
        TypeError: v0 is complex.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> found = curvax.lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 2)
        >>> [round(x, 3) for x in jnp.linalg.eigvalsh(found.matrix).tolist()]
        [1.0, 3.0]
    """
    checks.refuse_complex(v0, "lanczos")
    checks.check_count("lanczos", k=k)
    return _orthogonalised(product, v0, k) if keep_basis else _recurrence(product, v0, k)


def _orthogonalised(product: Matvec, v0: Tree, k: int) -> Lanczos:
    apply = widened(product, v0)

    def body(carry: Tree, i: jax.Array) -> tuple[Tree, Tree]:
        basis, v = carry
        w, parts = bases.orthogonal(apply(v), basis)
        beta, v = normalised(w, scale=trees.norm(parts))
        # The last step has no row for the next vector: row k - 1 is written back unchanged.
        last = bases.row(basis, k - 1)
        new = jax.tree.map(lambda x, old: jnp.where(i + 1 < k, x, old), v, last)
        return (bases.with_row(basis, i + 1, new), v), (parts[i], beta)

    _, start = normalised(trees.wide(v0))
    first = bases.with_row(bases.empty(k, start), 0, start)
    carry = axes.carried((first, start), lambda carry: body(carry, jnp.int32(0))[0])
    (basis, _), (alpha, beta) = lax.scan(body, carry, jnp.arange(k))
    return Lanczos(alpha, beta[:-1], basis, beta[-1])


def _recurrence(product: Matvec, v0: Tree, k: int) -> Lanczos:
    apply = widened(product, v0)

    def body(carry: Tree, _: None) -> tuple[Tree, Tree]:
        before, v, beta = carry
        w = trees.add_scaled(apply(v), -beta, before)
        alpha = trees.dot(w, v)
        w = trees.add_scaled(w, -alpha, v)
        ahead, new = normalised(w, scale=jnp.abs(alpha) + beta)
        return (v, new, ahead), (alpha, ahead)

    _, start = normalised(trees.wide(v0))
    zero = jax.tree.map(jnp.zeros_like, start)
    carry = (zero, start, jnp.zeros_like(trees.norm(start)))
    carry = axes.carried(carry, lambda carry: body(carry, None)[0])
    _, (alpha, beta) = lax.scan(body, carry, length=k)
    return Lanczos(alpha, beta[:-1], None, beta[-1])


def normalised(w: Tree, scale: Scalar = 0.0) -> tuple[jax.Array, Tree]:
    """(‖w‖, w / ‖w‖), or (0, 0) if w is only the rounding error of quantities of size `scale`."""
    norm = trees.norm(w)
    size = sum(x.size for x in jax.tree.leaves(w))
    alive = norm > jnp.finfo(norm.dtype).eps * scale * max(size, 1) ** 0.5
    return jnp.where(alive, norm, 0), trees.divided(w, jnp.where(alive, norm, jnp.inf))


def widened(product: Matvec, like: Tree) -> Matvec:
    """The product as a map of vectors in float32 or wider, evaluated in the dtypes of `like`."""
    return lambda v: trees.laid_out_like(trees.wide(product(trees.cast_like(v, like))), v)
