"""Smoothing of a diagonal, or of factors, over steps: exponential averages and a sum.

An entry that is not finite does not enter the average, where it would spoil all later steps. It is
passed on as NaN in its own step, so that `optax.apply_if_finite` sees it. A Kronecker factor that
is not finite is left out as a whole, and earlier ones serve.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Scalar, ScalarOrSchedule
from curvax.hyperparameters import injectable
from curvax.pipes import estimates, requirements
from curvax.pipes.estimates import Estimate
from curvax.pipes.initial import zeros_to_keep
from curvax.pipes.signal import Signal, Stage, at, stage


class EmaRmsState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    weight: jax.Array
    """1 - βᵗ, the total weight of the mean: a scalar of the default float type."""
    mean_square: Tree
    """v, in float32 or wider, shaped like the parameters."""


def ema_rms(decay: ScalarOrSchedule) -> Stage:
    """Replaces the diagonal by the exponential root mean square of its past values.

        D̄ₜ = √( (1-β) Σᵢ βᵗ⁻ⁱ Dᵢ² / (1-βᵗ) )

    D̄ is non-negative even where the Hessian is not. Yao et al., AdaHessian, arXiv:2006.00719, eq.
    11. Magnitudes above the root of the largest float (1.8e19 in float32) are clipped to it. An
    entry that is not finite is passed on as NaN in its own step and leaves the average unchanged.

    Args:
        decay: β in [0, 1), a number or a schedule; 0 gives the magnitude |Dₜ|.

    Returns:
        A stage that needs `diagonal` and replaces it.

    Raises:
        ValueError: β is out of range; in `update`, no earlier stage set a diagonal.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 - 10 * w[1] ** 2)
        >>> tx, w = curvax.hutchinson_diag() | curvax.ema_rms(0.9), jnp.ones(2)
        >>> signal = curvax.Signal(jax.grad(loss)(w))
        >>> signal, state = tx.update(signal, tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in signal.diagonal]
        [1.0, 10.0]
    """
    checks.check_decay("decay", decay, stage="ema_rms")

    def rule(
        signal: Signal, state: EmaRmsState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, EmaRmsState]:
        del params, extra
        diagonal = requirements.needed_diagonal(signal.diagonal, "ema_rms", "smooths a diagonal")
        new = Estimate(diagonal, jax.tree.map(jnp.isfinite, diagonal))
        square = jax.tree.map(_square, diagonal)
        beta = at(decay, state.step)
        weight, square = _faded(beta, state.weight, state.mean_square, square, new.fine)
        rms = jax.tree.map(lambda v: safe_math.root(v / weight).astype(v.dtype), square)
        return new.into(signal, rms), EmaRmsState(state.step + 1, weight, square)

    return stage(
        lambda params: EmaRmsState(_zero_step(), _no_weight(), zeros_to_keep(params)), rule
    )


class EmaMeanState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    weight: jax.Array
    """1 - βᵗ, the total weight of the mean: a scalar of the default float type."""
    mean: Tree
    """m, in float32 or wider, shaped like the parameters."""


@injectable
def ema_mean(decay: ScalarOrSchedule, *, debias: bool = True, lag: int = 0) -> Stage:
    """Replaces the diagonal, or the Kronecker factors, by the exponential mean of past values.

        D̄ₜ = (1-β) Σᵢ βᵗ⁻ⁱ Dᵢ / (1-βᵗ)

    After `squared_gradient()` this is Adam's second moment, and RMSProp's with `debias=False`. An
    entry that is not finite is passed on as NaN in its own step and leaves the average unchanged.

    Args:
        decay: β in [0, 1), a number or a schedule.
        debias: whether to divide by 1-βᵗ.
        lag: 0, or 1 to pass on the average of the step before, zero at first, as Optax's Sophia
            does; `ema_mean(0.0, lag=1)` delays the diagonal by one step.

    Returns:
        A stage that needs `diagonal`, or `factors`, and replaces it.

    Raises:
        ValueError: β is out of range, or `lag` is not 0 or 1; in `update`, no earlier stage set a
            diagonal or factors.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> second_moment = curvax.squared_gradient() | curvax.ema_mean(0.999)
        >>> adam = second_moment | optax.ema(0.9) | curvax.scale_by_power(0.5) | optax.scale(-1e-3)
        >>> g = jnp.array([3.0, -4.0])
        >>> updates, state = adam.update(g, adam.init(g), g)
        >>> [round(float(x), 4) for x in updates]
        [-0.001, 0.001]
    """
    checks.check_decay("decay", decay, stage="ema_mean")
    checks.check_static("ema_mean", lag=lag)
    if lag not in (0, 1):
        raise ValueError(f"`ema_mean` takes `lag` as 0 or 1, and got {lag!r}.")

    def rule(
        signal: Signal, state: EmaMeanState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, EmaMeanState]:
        del params, extra
        new = estimates.needed(signal, state.mean, "ema_mean", "smooths a diagonal")
        weight, mean = _faded(at(decay, state.step), state.weight, state.mean, new.tree, new.fine)
        after = EmaMeanState(state.step + 1, weight, mean)
        seen = state if lag else after
        mean = seen.mean
        if debias:
            mean = jax.tree.map(lambda m: trees.ratio(m, seen.weight).astype(m.dtype), mean)
        return new.into(signal, mean), after

    def init(params: Tree, factors: Any = None) -> EmaMeanState:
        return EmaMeanState(_zero_step(), _no_weight(), zeros_to_keep(params, factors))

    return stage(init, rule)


class AccumulateState(NamedTuple):
    total: Tree
    """The sum, in float32 or wider, shaped like the parameters."""


def accumulate(initial: Scalar = 0.0) -> Stage:
    """Replaces the diagonal, or the Kronecker factors, by the sum of past values, as in AdaGrad.

        Dₜ ← initial + Σᵢ Dᵢ

    The sum is clipped to the largest float. An entry that is not finite is passed on as NaN in its
    own step and is not added.

    Args:
        initial: value that the sum of diagonals starts from, >= 0. Sums of factors start from 0.

    Returns:
        A stage that needs `diagonal`, or `factors`, and replaces it.

    Raises:
        ValueError: `initial` is negative, or not 0 with factors; in `update`, no earlier stage set
            a diagonal or factors.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> total = curvax.squared_gradient() | curvax.accumulate()
        >>> adagrad = total | curvax.scale_by_power(0.5) | optax.scale(-0.1)
        >>> g = jnp.array([3.0, -4.0])
        >>> updates, state = adagrad.update(g, adagrad.init(g), g)
        >>> [round(float(x), 3) for x in updates]
        [-0.1, 0.1]
    """
    checks.check_range("initial", initial, 0, jnp.inf, stage="accumulate")

    def init(params: Tree, factors: Any = None) -> AccumulateState:
        zeros = zeros_to_keep(params, factors)
        if factors is None:
            return AccumulateState(jax.tree.map(lambda x: x + initial, zeros))
        if isinstance(initial, numbers.Real) and initial == 0:
            return AccumulateState(zeros)
        raise ValueError(
            f"`accumulate` starts sums of Kronecker factors from 0, and got `initial={initial}`. "
            "Leave it out, and damp where they are used: `scale_by_power(0.5, damping=1e-6)`."
        )

    def rule(
        signal: Signal, state: AccumulateState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, AccumulateState]:
        del params, extra
        new = estimates.needed(signal, state.total, "accumulate", "sums a diagonal")
        total = jax.tree.map(_summed, state.total, new.tree, new.fine)
        return new.into(signal, total), AccumulateState(total)

    return stage(init, rule)


def _faded(
    decay: Scalar, weight: jax.Array, mean: Tree, new: Tree, fine: Tree
) -> tuple[jax.Array, Tree]:
    """The weight and the mean after one more term, with all earlier terms scaled by β.

    Where the term is not `fine` the mean is left as it is.
    """
    beta = jnp.asarray(decay, weight.dtype)
    last = trees.ratio(jnp.ones_like(weight), weight)

    def fade(m: jax.Array, x: jax.Array, fine: jax.Array) -> jax.Array:
        return beta * m + (1 - beta) * jnp.where(fine, x, last * m)

    faded = jax.tree.map(fade, mean, new, fine)
    return beta * weight + (1 - beta), trees.cast_like(faded, mean)


def _square(d: jax.Array) -> jax.Array:
    """D², clipped to the largest float."""
    edge = float(jnp.finfo(d.dtype).max) ** 0.5 * (1 - float(jnp.finfo(d.dtype).eps))
    return jnp.square(jnp.where(jnp.isfinite(d), jnp.clip(d, -edge, edge), d))


def _summed(total: jax.Array, d: jax.Array, fine: jax.Array) -> jax.Array:
    edge = float(jnp.finfo(total.dtype).max)
    kept = total + jnp.where(fine, d, 0)
    return jnp.clip(kept, -edge, edge).astype(total.dtype)


def _zero_step() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _no_weight() -> jax.Array:
    return jnp.zeros((), jnp.result_type(float))
