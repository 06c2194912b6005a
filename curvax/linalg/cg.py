"""Conjugate gradients with the options of Hessian-free optimisation."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Period, Scalar, Score
from curvax.devices import axes
from curvax.linalg.backtracking import best, keep, nothing_kept
from curvax.linalg.cg_loop import Iterate, Reason, Rules, System, iterate
from curvax.linalg.preconditioners import (
    Preconditioner,
    check_preconditioner,
    preconditioned,
    preconditioning,
)
from curvax.linalg.solvers import Solution, Solver, StopReason, stateless


def cg(
    max_steps: int = 20,
    *,
    tol: Scalar = 1e-6,
    preconditioner: Preconditioner = None,
    warm_start: float = 0.0,
    progress: float | None = None,
    backtrack: bool = False,
) -> Solver:
    """Preconditioned conjugate gradients for A x = b, A symmetric positive definite.

    If a direction has negative curvature, the solver returns the current iterate, or at the first
    step one unit along that direction (the preconditioned gradient M⁻¹b, from x = 0). If a value
    is not finite, it returns the iterate before. Nocedal & Wright, Numerical Optimization,
    algorithm 5.3; the options are those of Martens, Deep learning via Hessian-free optimization,
    ICML 2010 ("Martens" below).

    Args:
        max_steps: maximum number of products, at least 1. A step takes one, and so does the
            residual of a start other than 0.
        tol: stops once ‖b - A x‖ <= tol·‖b‖, tol >= 0.
        preconditioner: None; a callable v ↦ M⁻¹v with M positive definite; an exponent ξ in [0, 1]
            for M = (|D| + λ)^ξ, where D is the `diagonal` that the solver receives and λ the
            damping of the product; or `kronecker()` for the Kronecker factors that it receives,
            with that damping. Martens, section 4.7, uses ξ = 0.75.
        warm_start: γ in [0, 1]. A solve starts from γ times the solution of the solve before; 0
            starts from 0 and keeps no state. Martens, section 4.5 (γ = 1); Martens & Sutskever,
            2012 (γ < 1).
        progress: ε >= 0, or None. Stops when the model φ(x) = ½ xᵀA x - bᵀx has decreased little
            over the last k = max(10, ⌈i/10⌉) of i steps:

                i > k,   φ_i < 0,   (φ_i - φ_{i-k}) / φ_i < k ε

            Martens, section 4.4, uses ε = 5e-4 and no tolerance.
        backtrack: whether to keep iterates, at steps that grow by a factor of 1.3, and to return
            from the last of them to earlier ones as long as `score(x)` decreases. Costs the memory
            of a vector for each iterate kept, and one score for each compared. Martens, section
            4.6.

    Returns:
        A `Solver`.

    Raises:
        TypeError, ValueError: an option is out of range. When the solver is called: there is no
            `diagonal` for ξ, or no `score` for `backtrack`.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> a = jnp.array([[4.0, 1.0], [1.0, 3.0]])
        >>> solution = curvax.cg(10)(lambda v: a @ v, jnp.array([1.0, 2.0]))
        >>> [round(float(x), 3) for x in solution.x]
        [0.091, 0.636]
    """
    checks.check_count("cg", max_steps=max_steps)
    checks.check_static("cg", warm_start=warm_start, progress=progress, backtrack=backtrack)
    checks.check_range("tol", tol, 0, math.inf, stage="cg")
    checks.check_range("warm_start", warm_start, 0, 1, stage="cg")
    checks.check_range("progress", progress, 0, math.inf, stage="cg")
    check_preconditioner(preconditioner, "cg")
    if isinstance(preconditioner, Solver):
        make = lambda m: cg(
            max_steps, tol=tol, preconditioner=m, warm_start=warm_start, progress=progress,
            backtrack=backtrack,
        )  # fmt: skip
        return preconditioned(preconditioner, make)
    if warm_start and max_steps == 1:
        raise ValueError(
            "`cg(1, warm_start=...)` uses its only product for the residual of the start and "
            "never takes a step. Write `cg(2, ...)` or more."
        )

    def solve(
        product: Matvec,
        b: Tree,
        state: Tree,
        *,
        diagonal: Tree = None,
        score: Score | None = None,
    ) -> tuple[Solution, Tree]:
        ranking = _required(score) if backtrack else None
        precondition = preconditioning(preconditioner, product, diagonal, "cg")
        x, start, begun = _start(product, b, state, warm_start)
        # Division by a power of two is exact and keeps the squares of residuals in range.
        unit = trees.magnitude(start)
        x, r, rhs = (trees.scale(trees.inverse(unit), tree) for tree in (x, start, b))
        restored = lambda x: trees.laid_out_like(trees.scale(unit, x), b)
        rules = Rules(_length, *_watching(rhs, max_steps, progress, backtrack))
        length, begun_at = (trees.norm(tree) * trees.inverse(unit) for tree in (b, start))
        plain, warm = preconditioner is None, warm_start > 0
        system = System(product, precondition, length, begun_at, tol, rules, plain, warm)
        s = iterate(system, rhs, x, r, max_steps - begun)
        found, residual = restored(s.x), s.residual
        state = trees.laid_out_like(found, state) if warm_start else state
        if ranking is not None:
            rank = lambda x: ranking(restored(x))
            found, residual = best(s.trail[1], s.i, max_steps, rank)
            found = restored(found)
        return Solution(found, s.i + begun, residual, s.reason), state

    return Solver(solve, _zeros if warm_start else stateless)


def _required(score: Score | None) -> Score:
    if score is None:
        raise ValueError(
            "`cg(backtrack=True)` ranks iterates by the loss, and received none. In a pipe, pass "
            "`value_fn=curvax.Objective(...)` to the update; to the solver itself, pass `score=`, "
            "a callable `x -> scalar`."
        )
    return score


def _zeros(params: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, params)


def _start(product: Matvec, b: Tree, state: Tree, decay: float) -> tuple[Tree, Tree, Period]:
    """(x₀, b - A x₀, products used): no product if x₀ or b is 0, or b is NaN."""
    wide = trees.wide(b)
    cold = _zeros(wide), wide
    if not decay:
        return *cold, 0
    start = trees.scale(decay, trees.laid_out_like(state, b))
    begun = (trees.norm(start) > 0) & (trees.norm(b) > 0)

    def warm() -> tuple[Tree, Tree]:
        ax = trees.laid_out_like(product(start), wide)
        return trees.laid_out_like(start, wide), trees.add_scaled(wide, -1.0, ax)

    x, r = axes.cond(begun, warm, lambda: cold)
    return x, r, begun.astype(jnp.int32)


def _length(s: Iterate, curvature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(α to the minimum along p, the reason). With no minimum α is 1 at the first step, else 0."""
    none = curvature <= 0
    fallback = jnp.where(s.i == 0, 1.0, 0.0)
    alpha = jnp.where(none, fallback, 1 / jnp.where(none, 1.0, curvature))
    return alpha, jnp.where(none, StopReason.negative_curvature, StopReason.max_steps)


def _watching(
    b: Tree, max_steps: int, progress: float | None, backtrack: bool
) -> tuple[Callable[[Iterate], tuple[Tree, Reason]], Tree]:
    """(the `watch` rule, its initial trail), a trail being (φ of every step, iterates kept)."""
    models = () if progress is None else jnp.zeros(max_steps + 1, jnp.result_type(float))
    kept = nothing_kept(b, max_steps) if backtrack else ()

    def watch(s: Iterate) -> tuple[Tree, Reason]:
        models, kept = s.trail
        reason: Reason = StopReason.max_steps
        if progress is not None:
            models = models.at[s.i].set(s.model.astype(models.dtype))
            reason = jnp.where(_stalled(models, s.i, progress), StopReason.progress, reason)
        if backtrack:
            kept = keep(kept, s.x, s.residual, s.i, max_steps)
        return (models, kept), reason

    return watch, (models, kept)


def _stalled(models: jax.Array, i: jax.Array, epsilon: float) -> jax.Array:
    k = jnp.maximum(10, -(-i // 10))
    now, then = models[i], models[jnp.maximum(i - k, 0)]
    return (i > k) & (now < 0) & (trees.ratio(now - then, now) < epsilon * k.astype(now.dtype))
