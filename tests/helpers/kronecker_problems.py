"""Small problems for Kronecker factors, and comparisons of whole trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx

N = 6


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def regression(model: Any, params: Any, batch: Any, **options: Any) -> cx.Objective:
    kind = jax.eval_shape(model, params, batch)
    batch = dict(batch, target=jnp.zeros(kind.shape, kind.dtype))
    return cx.Objective(cx.gaussian("target"), batch, model=model, **options)


def assert_same(found: Any, expected: Any, rtol: float = 1e-11) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = max(np.max(np.abs(y), initial=0.0), 1e-30)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * size)
