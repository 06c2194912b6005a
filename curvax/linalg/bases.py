"""Several vectors as one tree, stacked along a new first axis: coefficients and combinations."""

import jax
import jax.numpy as jnp
from jax import lax

from curvax import trees
from curvax.trees import Tree


def coefficients(basis: Tree, v: Tree) -> jax.Array:
    """<bᵢ, v> for each vector of the basis, [m]."""
    terms = jax.tree.map(_products, basis, v)
    return sum(jax.tree.leaves(terms), jnp.zeros((), jnp.float32))


def combination(weights: jax.Array, basis: Tree) -> Tree:
    """Σᵢ wᵢ bᵢ, or for weights [n, m] a new basis of n such sums."""
    sums = lambda b: jnp.tensordot(weights, b, 1, precision=lax.Precision.HIGHEST)
    return jax.tree.map(lambda b: sums(b).astype(b.dtype), basis)


def row(basis: Tree, i: jax.Array | int) -> Tree:
    """bᵢ"""
    return jax.tree.map(lambda b: b[i], basis)


def with_row(basis: Tree, i: jax.Array | int, v: Tree) -> Tree:
    """The basis with v in the place of bᵢ."""
    return jax.tree.map(lambda b, x: b.at[i].set(x.astype(b.dtype)), basis, v)


def first(basis: Tree, k: int) -> Tree:
    """The first k vectors."""
    return jax.tree.map(lambda b: b[:k], basis)


def cleared(basis: Tree, new: Tree, keep: int) -> Tree:
    """The basis with its first `keep` vectors from `new`, and zeros behind."""
    return jax.tree.map(lambda b, r: jnp.zeros_like(b).at[:keep].set(r[:keep]), basis, new)


def empty(size: int, like: Tree) -> Tree:
    """`size` zero vectors in float32 or wider."""
    return jax.tree.map(
        lambda x: jnp.zeros((size, *x.shape), jnp.promote_types(x.dtype, jnp.float32)), like
    )


def orthogonal(v: Tree, basis: Tree) -> tuple[Tree, jax.Array]:
    """v without its parts along an orthonormal basis, and those parts, [m].

    Twice is enough: what rounding left of them in the first pass goes in the second.
    """
    first = coefficients(basis, v)
    v = trees.add_scaled(v, -1.0, combination(first, basis))
    second = coefficients(basis, v)
    return trees.add_scaled(v, -1.0, combination(second, basis)), first + second


def _products(basis: jax.Array, x: jax.Array) -> jax.Array:
    x = trees.widen(x)
    inside = tuple(range(x.ndim))
    after = tuple(axis + 1 for axis in inside)
    return lax.dot_general(
        basis, x.astype(basis.dtype), ((after, inside), ((), ())), precision=lax.Precision.HIGHEST
    )
