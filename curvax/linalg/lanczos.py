"""A symmetric product and a start vector ↦ the tridiagonal matrix that Lanczos makes of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.linalg import bases

Product = Callable[[Tree], Tree]


class Lanczos(NamedTuple):
    """k steps of Lanczos: Qᵀ C Q = T, Q e₁ = v₀ / ‖v₀‖."""

    diagonal: jax.Array
    """α, [k]."""
    off_diagonal: jax.Array
    """β >= 0, [k - 1]; 0 from where v₀ has no parts left to explore."""
    basis: Tree
    """The columns of Q stacked along a new first axis [k, ...], orthonormal; None without it."""
    residual: jax.Array
    """‖C Q - Q T‖, the β that would come next: 0 where T holds whole eigenvalues of C."""

    @property
    def matrix(self) -> jax.Array:
        """T, [k, k]."""
        beta = self.off_diagonal
        return jnp.diag(self.diagonal) + jnp.diag(beta, 1) + jnp.diag(beta, -1)


def lanczos(product: Product, v0: Tree, k: int, *, keep_basis: bool = True) -> Lanczos:
    """Lanczos' method, k products.

    Args:
        product: v ↦ C v, symmetric.
        v0: the start vector, of any length but 0.
        k: steps; at most the number of parameters is of use.
        keep_basis: re-orthogonalise against all earlier vectors, twice, which keeps k of them in
            memory; False for the bare recurrence in the memory of three, whose eigenvalues come in
            copies once the first have converged.

    Returns:
        A `Lanczos`.

    Raises:
        ValueError: k < 1.
        TypeError: v0 is complex.
    """
    checks.refuse_complex(v0, "lanczos")
    checks.check_count("lanczos", k=k)
    return _orthogonalised(product, v0, k) if keep_basis else _recurrence(product, v0, k)


def _orthogonalised(product: Product, v0: Tree, k: int) -> Lanczos:
    apply = widened(product, v0)

    def body(carry: Any, i: jax.Array) -> Any:
        basis, v = carry
        w, parts = bases.orthogonal(apply(v), basis)
        beta, v = normalised(w, scale=trees.norm(parts))
        # The vector beyond the last has no row: the last is written again.
        last = bases.row(basis, k - 1)
        new = jax.tree.map(lambda x, old: jnp.where(i + 1 < k, x, old), v, last)
        return (bases.with_row(basis, i + 1, new), v), (parts[i], beta)

    _, start = normalised(trees.wide(v0))
    first = bases.with_row(bases.empty(k, start), 0, start)
    carry = axes.carried((first, start), lambda carry: body(carry, jnp.int32(0))[0])
    (basis, _), (alpha, beta) = lax.scan(body, carry, jnp.arange(k))
    return Lanczos(alpha, beta[:-1], basis, beta[-1])


def _recurrence(product: Product, v0: Tree, k: int) -> Lanczos:
    apply = widened(product, v0)

    def body(carry: Any, _: None) -> Any:
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


def normalised(w: Tree, scale: jax.Array | float = 0.0) -> tuple[jax.Array, Tree]:
    """(‖w‖, w / ‖w‖), both 0 where w is no more than rounding beside `scale`."""
    norm = trees.norm(w)
    size = sum(x.size for x in jax.tree.leaves(w))
    alive = norm > jnp.finfo(norm.dtype).eps * scale * max(size, 1) ** 0.5
    return jnp.where(alive, norm, 0), trees.divided(w, jnp.where(alive, norm, jnp.inf))


def widened(product: Product, like: Tree) -> Product:
    """The product on vectors in float32 or wider; it is handed them in the dtypes of `like`."""
    return lambda v: trees.laid_out_like(trees.wide(product(trees.cast_like(v, like))), v)
