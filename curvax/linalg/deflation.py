"""Extreme eigenpairs of a symmetric product by power iteration with deflation."""

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.devices import axes
from curvax.linalg import Eigenpairs, bases, power_iteration
from curvax.linalg.eigenpairs import ENDS


def deflated_power(
    product: Matvec, v0: Tree, k: int, *, end: str, tol: float, max_products: int
) -> Eigenpairs:
    """The k eigenpairs at one end of the spectrum, found one by one, orthogonal to earlier ones.

    For `end` "largest" or "smallest", ±C is shifted by |λ|_max, which a first power iteration
    finds, so that the wanted eigenvalues become those of largest magnitude.

    Args:
        product: v ↦ C v, symmetric.
        v0: a start vector in float32 or wider.
        k: number of pairs.
        end: "magnitude", "largest" or "smallest".
        tol: tolerance of each residual ‖C v - λ v‖, relative to the largest magnitude found.
        max_products: maximum number of products, divided equally among the power iterations.

    Returns:
        `Eigenpairs`, in the order in which they were found.

    Raises:
        ValueError: k is out of range, or `end` unknown.
    """
    checks.check_count("top_eigenpairs", k=k, max_products=max_products)
    size = sum(x.size for x in jax.tree.leaves(v0))
    if end not in ENDS or k > size:
        raise ValueError(
            f"`top_eigenpairs` takes `end` as one of {', '.join(map(repr, ENDS))} and `k` up to "
            f"the {size} parameters, and received end={end!r}, k={k}."
        )
    sign = -1 if end == "smallest" else 1
    limit = max(1, max_products // (k + (end != "magnitude")))
    # The residual in C also has components along the k earlier vectors, as large as their own
    # residuals, hence √k; and the shift at most doubles the |λ| that `tol` is relative to, hence 2.
    own = tol / (2 * k**0.5)
    shift, used = jnp.zeros(()), jnp.zeros((), jnp.int32)
    if end != "magnitude":
        largest = power_iteration(product, v0, max_steps=limit, tol=own)
        shift, used = jnp.abs(largest.value), largest.steps

    def find(carry: tuple[Tree, jax.Array], i: jax.Array) -> tuple[tuple[Tree, jax.Array], None]:
        basis, used = carry
        deflate = lambda v: bases.orthogonal(v, basis)[0]
        step = lambda v: deflate(trees.add_scaled(trees.scale(sign, product(v)), shift, v))
        pair = power_iteration(step, deflate(v0), max_steps=limit, tol=own)
        return (bases.with_row(basis, i, pair.vector), used + pair.steps), None

    start = axes.carried((bases.empty(k, v0), used), lambda carry: find(carry, jnp.int32(0))[0])
    (vectors, used), _ = lax.scan(find, start, jnp.arange(k))
    pairs = lax.map(lambda v: power_iteration(product, v, max_steps=1), vectors)
    converged = pairs.residual <= tol * jnp.maximum(shift, jnp.max(jnp.abs(pairs.value)))
    return Eigenpairs(pairs.value, vectors, pairs.residual, converged, used + k)
