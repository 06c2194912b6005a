"""Decompositions of stacks of matrices [..., d, d], safe where a program holds several of them.

On the CPU jaxlib before 0.11.2 hands the matrices of a stack to the threads that run the program,
and waits for them: as many such calls at once as there are threads wait forever. There the matrices
of a stack are taken one by one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(eigenvalues in ascending order, eigenvectors as columns) of symmetric matrices."""
    values, vectors = _each(lambda m: tuple(jnp.linalg.eigh(m)), matrix)
    return values, vectors


def orthogonal_factor(matrix: jax.Array) -> jax.Array:
    """Q of M = QR."""
    (q,) = _each(lambda m: (jnp.linalg.qr(m)[0],), matrix)
    return q


def cholesky_solved(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """M⁻¹ V of positive definite matrices M and matrices V [..., d, n]."""
    (x,) = _each(lambda m, v: (cho_solve(cho_factor(m, lower=True), v),), matrix, v)
    return x


def _each(f: Callable[..., tuple[jax.Array, ...]], *stacks: jax.Array) -> tuple[jax.Array, ...]:
    """f of the matrices of stacks of equal shapes [..., ., .]."""
    first = stacks[0].shape[:-2]
    if not first:
        return f(*stacks)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in stacks]
    one_by_one = lambda *xs: lax.map(lambda x: f(*x), xs)
    found = lax.platform_dependent(*flat, cpu=one_by_one, default=jax.vmap(f))
    return tuple(x.reshape(*first, *x.shape[1:]) for x in found)
