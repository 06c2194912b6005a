"""The loop of preconditioned conjugate gradients, which a solver stops where it sees fit.

Written for device axes and sharded parameters: sums of products in float32 or wider, a carry whose
leaves vary over the same axes from the first step on, one product a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import axes, trees
from curvax.linalg.solvers import Reason, relative_residual
from curvax.linalg.vectors import laid_out_like
from curvax.trees import Tree


class Iterate(NamedTuple):
    """x_i, and what the step to x_{i+1} needs."""

    x: Tree
    """Float32 or wider."""
    r: Tree
    """b - A x, float32 or wider."""
    p: Tree
    """The direction, with the dtypes of b: it enters the product and the step alike."""
    rz: jax.Array
    """rᵀM⁻¹r."""
    model: jax.Array
    """φ(x) = ½ xᵀA x - bᵀx."""
    residual: jax.Array
    """‖r‖ / ‖b‖."""
    i: jax.Array
    """Steps taken, int32 scalar."""
    reason: jax.Array
    """A `Reason`; `max_steps` as long as there is no other."""
    trail: Any
    """What `watch` keeps."""


class Rules(NamedTuple):
    """What tells one conjugate-gradient solver from another."""

    length: Callable[[Iterate, jax.Array], tuple[jax.Array, Any]]
    """(iterate, pᵀA p) ↦ (how far to go along p, the `Reason` to stop there or `max_steps`)."""
    watch: Callable[[Iterate], tuple[Any, Any]] = lambda s: (s.trail, Reason.max_steps)
    """iterate ↦ (its trail, a `Reason` to stop or `max_steps`)."""
    trail: Any = ()
    """The trail at the start."""


def iterate(
    product: Callable[[Tree], Tree],
    precondition: Callable[[Tree], Tree],
    b: Tree,
    x: Tree,
    r: Tree,
    rules: Rules,
    *,
    limit: Any,
    tol: Any,
) -> Iterate:
    """Conjugate gradients on A x = b from x with its residual r, over at most `limit` products.

    Nocedal & Wright, Numerical Optimization, algorithm 5.3. An iterate that is not finite is
    dropped for the one before.
    """

    def measure(r: Tree) -> tuple[Tree, jax.Array, jax.Array]:
        z = precondition(r)
        return z, trees.dot(r, z), relative_residual(r, b)

    def advance(s: Iterate) -> Iterate:
        ap = laid_out_like(product(s.p), s.r)
        curvature = trees.dot(s.p, ap)
        alpha, reason = rules.length(s, curvature)
        r = trees.add_scaled(s.r, -alpha, ap)
        z, rz, residual = measure(r)
        fine = jnp.isfinite(alpha) & jnp.isfinite(rz) & jnp.isfinite(residual)
        ahead = s._replace(
            x=trees.add_scaled(s.x, jnp.where(fine, alpha, 0), s.p),
            r=r,
            p=laid_out_like(trees.add_scaled(z, trees.ratio(rz, s.rz), s.p), s.p),
            rz=rz,
            model=s.model + jnp.where(fine, alpha * (0.5 * alpha * curvature - s.rz), 0),
            residual=jnp.where(fine, residual, s.residual),
            i=s.i + 1,
        )
        trail, watched = rules.watch(ahead)
        reason = jnp.where(reason == Reason.max_steps, watched, reason)
        return ahead._replace(trail=trail, reason=_reason(rz, residual, fine, reason))

    def _reason(rz: jax.Array, residual: jax.Array, fine: Any, otherwise: Any) -> jax.Array:
        reason = jnp.where((rz <= 0) | ~fine, Reason.breakdown, otherwise)
        return jnp.where(residual <= tol, Reason.tolerance, reason).astype(jnp.int32)

    z, rz, residual = measure(r)
    fine = jnp.isfinite(rz) & jnp.isfinite(residual)
    start = Iterate(
        x=x,
        r=r,
        p=laid_out_like(z, b),
        rz=rz,
        model=-0.5 * (trees.dot(x, b) + trees.dot(x, r)),
        residual=residual,
        i=jnp.zeros((), jnp.int32),
        reason=_reason(rz, residual, fine, Reason.max_steps),
        trail=rules.trail,
    )
    go_on = lambda s: (s.reason == Reason.max_steps) & (s.i < limit)
    return lax.while_loop(go_on, advance, _typed(start, advance))


def _typed(start: Iterate, advance: Callable[[Iterate], Iterate]) -> Iterate:
    """The carry, each leaf varying over every axis over which a step makes one vary."""
    if not axes.tracked():
        return start
    kinds = jax.tree.leaves(jax.eval_shape(advance, start))
    return axes.vary(start, frozenset().union(*map(axes.varying_of, kinds)))
