"""The stage around an estimate whose pass over the batch also gives the loss and the gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, ValueFn
from curvax.devices.axes import AxisNames
from curvax.objective import LossAndGradient, Objective, as_objective
from curvax.pipes.initial import MakeFactors, telling
from curvax.pipes.signal import Signal, Stage, stage
from curvax.pipes.state_keys import DrawingKey
from curvax.stages.estimation.diagonal_stage import part_and_axes, share_gradient

Evaluate = Callable[
    [Objective, Tree, jax.Array | None, tuple[str, ...]], tuple[LossAndGradient, dict[str, Any]]
]
"""(objective, parameters, key, device axes to average over) ↦ (((L, aux), ∇L), fields of the
signal)."""


class DrawState(NamedTuple):
    key: jax.Array
    """The data of a key, uint32. Draws depend on the step and the example of the global batch."""
    step: jax.Array
    """t, int32 scalar."""


def gradient_sharing_stage(
    name: str,
    evaluate: Evaluate,
    fraction: float,
    mean_over: AxisNames,
    key: Key | None = None,
    needs: Callable[[Objective, Tree], object] = lambda objective, params: None,
    factors: MakeFactors | None = None,
) -> Stage:
    """A stage that sets what `evaluate` finds; `needs` checks the objective.

    `key` is None for estimates that draw no labels; `factors` makes Kronecker factors of zeros.
    """
    checks.check_fraction(fraction, name)
    drawing = None if key is None else DrawingKey(key)

    def init(params: Tree) -> DrawState | optax.EmptyState:
        trees.require_floating(params, name)
        if drawing is None:
            return optax.EmptyState()
        return DrawState(drawing.initial(), jnp.zeros((), jnp.int32))

    def rule(
        signal: Signal,
        state: optax.OptState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, optax.OptState]:
        del extra
        objective = as_objective(value_fn, name, params)
        needs(objective, params)
        here, local, over = part_and_axes(signal, objective, params, fraction, mean_over, name)
        draw = None
        if drawing is not None:
            draw = jax.random.fold_in(drawing.of(state.key), state.step)
        (loss, gradient), fields = evaluate(here, params, draw, over)
        signal = signal._replace(**fields)
        if fraction == 1:
            signal = share_gradient(signal, objective, params, loss, gradient, local)
        return signal, state if drawing is None else state._replace(step=state.step + 1)

    told = init if factors is None else telling(init, factors=factors)
    return stage(told, rule, name=name)
