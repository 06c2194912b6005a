"""A net of 21 parameters, its dense derivatives, and comparisons of whole trees."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

EXAMPLES = 8

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Half the compile time of `jax.jit`, for numbers equal to rounding."""


def net_params(dtype: Any = jnp.float64) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, *shape: 0.7 * jax.random.normal(key, shape, dtype)
    return {
        "hidden": {"bias": draw(keys[0], 3), "kernel": draw(keys[1], 4, 3)},
        "out": {"kernel": draw(keys[2], 3, 2)},
    }


def net_batch(n: int = EXAMPLES, dtype: Any = jnp.float64) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        "x": jax.random.normal(keys[0], (n, 4), dtype),
        "y": jax.random.normal(keys[1], (n, 2), dtype),
    }


def net(params: Any, batch: Any) -> jax.Array:
    """The outputs, [n, 2]."""
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :])
    return hidden @ params["out"]["kernel"]


def net_loss(params: Any, batch: Any) -> jax.Array:
    """A mean over examples whose Hessian is dense and indefinite."""
    return jnp.mean(jnp.sum((net(params, batch) - batch["y"]) ** 2, axis=1))


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def large_spectrum() -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """10⁴ eigenvalues, ten of them above the bulk in [-1, 1] at 2 to 11, and a reflection of the
    axes on vectors of that size, so that no eigenvector is an axis."""
    values = jnp.concatenate([jnp.linspace(-1, 1, 9_990), jnp.arange(10) + 2.0])
    u = jax.random.normal(jax.random.key(6), values.shape)
    return values, lambda v: v - 2 * u * (u @ v) / (u @ u)


def dense_hessian(f: Callable[[Any], jax.Array], params: Any) -> np.ndarray:
    """∇²f as a matrix, by a way that no code of curvax takes: forward over forward."""
    x, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacfwd(jax.jacfwd(lambda v: f(unravel(v)))))(x))


def assert_trees_close(actual: Any, expected: Any, tol: float = 1e-12) -> None:
    """Same structure, shapes and dtypes, and numbers equal to `tol`, relative to 1 or more."""
    assert str(jax.tree.structure(actual)) == str(jax.tree.structure(expected))
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        where = jax.tree_util.keystr(path)
        assert jnp.shape(x) == jnp.shape(y), where
        assert jnp.result_type(x) == jnp.result_type(y), where
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol, err_msg=where)


def matrix_of(make: Any, like: Any) -> np.ndarray:
    """The matrix of the product that `make()` returns, a column for each unit tree."""
    point, unravel = ravel_pytree(like)

    def columns() -> jax.Array:
        product = make()
        return jax.lax.map(lambda e: ravel_pytree(product(unravel(e)))[0], jnp.eye(point.size))

    return np.asarray(quick_jit(columns)()).T


def loader_of(*sizes: int) -> list[Any]:
    """The batch of the net in parts of these sizes."""
    edges = np.cumsum([0, *sizes])
    cut = lambda i, j: jax.tree.map(lambda x: np.asarray(x[i:j]), net_batch())
    return [cut(i, j) for i, j in pairwise(edges)]
