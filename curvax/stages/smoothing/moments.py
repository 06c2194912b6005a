"""Smoothing a diagonal over steps: averages that forget, and a sum that never does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks, trees
from curvax.injection import injectable
from curvax.signal import Signal, Stage, at, stage
from curvax.trees import Tree


class EmaRmsState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    weight: jax.Array
    """1 - βᵗ, a scalar of the default float type: what the zeros of the start still lack."""
    mean_square: Tree
    """v, in float32 or wider, shaped like the parameters."""


def ema_rms(decay: Any) -> Stage:
    """Replaces the diagonal by its root mean square over the past, older steps fading.

        D̄ₜ = √( (1-β) Σᵢ βᵗ⁻ⁱ Dᵢ² / (1-βᵗ) )

    The square makes D̄ positive where the Hessian is not. Yao et al., AdaHessian,
    arXiv:2006.00719, eq. 11.

    Args:
        decay: β in [0, 1), a number or a schedule; at 0 the diagonal becomes its own magnitude.

    Returns:
        A stage that needs `diagonal` and replaces it.

    Raises:
        ValueError: β out of range.
    """
    checks.check_decay("decay", decay, stage="ema_rms")

    def rule(signal: Signal, state: EmaRmsState, params: Tree = None, **extra: Any) -> Any:
        del params, extra
        diagonal = checks.needed_diagonal(signal.diagonal, "ema_rms", "smooths a diagonal")
        square = jax.tree.map(jnp.square, diagonal)
        weight, square = _faded(at(decay, state.step), state.weight, state.mean_square, square)
        rms = jax.tree.map(lambda v: jnp.sqrt(v / weight).astype(v.dtype), square)
        return signal._replace(diagonal=rms), EmaRmsState(state.step + 1, weight, square)

    return stage(lambda params: EmaRmsState(_zero_step(), _no_weight(), _zeros(params)), rule)


class EmaMeanState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    weight: jax.Array
    """1 - βᵗ, a scalar of the default float type."""
    mean: Tree
    """m, in float32 or wider, shaped like the parameters."""


@injectable
def ema_mean(decay: Any, *, debias: bool = True, lag: int = 0) -> Stage:
    """Replaces the diagonal by its mean over the past, older steps fading.

        D̄ₜ = (1-β) Σᵢ βᵗ⁻ⁱ Dᵢ / (1-βᵗ)

    After `squared_gradient()` this is Adam's second moment, with `debias=False` RMSProp's.

    Args:
        decay: β in [0, 1), a number or a schedule.
        debias: divide by 1-βᵗ.
        lag: 1 hands on the average as it stood before this step, zero at first, as Optax's Sophia
            does; `ema_mean(0.0, lag=1)` is a delay of one step.

    Returns:
        A stage that needs `diagonal` and replaces it.

    Raises:
        ValueError: β out of range, or a lag other than 0 or 1.
    """
    checks.check_decay("decay", decay, stage="ema_mean")
    checks.check_static("ema_mean", lag=lag)
    if lag not in (0, 1):
        raise ValueError(f"`ema_mean` takes `lag` as 0 or 1, and got {lag!r}.")

    def rule(signal: Signal, state: EmaMeanState, params: Tree = None, **extra: Any) -> Any:
        del params, extra
        diagonal = checks.needed_diagonal(signal.diagonal, "ema_mean", "smooths a diagonal")
        weight, mean = _faded(at(decay, state.step), state.weight, state.mean, diagonal)
        new = EmaMeanState(state.step + 1, weight, mean)
        shown = state if lag else new
        given = shown.mean
        if debias:
            given = jax.tree.map(lambda m: trees.ratio(m, shown.weight).astype(m.dtype), given)
        return signal._replace(diagonal=given), new

    return stage(lambda params: EmaMeanState(_zero_step(), _no_weight(), _zeros(params)), rule)


class AccumulateState(NamedTuple):
    total: Tree
    """The sum, in float32 or wider, shaped like the parameters."""


def accumulate(initial: Any = 0.0) -> Stage:
    """Replaces the diagonal by its sum over all steps, and `initial`: AdaGrad's memory.

    Args:
        initial: what the sum starts from, a number >= 0.

    Returns:
        A stage that needs `diagonal` and replaces it.

    Raises:
        ValueError: `initial` is negative.
    """
    checks.check_range("initial", initial, 0, jnp.inf, stage="accumulate")

    def init(params: Tree) -> AccumulateState:
        return AccumulateState(jax.tree.map(lambda x: x + initial, _zeros(params)))

    def rule(signal: Signal, state: AccumulateState, params: Tree = None, **extra: Any) -> Any:
        del params, extra
        diagonal = checks.needed_diagonal(signal.diagonal, "accumulate", "sums a diagonal")
        total = trees.add(state.total, diagonal)
        return signal._replace(diagonal=total), AccumulateState(total)

    return stage(init, rule)


def _faded(decay: Any, weight: jax.Array, mean: Tree, new: Tree) -> tuple[jax.Array, Tree]:
    """The weight and the mean with one more term, all that went before fading by β."""
    beta = jnp.asarray(decay, weight.dtype)
    faded = jax.tree.map(lambda m, x: beta * m + (1 - beta) * x, mean, new)
    return beta * weight + (1 - beta), trees.cast_like(faded, mean)


def _zeros(params: Tree) -> Tree:
    return jax.tree.map(lambda x: trees.widen(jnp.zeros_like(x)), params)


def _zero_step() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _no_weight() -> jax.Array:
    return jnp.zeros((), jnp.result_type(float))
