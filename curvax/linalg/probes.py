"""Random vectors with identity covariance, E[z zᵀ] = I, shaped like a tree."""

import math

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key


def as_key(key: Key) -> jax.Array:
    """Converts a seed to a typed key; typed keys are returned unchanged."""
    key = jnp.asarray(key)
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.key(key)


def rademacher(key: jax.Array, tree: Tree) -> Tree:
    """Draws independent signs ±1, the probe with the least variance in Hutchinson's estimates.

    Yao et al., AdaHessian, arXiv:2006.00719, section 3.1.

    Args:
        key: a typed key, split once for each leaf.
        tree: a pytree of arrays, of which structure, shapes and dtypes are read.

    Returns:
        A tree like `tree` with entries ±1.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> z = curvax.rademacher(jax.random.key(0), {"w": jnp.zeros((4, 3))})
        >>> z["w"].shape, float(jnp.min(jnp.abs(z["w"])))
        ((4, 3), 1.0)
    """
    return _draw(_signs, key, tree)


def _signs(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    # 32 signs from each random word; `jax.random.rademacher` draws a word for every sign and takes
    # nine times as long.
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (1 - 2 * bits.astype(dtype)).ravel()[:size].reshape(shape)


def gaussian_probe(key: jax.Array, tree: Tree) -> Tree:
    """Draws independent standard normal entries.

    Args:
        key: a typed key, split once for each leaf.
        tree: a pytree of arrays, of which structure, shapes and dtypes are read.

    Returns:
        A tree like `tree` with entries from N(0, 1).

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> z = curvax.gaussian_probe(jax.random.key(0), {"w": jnp.zeros((4, 3))})
        >>> z["w"].shape
        (4, 3)
    """
    return _draw(jax.random.normal, key, tree)


def _draw(draw, key: jax.Array, tree: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves)) if leaves else ()
    return jax.tree.unflatten(treedef, [draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])
