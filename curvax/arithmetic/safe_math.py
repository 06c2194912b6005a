"""Elementwise quotients, roots and powers with finite derivatives.

Values equal those of `jax.numpy`. The derivatives of `jax.numpy` contain 1/b², which overflows, and
are ∞ for a root at 0, which times a cotangent of 0 is NaN. The derivatives here stay in range, and
are 0 where the true one is infinite.
"""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_jvp
def quotient(a: Any, b: Any) -> jax.Array:
    """a / b"""
    return jnp.asarray(a) / b


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    q = quotient(a, b)
    return q, quotient(da - q * db, b).astype(q.dtype)


def ratio(a: Any, b: Any) -> jax.Array:
    """a / b, with value and derivative 0 where b is 0."""
    return jnp.where(b == 0, 0.0, quotient(a, jnp.where(b == 0, 1.0, b)))


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """√x, with derivative 0 at 0."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    y = root(*primals)
    return y, ratio(0.5 * tangents[0], y).astype(y.dtype)


def power(x: jax.Array, exponent: Any) -> jax.Array:
    """x^k for x >= 0, with derivative 0 at 0 where k < 1."""
    x = jnp.asarray(x)
    return _power(x, jnp.asarray(exponent, x.dtype) if _whole(exponent) else exponent)


@jax.custom_jvp
def _power(x: jax.Array, exponent: Any) -> jax.Array:
    return x**exponent


@_power.defjvp
def _power_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, k), (dx, dk) = primals, tangents
    y = _power(x, k)
    steep = (x == 0) & (k < 1)
    along = jnp.where(steep, 0, k * _power(jnp.where(steep, 1, x), k - 1))
    log = jnp.log(jnp.where(x == 0, 1, x))
    return y, (along * dx + y * log * dk).astype(y.dtype)


def _whole(exponent: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(exponent), jnp.integer)
