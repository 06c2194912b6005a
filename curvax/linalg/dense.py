"""A x = b by the whole matrix: for small models, and as the reference for everything else."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.linalg.flatten import materialize, ravel, unravel
from curvax.linalg.solvers import Solution, Solver, StopReason, direct_solver, relative_residual


def dense() -> Solver:
    """Solves by the matrix itself: Cholesky, and LU where it is not positive definite.

    P products and memory P² for P parameters. A singular matrix gives x = 0 and the reason
    `breakdown`.
    """

    def solve(product: Callable[[Tree], Tree], b: Tree) -> Solution:
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


def finite_or_zero(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x with the reason `direct`, or 0 with `breakdown` where an entry is not finite."""
    fine = jnp.all(jnp.isfinite(x))
    reason = jnp.where(fine, StopReason.direct, StopReason.breakdown).astype(jnp.int32)
    return jnp.where(fine, x, 0), reason


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
