"""The loop of preconditioned conjugate gradients, shared by `cg` and `steihaug`.

It runs under device axes and on sharded parameters, with one product a step and inner products in
float32 or wider. Solvers divide the system by (a power of two near) the norm of the first residual,
so that squares stay in range for any scale of the loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Scalar
from curvax.devices import axes
from curvax.linalg.solvers import StopReason
from curvax.linear_operator import Product

Reason = jax.Array | StopReason
"""A `StopReason`, or its number as an int32 scalar."""


class Iterate(NamedTuple):
    """The iterate x_i and the quantities that step i + 1 needs."""

    x: Tree
    """Float32 or wider."""
    r: Tree
    """b - A x, float32 or wider."""
    p: Tree
    """The direction, with the dtypes of b, so that the product and the step use the same p."""
    rz: jax.Array
    """rᵀM⁻¹r."""
    model: jax.Array
    """φ(x) = ½ xᵀA x - bᵀx."""
    residual: jax.Array
    """‖r‖ / ‖b‖."""
    i: jax.Array
    """Steps taken, int32 scalar."""
    reason: jax.Array
    """A `StopReason`; `max_steps` while the loop goes on."""
    trail: Tree
    """The state of `Rules.watch`."""


class Rules(NamedTuple):
    """The step length and the stopping rule of a conjugate-gradient solver."""

    length: Callable[[Iterate, jax.Array], tuple[jax.Array, Reason]]
    """(iterate, pᵀA p / rᵀM⁻¹r) ↦ (the step length along p, a `StopReason` to stop after it or
    `max_steps` to go on)."""
    watch: Callable[[Iterate], tuple[Tree, Reason]] = lambda s: (s.trail, StopReason.max_steps)
    """iterate ↦ (the new trail, a `StopReason` to stop or `max_steps` to go on)."""
    trail: Tree = ()
    """The initial trail."""


class System(NamedTuple):
    """The linear system A x = b and how it is solved."""

    product: Matvec
    """v ↦ A v."""
    precondition: Matvec
    """v ↦ M⁻¹v."""
    scale: jax.Array
    """‖b‖."""
    begun: jax.Array
    """‖b - A x‖ at the start."""
    tol: Scalar
    """The value of ‖b - A x‖ / ‖b‖ at which to stop."""
    rules: Rules
    plain: bool = False
    """Whether M is the identity."""
    warm: bool = False
    """Whether the start may differ from 0."""


def iterate(system: System, b: Tree, x: Tree, r: Tree, limit: Scalar) -> Iterate:
    """Runs conjugate gradients from x, with residual r, for at most `limit` products.

    Nocedal & Wright, Numerical Optimization, algorithm 5.3. If an iterate is not finite, the
    iterate before is returned.

    Raises:
        ValueError: b differs from device to device, and the product is averaged over devices.
    """
    _refuse_own(system.product, b)
    start = _begin(system, b, x, r)
    advance = lambda s: _advance(system, s)
    go_on = lambda s: (s.reason == StopReason.max_steps) & (s.i < limit)
    return axes.while_loop(go_on, advance, start)


def _begin(system: System, b: Tree, x: Tree, r: Tree) -> Iterate:
    # `begun` is known, and not computed again as a norm: with sharded parameters that would cost
    # another all-reduce.
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
    # p and A p are normalised before pᵀA p is computed: as p shrinks, pᵀA p would underflow.
    near_one = trees.inverse(trees.power_of_two(jnp.sqrt(jnp.abs(s.rz))))
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


def _reason(system: System, rz: jax.Array, residual: jax.Array, otherwise: Reason) -> jax.Array:
    broken = ~(rz > 0) | ~jnp.isfinite(rz) | ~jnp.isfinite(residual)
    reason = jnp.where(broken, StopReason.breakdown, otherwise)
    return jnp.where(residual <= system.tol, StopReason.tolerance, reason).astype(jnp.int32)


def _refuse_own(product: Matvec, b: Tree) -> None:
    own = axes.varying(b) & set(product.over) if isinstance(product, Product) else ()
    if own:
        axis = sorted(own)[0]
        raise ValueError(
            f"Conjugate gradients received a product averaged over the axis {axis!r} and a "
            "vector b that differs from device to device: the product would average their "
            f"directions. Average the vector first, `jax.lax.pmean(b, {axis!r})` or in a pipe "
            f"`pmean_updates({axis!r})`, or keep the product local, `mean_over=()`."
        )
