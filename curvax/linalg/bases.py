"""Bases: m vectors as one tree with leaves [m, ...], their coefficients and combinations.

Sharded leaves take sums of products instead of matrix products, which any mesh allows. In a loop,
write a vector to the basis after the products with it: XLA copies the basis otherwise.
"""

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree


def coefficients(basis: Tree, v: Tree) -> jax.Array:
    """The inner products <bᵢ, v>, [m]."""

    def inner(b: jax.Array, x: jax.Array) -> jax.Array:
        x = trees.widen(x)
        if trees.is_sharded(b) or trees.is_sharded(x):
            return jnp.sum(b * x[None], axis=range(1, b.ndim))
        return jnp.tensordot(b, x, axes=x.ndim, precision="highest")

    return sum(jax.tree.leaves(jax.tree.map(inner, basis, v)), jnp.zeros((), jnp.float32))


def combination(weights: jax.Array, basis: Tree) -> Tree:
    """Σᵢ wᵢ bᵢ for weights [m]; for weights [n, m] a basis of n such sums, computed in turn."""
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
    """The basis with bᵢ replaced by v."""
    place = lambda b, x: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), i, 0)
    return jax.tree.map(place, basis, v)


def first(basis: Tree, k: int) -> Tree:
    """The basis of the first k vectors."""
    return jax.tree.map(lambda b: b[:k], basis)


def cleared(basis: Tree, new: Tree, keep: int) -> Tree:
    """The basis with its first `keep` vectors replaced by those of `new` and the others by 0."""
    return jax.tree.map(lambda b, r: jnp.zeros_like(b).at[:keep].set(r[:keep]), basis, new)


def empty(size: int, like: Tree) -> Tree:
    """A basis of `size` zero vectors shaped like `like`, in float32 or wider."""
    zeros = lambda x: jnp.broadcast_to(trees.widen(jnp.zeros_like(x))[None], (size, *x.shape))
    return jax.tree.map(zeros, like)


def orthogonal(v: Tree, basis: Tree) -> tuple[Tree, jax.Array]:
    """(v minus its projection on an orthonormal basis, its coefficients [m]).

    By Gram-Schmidt, twice, which suffices for orthogonality to rounding error. Giraud, Langou &
    Rozložník, Comput. Math. Appl. 50, 2005.
    """
    first = coefficients(basis, v)
    v = trees.add_scaled(v, -1.0, combination(first, basis))
    second = coefficients(basis, v)
    return trees.add_scaled(v, -1.0, combination(second, basis)), first + second
