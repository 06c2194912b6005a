"""Preconditioning by a diagonal or Kronecker factors: division by a power, or clipping."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Period, Scalar, ScalarOrSchedule
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import decompositions
from curvax.linalg.kronecker import (
    KroneckerState,
    kept_or_made,
    known_factors,
    nothing_kept,
    shared_axes,
)
from curvax.pipes import requirements
from curvax.pipes.diagnostics import Flags, Metrics, metrics_of, no_metrics
from curvax.pipes.signal import Signal, Stage, StepState, at, stage


@injectable
def scale_by_power(
    power: ScalarOrSchedule,
    *,
    eps: ScalarOrSchedule = 1e-8,
    damping: ScalarOrSchedule = 0.0,
    every: Period = 1,
    divided_over: AxisNames = None,
) -> Stage:
    """Divides the updates by a power of the diagonal, or of the Kronecker factors.

        u ← u / ((D + λ)ᵏ + ε)

    D is a diagonal, or the eigenvalues of Kronecker factors, in whose eigenbasis u is then divided,
    at one eigendecomposition of every factor. k = 1 is a diagonal Newton step, k = ½
    the step of Adam, k = 0 gradient descent. Yao et al., AdaHessian, arXiv:2006.00719, eq. 7 and
    12; Martens, arXiv:1412.1193, eq. 10.

    Args:
        power: k in [0, 1], a number or a schedule.
        eps: ε >= 0, added after the power: a number or a schedule.
        damping: λ >= 0, added before the power (Optax's `eps_root` for k = ½): a number or a
            schedule.
        every: number of steps per eigendecomposition of factors, a positive int, or a traced one.
            Above 1, a stage before it in its pipe must know the shapes of the factors, as
            `gradient_kronecker` does and others with `like=`.
        divided_over: device axis, or tuple of axes, among whose devices the eigendecompositions are
            divided, as in `kronecker`.

    Returns:
        A stage that needs a non-negative `diagonal`, as after `ema_rms`, or `factors`.

    Raises:
        ValueError: an option is out of range; in `update`, no earlier stage set a diagonal or
            factors.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * ((w[0] - 1) ** 2 + 10 * (w[1] - 2) ** 2)
        >>> tx = curvax.hutchinson_diag() | curvax.scale_by_power(1.0) | optax.scale(-1.0)
        >>> w = jnp.zeros(2)
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in w + updates]
        [1.0, 2.0]
    """
    checks.check_range("power", power, 0, 1, stage="scale_by_power")
    checks.check_range("eps", eps, 0, jnp.inf, stage="scale_by_power")
    checks.check_range("damping", damping, 0, jnp.inf, stage="scale_by_power")

    if not isinstance(every, jax.Array):
        checks.check_count("scale_by_power", every=every)
    keeps = isinstance(every, jax.Array) or every > 1

    def init(params: Tree, factors: Any = None) -> StepState | KroneckerState:
        del params
        if not keeps:
            return StepState(jnp.zeros((), jnp.int32))
        instead = "leave `every` out: a diagonal needs no decomposition"
        known = known_factors(factors, f"scale_by_power(every={every})", instead)
        return nothing_kept(lambda: _kernels(known))

    def rule(
        signal: Signal, state: StepState | KroneckerState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, StepState | KroneckerState]:
        del params, extra
        k, epsilon, lam = (at(x, state.step) for x in (power, eps, damping))
        divisor = lambda d: safe_math.power(d + lam, k) + epsilon
        inverse = lambda d: _divided(jnp.ones_like(d), divisor(d), epsilon)
        divide = lambda u, d: _divided(u, divisor(d), epsilon).astype(u.dtype)
        if signal.diagonal is None and signal.factors is not None:
            over = shared_axes(signal.factors, divided_over, "scale_by_power")
            basis, new = _decomposed(signal.factors, state, every, over)
            updates = basis.scaled(signal.updates, inverse)
        else:
            diagonal = requirements.needed_diagonal(
                signal.diagonal, "scale_by_power", "divides by a diagonal"
            )
            updates = jax.tree.map(divide, signal.updates, diagonal)
            new = state._replace(step=state.step + 1)
        return signal._replace(updates=updates), new

    return stage(init, rule)


def _decomposed(
    factors: Any, state: StepState | KroneckerState, every: Period, over: tuple[str, ...]
) -> tuple[Any, StepState | KroneckerState]:
    """The factors in their eigenbasis, which is kept for `every` steps if the state holds one."""
    make = lambda: _kernels(factors)
    new: StepState | KroneckerState
    with decompositions.divided(over):
        if isinstance(state, KroneckerState):
            basis, new = kept_or_made(make, state, every)
        else:
            basis, new = make(), StepState(state.step + 1)
    return dataclasses.replace(basis, diagonals=factors.diagonals), new


def _kernels(factors: Any) -> Any:
    """The eigenvectors and eigenvalues of factors, without the diagonals of other parameters."""
    return dataclasses.replace(factors.eigen(), diagonals={})


class ClipState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    measured: Flags
    figures: Metrics
    """`clipped`, the fraction of clipped entries."""


def clip_by_diagonal(
    gamma: ScalarOrSchedule,
    *,
    eps: ScalarOrSchedule = 1e-8,
    threshold: ScalarOrSchedule | None = 1.0,
) -> Stage:
    """Divides the updates by the diagonal and clips them entry by entry.

        u ← clip(u / max(γ D, ε), -τ, τ)

    Where the curvature is small or negative, the step is a signed one of size τ. Liu et al.,
    Sophia, arXiv:2305.14342, Algorithm 3, in the form of `optax.contrib.sophia`.

    Args:
        gamma: γ > 0, scale of the diagonal: a number or a schedule.
        eps: ε > 0, lower bound of the denominator.
        threshold: τ > 0, largest magnitude of an entry; None for no clipping.

    Returns:
        A stage that needs `diagonal`. Its metric `clipped` is the fraction of clipped entries, 1
        minus Optax's win rate.

    Raises:
        ValueError: an option is out of range; in `update`, no earlier stage set a diagonal.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
        >>> tx = curvax.hutchinson_diag() | curvax.clip_by_diagonal(gamma=1.0)
        >>> w = jnp.array([3.0, 0.5])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates], float(curvax.diagnostics(state)["clipped"])
        ([1.0, 0.5], 0.5)
    """
    checks.check_range("gamma", gamma, 0, jnp.inf, stage="clip_by_diagonal")
    checks.check_range("eps", eps, 0, jnp.inf, stage="clip_by_diagonal")
    checks.check_range("threshold", threshold, 0, jnp.inf, stage="clip_by_diagonal")

    def init(params: Tree) -> ClipState:
        return ClipState(jnp.zeros((), jnp.int32), *no_metrics("clipped"))

    def rule(
        signal: Signal, state: ClipState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, ClipState]:
        del params, extra
        diagonal = requirements.needed_diagonal(
            signal.diagonal, "clip_by_diagonal", "divides by a diagonal"
        )
        g, epsilon, limit = (at(x, state.step) for x in (gamma, eps, threshold))
        limit = jnp.inf if limit is None else limit
        ratios = jax.tree.map(
            lambda u, d: _divided(u, jnp.maximum(g * d, epsilon), epsilon), signal.updates, diagonal
        )
        over = trees.total(jax.tree.map(lambda x: jnp.abs(x) >= limit, ratios))
        clipped = jax.tree.map(
            lambda x, u: jnp.clip(x, -limit, limit).astype(u.dtype), ratios, signal.updates
        )
        size = max(1, sum(x.size for x in jax.tree.leaves(ratios)))
        metrics = metrics_of({"clipped": over / size})
        return signal._replace(updates=clipped), ClipState(state.step + 1, *metrics)

    return stage(init, rule)


def _divided(u: jax.Array, denominator: jax.Array, eps: Scalar) -> jax.Array:
    """u / denominator, with 0/0 = 0 for dead units where ε is 0."""
    u = trees.widen(u)
    if not (isinstance(eps, numbers.Real) and float(eps) > 0):
        denominator = jnp.where((u == 0) & (denominator == 0), 1, denominator)
    return safe_math.quotient(u, denominator)
