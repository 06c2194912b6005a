"""Conjugate gradients within a trust region."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Scalar, Score
from curvax.linalg.cg_loop import Iterate, Rules, System, iterate
from curvax.linalg.preconditioners import (
    Preconditioner,
    check_preconditioner,
    preconditioned,
    preconditioning,
)
from curvax.linalg.solvers import Solution, Solver, StopReason


def steihaug(
    radius: Scalar,
    max_steps: int = 20,
    *,
    tol: Scalar = 1e-6,
    preconditioner: Preconditioner = None,
) -> Solver:
    """Truncated conjugate gradients for a trust-region subproblem, A symmetric.

        minimise ½ xᵀA x - bᵀx   subject to   ‖x‖₂ <= radius

    Conjugate gradients from 0. If an iterate would leave the region, or a direction has negative
    curvature, the solver moves along that direction to the boundary and stops. The model decreases
    at least as much as at the Cauchy point. Steihaug, SIAM J. Numer. Anal. 20, 1983; Nocedal &
    Wright, Numerical Optimization, algorithm 7.2.

    Args:
        radius: of the region, >= 0, in the units of x; a number or a traced scalar.
        max_steps: maximum number of products, at least 1.
        tol: stops once ‖b - A x‖ <= tol·‖b‖, tol >= 0.
        preconditioner: as in `cg`. The region remains a ball in the 2-norm.

    Returns:
        A `Solver`.

    Raises:
        TypeError, ValueError: an option is out of range. When the solver is called: there is no
            `diagonal` for an exponent as preconditioner.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> b = jnp.array([3.0, 4.0])
        >>> solution = curvax.steihaug(1.0)(lambda v: v, b)
        >>> [round(x, 3) for x in solution.x.tolist()]
        [0.6, 0.8]
        >>> curvax.StopReason(int(solution.reason)).name
        'boundary'
    """
    checks.check_count("steihaug", max_steps=max_steps)
    checks.check_range("radius", radius, 0, math.inf, stage="steihaug")
    checks.check_range("tol", tol, 0, math.inf, stage="steihaug")
    check_preconditioner(preconditioner, "steihaug")
    if isinstance(preconditioner, Solver):
        make = lambda m: steihaug(radius, max_steps, tol=tol, preconditioner=m)
        return preconditioned(preconditioner, make)

    def step(edge_at: Scalar, s: Iterate, curvature: jax.Array) -> tuple[jax.Array, jax.Array]:
        concave = curvature <= 0
        alpha = 1 / jnp.where(concave, 1.0, curvature)
        edge, inside = _to_boundary(s.x, s.p, edge_at)
        outside = ~inside(alpha)
        reason = jnp.where(concave, StopReason.negative_curvature, StopReason.max_steps)
        reason = jnp.where(outside & ~concave, StopReason.boundary, reason)
        return jnp.where(concave | outside, edge, alpha), reason

    def solve(
        product: Matvec,
        b: Tree,
        state: Tree,
        *,
        diagonal: Tree = None,
        score: Score | None = None,
    ) -> tuple[Solution, Tree]:
        del score
        precondition = preconditioning(preconditioner, product, diagonal, "steihaug")
        # Division by a power of two is exact and keeps the squares of residuals in range.
        unit = trees.magnitude(b)
        rhs = trees.scale(trees.inverse(unit), b)
        r = trees.wide(rhs)
        x = jax.tree.map(jnp.zeros_like, r)
        rules = Rules(functools.partial(step, radius * trees.inverse(unit)))
        length = trees.norm(b) * trees.inverse(unit)
        plain = preconditioner is None
        system = System(product, precondition, length, length, tol, rules, plain)
        s = iterate(system, rhs, x, r, max_steps)
        x = trees.laid_out_like(trees.scale(unit, s.x), b)
        return Solution(x, s.i, s.residual, s.reason), state

    return Solver(solve)


def _to_boundary(
    x: Tree, p: Tree, radius: Scalar
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """(the τ >= 0 with ‖x + τp‖ = radius, α ↦ whether ‖x + αp‖ < radius).

    x and p are first divided by powers of two near the radius and ‖p‖, to keep squares in range.
    """
    radius = jnp.asarray(radius)
    whole, step = trees.power_of_two(radius), trees.magnitude(p)
    x = trees.scale(trees.inverse(whole), x)
    u = trees.scale(trees.inverse(step), trees.wide(p))
    xx, xu, uu = trees.dot(x, x), trees.dot(x, u), trees.dot(u, u)
    square = (radius * trees.inverse(whole)) ** 2
    root = jnp.sqrt(xu**2 + uu * jnp.maximum(square - xx, 0))
    per_step = whole * trees.inverse(step)
    tau = trees.ratio(root - xu, uu) * per_step

    def inside(alpha: jax.Array) -> jax.Array:
        share = trees.ratio(alpha, per_step)
        return xx + share * (2 * xu + share * uu) < square

    return tau, inside
