"""Several vectors as one tree, stacked along a new first axis: coefficients and combinations.

Both are products of a matrix and a vector for each leaf, and of a sharded leaf sums of products,
which no mesh refuses. A loop copies its basis where it writes a vector before it multiplies.
"""

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree


def coefficients(basis: Tree, v: Tree) -> jax.Array:
    """<bᵢ, v> for each vector of the basis, [m]."""

    def inner(b: jax.Array, x: jax.Array) -> jax.Array:
        x = trees.widen(x)
        if trees.is_sharded(b) or trees.is_sharded(x):
            return jnp.sum(b * x[None], axis=range(1, b.ndim))
        return jnp.tensordot(b, x, axes=x.ndim, precision="highest")

    return sum(jax.tree.leaves(jax.tree.map(inner, basis, v)), jnp.zeros((), jnp.float32))


def combination(weights: jax.Array, basis: Tree) -> Tree:
    """Σᵢ wᵢ bᵢ, or for weights [n, m] a new basis of n such sums, one after the other."""
    if weights.ndim > 1:
        return lax.map(lambda w: combination(w, basis), weights)

    def sums(b: jax.Array) -> jax.Array:
        if trees.is_sharded(b):
            return jnp.sum(weights.reshape(-1, *[1] * (b.ndim - 1)) * b, axis=0)
        return jnp.tensordot(weights, b, axes=1, precision="highest")

    return jax.tree.map(lambda b: sums(b).astype(b.dtype), basis)


def row(basis: Tree, i: jax.Array | int) -> Tree:
    """bᵢ"""
    return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, keepdims=False), basis)


def with_row(basis: Tree, i: jax.Array | int, v: Tree) -> Tree:
    """The basis with v in the place of bᵢ."""
    place = lambda b, x: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), i, 0)
    return jax.tree.map(place, basis, v)


def first(basis: Tree, k: int) -> Tree:
    """The first k vectors."""
    return jax.tree.map(lambda b: b[:k], basis)


def cleared(basis: Tree, new: Tree, keep: int) -> Tree:
    """The basis with its first `keep` vectors from `new`, and zeros behind."""
    return jax.tree.map(lambda b, r: jnp.zeros_like(b).at[:keep].set(r[:keep]), basis, new)


def empty(size: int, like: Tree) -> Tree:
    """`size` zero vectors in float32 or wider."""
    zeros = lambda x: jnp.broadcast_to(trees.widen(jnp.zeros_like(x))[None], (size, *x.shape))
    return jax.tree.map(zeros, like)


def orthogonal(v: Tree, basis: Tree) -> tuple[Tree, jax.Array]:
    """v without its parts along an orthonormal basis, and those parts, [m].

    Twice is enough: what rounding left of them in the first pass goes in the second.
    """
    first = coefficients(basis, v)
    v = trees.add_scaled(v, -1.0, combination(first, basis))
    second = coefficients(basis, v)
    return trees.add_scaled(v, -1.0, combination(second, basis)), first + second
