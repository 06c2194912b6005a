"""Random trees with identity covariance, E[z zᵀ] = I, one key per leaf."""

import math

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree


def as_key(key: jax.Array | int) -> jax.Array:
    """A typed key: itself, or that of a seed."""
    key = jnp.asarray(key)
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.key(key)


def rademacher(key: jax.Array, tree: Tree) -> Tree:
    """Independent signs ±1: the Hutchinson probe of least variance.

    Args:
        key: a typed key, split once per leaf.
        tree: a pytree of arrays, for structure, shapes and dtypes.

    Returns:
        Such a tree of ±1. Yao et al., AdaHessian, arXiv:2006.00719, section 3.1.
    """
    return _draw(_signs, key, tree)


def _signs(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    # 32 signs from each random word: JAX's own takes a word for each, nine times the time.
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (1 - 2 * bits.astype(dtype)).ravel()[:size].reshape(shape)


def gaussian_probe(key: jax.Array, tree: Tree) -> Tree:
    """Independent standard normals, shaped and typed like `tree`; arguments as `rademacher`."""
    return _draw(jax.random.normal, key, tree)


def _draw(draw, key: jax.Array, tree: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves)) if leaves else ()
    return jax.tree.unflatten(treedef, [draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])
