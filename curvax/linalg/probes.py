"""Random trees with identity covariance, E[z zᵀ] = I, one key per leaf."""

import jax
import jax.numpy as jnp

from curvax.trees import Tree


def as_key(key: jax.Array | int) -> jax.Array:
    """A typed key: itself, or that of a seed."""
    key = jnp.asarray(key)
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.key(key)


def rademacher(key: jax.Array, tree: Tree) -> Tree:
    """Independent signs ±1, shaped and typed like `tree`."""
    return _draw(jax.random.rademacher, key, tree)


def gaussian_probe(key: jax.Array, tree: Tree) -> Tree:
    """Independent standard normals, shaped and typed like `tree`."""
    return _draw(jax.random.normal, key, tree)


def _draw(draw, key: jax.Array, tree: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves)) if leaves else ()
    return jax.tree.unflatten(treedef, [draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])
