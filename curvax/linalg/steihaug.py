"""Conjugate gradients that stop at the edge of a trust region."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.linalg.cg_loop import Iterate, Rules, System, iterate
from curvax.linalg.preconditioners import Preconditioner, check_preconditioner, preconditioning
from curvax.linalg.solvers import Solution, Solver, StopReason


def steihaug(
    radius: float | jax.Array,
    max_steps: int = 20,
    *,
    tol: float | jax.Array = 1e-6,
    preconditioner: Preconditioner = None,
) -> Solver:
    """Approximately minimises ½ xᵀA x - bᵀx over ‖x‖₂ <= radius, A symmetric.

    Conjugate gradients from 0, along the last direction to the boundary where the next iterate
    would leave the region or the curvature is not positive. Steihaug 1983; Nocedal & Wright,
    Numerical Optimization, algorithm 7.2. The model falls at least as far as at the Cauchy point.

    Args:
        radius: of the region, >= 0, in the units of x: a number or a traced one.
        max_steps: products at most.
        tol: stop once ‖b - A x‖ <= tol·‖b‖.
        preconditioner: as in `cg`; the region stays a ball in the 2-norm.

    Returns:
        A `Solver`.

    Raises:
        TypeError, ValueError: an option out of range; at a solve, no diagonal for a power.
    """
    checks.check_count("steihaug", max_steps=max_steps)
    checks.check_range("radius", radius, 0, math.inf, stage="steihaug")
    checks.check_range("tol", tol, 0, math.inf, stage="steihaug")
    check_preconditioner(preconditioner, "steihaug")

    def step(edge_at: Any, s: Iterate, curvature: jax.Array) -> tuple[jax.Array, Any]:
        concave = curvature <= 0
        alpha = 1 / jnp.where(concave, 1.0, curvature)
        edge, inside = _to_boundary(s.x, s.p, edge_at)
        outside = ~inside(alpha)
        reason = jnp.where(concave, StopReason.negative_curvature, StopReason.max_steps)
        reason = jnp.where(outside & ~concave, StopReason.boundary, reason)
        return jnp.where(concave | outside, edge, alpha), reason

    def solve(
        product: Callable[[Tree], Tree],
        b: Tree,
        state: Any,
        *,
        diagonal: Tree = None,
        score: Any = None,
    ) -> tuple[Solution, Any]:
        del score
        precondition = preconditioning(preconditioner, product, diagonal, "steihaug")
        # Powers of two: iterates in these units are the others to the last bit.
        one = trees.magnitude(b)
        rhs = trees.scale(trees.inverse(one), b)
        r = trees.wide(rhs)
        x = jax.tree.map(jnp.zeros_like, r)
        rules = Rules(functools.partial(step, radius * trees.inverse(one)))
        length = trees.norm(b) * trees.inverse(one)
        plain = preconditioner is None
        system = System(product, precondition, length, length, tol, rules, plain)
        s = iterate(system, rhs, x, r, max_steps)
        x = trees.laid_out_like(trees.scale(one, s.x), b)
        return Solution(x, s.i, s.residual, s.reason), state

    return Solver(solve)


def _to_boundary(x: Tree, p: Tree, radius: Any) -> tuple[jax.Array, Callable[[Any], jax.Array]]:
    """The τ >= 0 with ‖x + τp‖ = radius, and whether ‖x + αp‖ < radius for a given α.

    In units near the radius and ‖p‖, so that no square leaves the range of floats.
    """
    radius = jnp.asarray(radius)
    whole, step = trees.magnitude(radius), trees.magnitude(p)
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
