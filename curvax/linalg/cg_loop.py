"""The loop of preconditioned conjugate gradients, which a solver stops where it sees fit.

Written for device axes and sharded parameters: sums of products in float32 or wider, a carry whose
leaves vary over the same axes from the first step on, one product a step. Solvers hand it the
system in units of the first residual, so that its squares stay in range whatever the loss's scale.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.linalg.solvers import StopReason
from curvax.linear_operator import Product


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
    """A `StopReason`; `max_steps` as long as there is no other."""
    trail: Any
    """What `watch` keeps."""


class Rules(NamedTuple):
    """What tells one conjugate-gradient solver from another."""

    length: Callable[[Iterate, jax.Array], tuple[jax.Array, Any]]
    """(iterate, pᵀA p / rᵀM⁻¹r) ↦ (how far to go along p, the `StopReason` to stop there or
    `max_steps`)."""
    watch: Callable[[Iterate], tuple[Any, Any]] = lambda s: (s.trail, StopReason.max_steps)
    """iterate ↦ (its trail, a `StopReason` to stop or `max_steps`)."""
    trail: Any = ()
    """The trail before the start."""


class System(NamedTuple):
    """A x = b, and how to go about it."""

    product: Callable[[Tree], Tree]
    """v ↦ A v."""
    precondition: Callable[[Tree], Tree]
    """v ↦ M⁻¹v."""
    scale: jax.Array
    """‖b‖."""
    begun: jax.Array
    """‖b - A x‖ at the start."""
    tol: Any
    """‖b - A x‖ / ‖b‖ to stop at."""
    rules: Rules
    plain: bool = False
    """Whether M is the identity."""
    warm: bool = False
    """Whether x may be other than 0 at the start."""


def iterate(system: System, b: Tree, x: Tree, r: Tree, limit: Any) -> Iterate:
    """Conjugate gradients from x with its residual r, over at most `limit` products.

    Nocedal & Wright, Numerical Optimization, algorithm 5.3. An iterate that is not finite is
    dropped for the one before.

    Raises:
        ValueError: b is each device's own and the product is averaged over the devices.
    """
    _refuse_own(system.product, b)
    start = _begin(system, b, x, r)
    advance = lambda s: _advance(system, s)
    go_on = lambda s: (s.reason == StopReason.max_steps) & (s.i < limit)
    return axes.while_loop(go_on, advance, start)


def _begin(system: System, b: Tree, x: Tree, r: Tree) -> Iterate:
    # What is known of the start is not summed again: where parameters are divided among devices
    # that would be one more exchange.
    z = system.precondition(r)
    rz = system.begun**2 if system.plain else trees.dot(r, z)
    residual = trees.ratio(system.begun, system.scale)
    model = -0.5 * (trees.dot(x, b) + trees.dot(x, r)) if system.warm else jnp.zeros_like(rz)
    start = Iterate(
        x=x,
        r=r,
        p=trees.laid_out_like(z, b),
        rz=rz,
        model=model,
        residual=residual,
        i=jnp.zeros((), jnp.int32),
        reason=_reason(system, rz, residual, StopReason.max_steps),
        trail=system.rules.trail,
    )
    return start._replace(trail=system.rules.watch(start)[0])


def _advance(system: System, s: Iterate) -> Iterate:
    ap = trees.laid_out_like(system.product(s.p), s.r)
    # Both lengths of the form are taken out: as p shrinks, its square times A may vanish.
    near_one = trees.inverse(trees.magnitude(jnp.sqrt(jnp.abs(s.rz))))
    curvature = trees.dot(trees.scale(near_one, trees.wide(s.p)), trees.scale(near_one, ap))
    curvature = trees.ratio(curvature, s.rz * near_one * near_one)
    alpha, stopped = system.rules.length(s, curvature)
    r = trees.add_scaled(s.r, -alpha, ap)
    z, rz, residual = _measure(system, r)
    fine = jnp.isfinite(alpha) & jnp.isfinite(rz) & jnp.isfinite(residual)
    ahead = s._replace(
        x=trees.add_scaled(s.x, jnp.where(fine, alpha, 0), s.p),
        r=r,
        p=trees.laid_out_like(trees.add_scaled(z, trees.ratio(rz, s.rz), s.p), s.p),
        rz=rz,
        model=s.model + jnp.where(fine, alpha * s.rz * (0.5 * alpha * curvature - 1), 0),
        residual=jnp.where(fine, residual, s.residual),
        i=s.i + 1,
    )
    trail, watched = system.rules.watch(ahead)
    reason = jnp.where(stopped == StopReason.max_steps, watched, stopped)
    return ahead._replace(trail=trail, reason=_reason(system, rz, residual, reason))


def _measure(system: System, r: Tree) -> tuple[Tree, jax.Array, jax.Array]:
    """(M⁻¹r, rᵀM⁻¹r, ‖r‖ / ‖b‖)"""
    z = system.precondition(r)
    return z, trees.dot(r, z), trees.ratio(jnp.sqrt(trees.dot(r, r)), system.scale)


def _reason(system: System, rz: jax.Array, residual: jax.Array, otherwise: Any) -> jax.Array:
    broken = ~(rz > 0) | ~jnp.isfinite(rz) | ~jnp.isfinite(residual)
    reason = jnp.where(broken, StopReason.breakdown, otherwise)
    return jnp.where(residual <= system.tol, StopReason.tolerance, reason).astype(jnp.int32)


def _refuse_own(product: Callable[[Tree], Tree], b: Tree) -> None:
    own = axes.varying(b) & set(product.over) if isinstance(product, Product) else ()
    if own:
        axis = sorted(own)[0]
        raise ValueError(
            f"Conjugate gradients were handed a product averaged over the axis {axis!r} and a "
            "vector that is each device's own: the product would average their directions. "
            f"Average the vector first, `jax.lax.pmean(b, {axis!r})`, in a pipe with "
            f"`pmean_updates({axis!r})`, or keep the product local, `mean_over=()`."
        )
