"""Preconditioning: the updates divided by a power of the diagonal."""

from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks, trees
from curvax.signal import Signal, Stage, StepState, at, stage
from curvax.trees import Tree


def scale_by_power(power: Any, *, eps: Any = 1e-8, damping: Any = 0.0) -> Stage:
    """Divides the updates by a power of the diagonal.

        u ← u / ((D + λ)ᵏ + ε)

    k = 1 is a diagonal Newton step, k = ½ Adam's and k = 0 gradient descent. The eps of Optax's
    "inside the root" is λ. Yao et al., AdaHessian, arXiv:2006.00719, eq. 7 and 12; Martens,
    arXiv:1412.1193, eq. 10.

    Args:
        power: k in [0, 1], a number or a schedule.
        eps: ε >= 0, outside the power.
        damping: λ >= 0, inside it.

    Returns:
        A stage that needs a non-negative `diagonal` (after `ema_rms`, say).

    Raises:
        ValueError: an option out of range.
    """
    checks.check_range("power", power, 0, 1, stage="scale_by_power")
    checks.check_range("eps", eps, 0, jnp.inf, stage="scale_by_power")
    checks.check_range("damping", damping, 0, jnp.inf, stage="scale_by_power")

    def rule(signal: Signal, state: StepState, params: Tree = None, **extra: Any) -> Any:
        del params, extra
        diagonal = checks.needed_diagonal(
            signal.diagonal, "scale_by_power", "divides by a diagonal"
        )
        k, epsilon, lam = (at(x, state.step) for x in (power, eps, damping))

        def divide(u: jax.Array, d: jax.Array) -> jax.Array:
            denominator = (d + lam) ** k + epsilon
            return (trees.widen(u) / denominator).astype(u.dtype)

        updates = jax.tree.map(divide, signal.updates, diagonal)
        return signal._replace(updates=updates), StepState(state.step + 1)

    return stage(lambda params: StepState(jnp.zeros((), jnp.int32)), rule)
