"""Solves A x = b with the explicit matrix, for small models and as a reference for tests."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.devices import axes
from curvax.linalg.flatten import materialize, ravel, unravel
from curvax.linalg.solvers import Solution, Solver, StopReason, direct_solver, relative_residual


def dense() -> Solver:
    """Solves A x = b with the explicit matrix, by Cholesky or, if A is not positive definite, LU.

    Takes P products and memory P² for P parameters. If A is singular, x is 0 and the reason
    `StopReason.breakdown`.

    Returns:
        A `Solver`.

    Raises:
        TypeError: when the solver is called: A or b is complex.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> solution = curvax.dense()(lambda v: jnp.array([1.0, -4.0]) * v, jnp.ones(2))
        >>> solution.x.tolist()
        [1.0, -0.25]
    """

    def solve(product: Matvec, b: Tree) -> Solution:
        with jax.default_matmul_precision("highest"):
            matrix, rhs = materialize(product, b), ravel(b)
            checks.refuse_complex(matrix, "dense")
            x, reason = finite_or_zero(solve_symmetric(matrix, rhs))
            residual = relative_residual(rhs - matrix @ x, rhs)
        return Solution(unravel(x, b), jnp.int32(rhs.size), residual, reason)

    return direct_solver(solve)


def solve_symmetric(matrix: jax.Array, b: jax.Array) -> jax.Array:
    """A⁻¹ b by Cholesky where A, [P, P], is positive definite, else by LU; b is [P]."""
    factor = lax.linalg.cholesky(matrix)
    backward = lambda: _by_cholesky(factor, b)
    return axes.cond(jnp.all(jnp.isfinite(factor)), backward, lambda: _by_lu(matrix, b))


def finite_or_zero(x: Tree) -> tuple[Tree, jax.Array]:
    """(x, `direct`), or (0, `breakdown`) if an entry of x is not finite."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(x)]
    fine = functools.reduce(jnp.logical_and, finite, jnp.array(True))
    reason = jnp.where(fine, StopReason.direct, StopReason.breakdown).astype(jnp.int32)
    return jax.tree.map(lambda leaf: jnp.where(fine, leaf, 0), x), reason


def _by_cholesky(factor: jax.Array, b: jax.Array) -> jax.Array:
    solve = lambda y, transpose: lax.linalg.triangular_solve(
        factor, y, left_side=True, lower=True, transpose_a=transpose
    )
    return solve(solve(b[:, None], False), True)[:, 0]


def _by_lu(matrix: jax.Array, b: jax.Array) -> jax.Array:
    lu, _, permutation = lax.linalg.lu(matrix)
    y = lax.linalg.triangular_solve(
        lu, b[permutation][:, None], left_side=True, lower=True, unit_diagonal=True
    )
    return lax.linalg.triangular_solve(lu, y, left_side=True, lower=False)[:, 0]
