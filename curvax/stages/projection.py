"""Combinations of a clean and a perturbed gradient: GSAM, its penalty, and LookSAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Scalar, ScalarOrSchedule, ValueFn
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.pipes.signal import Signal, Stage, StepState, at, stage, weight_of


def gsam_project(alpha: ScalarOrSchedule, *, onto: str = "perturbed") -> Stage:
    """Adds the part of one gradient that is orthogonal to the other, to reduce the surrogate gap.

        u ← g_p - α (g - <g, ĝ_p> ĝ_p)     onto="perturbed": minimises f_p and h
        u ← g + α (g_p - <g_p, ĝ> ĝ)       onto="clean":     minimises f and h

    Zhuang et al., GSAM, arXiv:2203.08065, Algorithm 1. The projection is over the whole tree.
    Before the mean over devices it is a projection per device, as in the authors' code. Steps that
    `sam_perturb(every=)` skips keep the clean gradient.

    Args:
        alpha: α, a number or a schedule; 0 is SAM.
        onto: "perturbed" (the paper) or "clean": the gradient that is kept whole.

    Returns:
        A stage that goes behind `sam_perturb`.

    Raises:
        ValueError: `onto` is unknown; in `update`, no earlier stage perturbed.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
        >>> tx = curvax.sam_perturb(0.1) | curvax.gsam_project(0.5)
        >>> w = jnp.array([3.0, 0.4])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 2) for x in updates]
        [2.9, 4.9]
    """
    if onto not in ("perturbed", "clean"):
        raise ValueError(
            f"`gsam_project` takes `onto` as 'perturbed' or 'clean', and got {onto!r}."
        )

    def combine(clean: Tree, perturbed: Tree, a: Scalar) -> Tree:
        if onto == "perturbed":
            return trees.add_scaled(perturbed, -a, trees.reject(clean, perturbed))
        return trees.add_scaled(clean, a, trees.reject(perturbed, clean))

    return _combining("gsam_project", alpha, combine)


def penalize_gap(lam: ScalarOrSchedule) -> Stage:
    """Adds λ times the gradient of the surrogate gap to the perturbed gradient.

        u ← g_p + λ (g_p - g),   the gradient of f_p + λ h,   h = f_p - f

    Zhuang et al., GSAM, arXiv:2203.08065, section 4. Steps that `sam_perturb(every=)` skips keep
    the clean gradient.

    Args:
        lam: λ, a number or a schedule; 0 is SAM.

    Returns:
        A stage that goes behind `sam_perturb`.

    Raises:
        ValueError: in `update`, no earlier stage perturbed.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(0.1) | curvax.penalize_gap(1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [3.12, 4.16]
    """

    def combine(clean: Tree, perturbed: Tree, a: Scalar) -> Tree:
        return trees.add_scaled(perturbed, a, trees.add_scaled(perturbed, -1.0, clean))

    return _combining("penalize_gap", lam, combine)


def _combining(
    name: str, weight: ScalarOrSchedule, combine: Callable[[Tree, Tree, Scalar], Tree]
) -> Stage:
    def rule(
        signal: Signal, state: StepState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, StepState]:
        del params, extra
        clean, perturbed, now = _both_gradients(signal, name)
        updates = _select(now, combine(clean, perturbed, at(weight, state.step)), clean)
        return signal._replace(updates=updates), StepState(state.step + 1)

    return stage(lambda params: StepState(jnp.zeros((), jnp.int32)), rule, name=name)


class KeepOrthogonalState(NamedTuple):
    step: jax.Array
    """Steps taken, int32 scalar."""
    orthogonal: Tree
    """g_v, the part of the last perturbed gradient that is orthogonal to the clean one."""


def keep_orthogonal(alpha: ScalarOrSchedule = 0.7, *, mean_over: AxisNames = None) -> Stage:
    """Reuses the orthogonal part of the perturbed gradient between the steps that perturb
    (LookSAM).

        SAM steps:    u ← g_p,   g_v ← g_p - <g_p, ĝ> ĝ
        in between:   u ← g + α ‖g‖ ĝ_v

    Liu et al., LookSAM, arXiv:2203.02714, Algorithm 1.

    Args:
        alpha: α, a number or a schedule; 0.7 in the paper.
        mean_over: device axes to average g_v over where the updates are still local; devices are
            weighted by the objective's weight where it has one.

    Returns:
        A stage that goes behind `sam_perturb(rho, every=k)`.

    Raises:
        ValueError: in `update`, no earlier stage perturbed.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(0.1, every=5) | curvax.keep_orthogonal(0.7)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]  # the first step perturbs
        [3.06, 4.08]
    """

    def init(params: Tree) -> KeepOrthogonalState:
        zeros = jax.tree.map(lambda x: trees.widen(jnp.zeros_like(x)), params)
        return KeepOrthogonalState(jnp.zeros((), jnp.int32), zeros)

    def rule(
        signal: Signal,
        state: KeepOrthogonalState,
        params: Tree = None,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, KeepOrthogonalState]:
        del params, extra
        clean, perturbed, now = _both_gradients(signal, "keep_orthogonal")
        over = checks.averaged_axes(mean_over, signal.local, stage="keep_orthogonal")
        weight = weight_of(signal, value_fn, over, "keep_orthogonal")
        fresh = trees.wide(trees.reject(perturbed, clean))
        fresh = axes.mean(fresh, over, weight)
        # Entries that are not finite appear in the updates of this step, and are not kept.
        kept = jax.tree.map(
            lambda x, old: jnp.where(now & jnp.isfinite(x), x, old), fresh, state.orthogonal
        )
        length = at(alpha, state.step) * trees.ratio(trees.norm(clean), trees.norm(kept))
        between = trees.add_scaled(clean, length, kept)
        updates = _select(now, perturbed, between)
        return signal._replace(updates=updates), KeepOrthogonalState(state.step + 1, kept)

    return stage(init, rule, evaluates_loss=False)


def _both_gradients(signal: Signal, name: str) -> tuple[Tree, Tree, jax.Array | bool]:
    """The clean and the perturbed gradient, and whether this step perturbed.

    Without the flag `perturbed`, as in a signal made by hand, two distinct gradients or a perturbed
    loss show that it did.
    """
    now = signal.perturbed
    two = now is None and signal.gradient is not None and signal.updates is not signal.gradient
    if now is None or now is False:
        now = two or signal.perturbed_value is not None
    if now is False:
        raise ValueError(
            f"`{name}` combines a clean and a perturbed gradient, and no earlier stage perturbed. "
            f"Put `sam_perturb` before it with `|`, as in `sam_perturb(0.05) | {name}(...)`; "
            "`optax.chain` passes on the updates only."
        )
    return signal.gradient, signal.updates, now


def _select(condition: jax.Array | bool, a: Tree, b: Tree) -> Tree:
    if condition is True:
        return a
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
