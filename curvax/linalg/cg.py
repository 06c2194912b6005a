"""Conjugate gradients as optimisers want them: preconditioned, warm-started, stopped in time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.linalg.backtracking import Score, best, keep, nothing_kept
from curvax.linalg.cg_loop import Iterate, Rules, System, iterate
from curvax.linalg.preconditioners import Preconditioner, check_preconditioner, preconditioning
from curvax.linalg.solvers import Solution, Solver, StopReason, stateless


def cg(
    max_steps: int = 20,
    *,
    tol: float | jax.Array = 1e-6,
    preconditioner: Preconditioner = None,
    warm_start: float = 0.0,
    progress: float | None = None,
    backtrack: bool = False,
) -> Solver:
    """Conjugate gradients for A x = b, A symmetric and meant to be positive definite.

    On a direction of negative curvature it stops where it stands, and at the first step goes one
    length along it: from x = 0 that is the preconditioned gradient M⁻¹b. A number that is not
    finite ends it with the iterate before.

    Args:
        max_steps: products at most; each step takes one, and so does a start that is not zero.
        tol: stop once ‖b - A x‖ <= tol·‖b‖.
        preconditioner: None; a callable v ↦ M⁻¹v, M positive definite; or ξ, for the power
            M = (|D| + λ)^ξ of the `diagonal` handed in and the damping of the product. Martens
            2010, section 4.7, has ξ = ¾.
        warm_start: γ in [0, 1]; each solve starts from γ times the last iterate of the one before.
            0 starts from 0 and keeps nothing. Martens 2010, section 4.5; Martens & Sutskever 2012
            decay it.
        progress: ε of the relative stop on φ(x) = ½ xᵀA x - bᵀx, at step i over the last
            k = max(10, ⌈i/10⌉):

                i > k,   φ_i < 0,   (φ_i - φ_{i-k}) / φ_i < k ε

            Martens 2010, section 4.4, has ε = 5e-4 and no tolerance.
        backtrack: keep iterates at steps growing by 1.3, and after the last go back through them
            as long as `score(x)` falls. Memory of one vector for each; one score for each looked
            at. Martens 2010, section 4.6.

    Returns:
        A `Solver`. Martens 2010 is Deep learning via Hessian-free optimization, ICML.

    Raises:
        TypeError, ValueError: an option out of range; at a solve, no diagonal for ξ, no score to
            go back by.
    """
    checks.check_count("cg", max_steps=max_steps)
    checks.check_static("cg", warm_start=warm_start, progress=progress, backtrack=backtrack)
    checks.check_range("tol", tol, 0, math.inf, stage="cg")
    checks.check_range("warm_start", warm_start, 0, 1, stage="cg")
    checks.check_range("progress", progress, 0, math.inf, stage="cg")
    check_preconditioner(preconditioner, "cg")
    if warm_start and max_steps == 1:
        raise ValueError(
            "`cg(1, warm_start=...)` spends its only product on the residual of the start and "
            "never takes a step. Write `cg(2, ...)` or more."
        )

    def solve(
        product: Callable[[Tree], Tree],
        b: Tree,
        state: Any,
        *,
        diagonal: Tree = None,
        score: Score | None = None,
    ) -> tuple[Solution, Any]:
        ranking = _needed(score) if backtrack else None
        precondition = preconditioning(preconditioner, product, diagonal, "cg")
        x, start, begun = _start(product, b, state, warm_start)
        # Powers of two: iterates in these units are the others to the last bit.
        one = trees.magnitude(start)
        x, r, rhs = (trees.scale(trees.inverse(one), tree) for tree in (x, start, b))
        restored = lambda x: trees.laid_out_like(trees.scale(one, x), b)
        rules = Rules(_length, *_watching(rhs, max_steps, progress, backtrack))
        length, begun_at = (trees.norm(tree) * trees.inverse(one) for tree in (b, start))
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


def _needed(score: Score | None) -> Score:
    if score is None:
        raise ValueError(
            "`cg(backtrack=True)` ranks iterates by the loss, and has none to rank them by. In a "
            "pipe, pass `value_fn=curvax.Objective(...)` to the update; to the solver itself, pass "
            "`score=`, a callable `x -> scalar`."
        )
    return score


def _zeros(params: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, params)


def _start(
    product: Callable[[Tree], Tree], b: Tree, state: Tree, decay: float
) -> tuple[Tree, Tree, Any]:
    """(x₀, b - A x₀, products spent on it): none where x₀ or b is 0, or b is NaN."""
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


def _length(s: Iterate, curvature: jax.Array) -> tuple[jax.Array, Any]:
    """To the minimum along p; without one, one length at the first step, and later none."""
    none = curvature <= 0
    fallback = jnp.where(s.i == 0, 1.0, 0.0)
    alpha = jnp.where(none, fallback, 1 / jnp.where(none, 1.0, curvature))
    return alpha, jnp.where(none, StopReason.negative_curvature, StopReason.max_steps)


def _watching(b: Tree, max_steps: int, progress: float | None, backtrack: bool) -> tuple[Any, Any]:
    """What looks at each iterate, and its trail at the start: (φ of each step, iterates kept)."""
    models = () if progress is None else jnp.zeros(max_steps + 1, jnp.result_type(float))
    kept = nothing_kept(b, max_steps) if backtrack else ()

    def watch(s: Iterate) -> tuple[Any, Any]:
        models, kept = s.trail
        reason: Any = StopReason.max_steps
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
