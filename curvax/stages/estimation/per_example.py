"""Diagonals without random draws: from the gradients of single examples, or of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import ValueFn
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.objective import (
    Objective,
    as_objective,
    first_part,
    microbatch_mean,
    microbatching,
    require_batch,
    value_aux_and_grad,
)
from curvax.pipes.signal import Signal, Stage, stage


@injectable
def empirical_fisher_diag(*, fraction: float = 1.0, mean_over: AxisNames = None) -> Stage:
    """Computes the diagonal of the empirical Fisher matrix from the gradients of single examples.

        D = 1/N Σₙ gₙ²,   gₙ = ∇ℓ(θ, xₙ)

    This is not the square of the mean gradient, which `squared_gradient` gives. The loss is called
    on each example as a batch of one. All N gradients are in memory at once;
    `Objective(microbatch=n)` limits them to n. Martens, arXiv:1412.1193, section 11.

    Args:
        fraction: fraction of the batch in (0, 1], its first examples, that is used.
        mean_over: device axis, or tuple of axes, to average over; `()` keeps the diagonal of each
            device.

    Returns:
        A stage that sets `diagonal`, in float32 or wider, shaped like the parameters. It needs
        `value_fn=` an `Objective` with a batch.

    Raises:
        ValueError: an option is out of range; in `update`, the loss is local to a device axis and
            `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = lambda w, batch: 0.5 * jnp.mean((batch - w) ** 2)
        >>> objective = curvax.Objective(loss, jnp.array([[1.0], [3.0]]))
        >>> stage, w = curvax.empirical_fisher_diag(), jnp.zeros(1)
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> print(signal.diagonal)  # the mean of 1² and 3²
        [5.]
    """
    checks.check_fraction(fraction, "empirical_fisher_diag")

    def rule(
        signal: Signal,
        state: optax.OptState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, optax.OptState]:
        del extra
        objective = as_objective(value_fn, "empirical_fisher_diag", params)
        require_batch(objective, "empirical_fisher_diag")
        local = objective.local_axes(params)
        over = checks.averaged_axes(mean_over, local, stage="empirical_fisher_diag")
        here = first_part(objective, fraction, "empirical_fisher_diag")
        diagonal = microbatch_mean(here, lambda part: _mean_of_squares(part, params))
        return signal._replace(diagonal=axes.mean(diagonal, over, here.batch_weight())), state

    return stage(_floating("empirical_fisher_diag"), rule)


def _mean_of_squares(objective: Objective, params: Tree) -> Tree:
    size = objective.size

    def square(i: jax.Array, batch: Tree, params: Tree) -> tuple[Tree, jax.Array | None]:
        example = objective.piece(batch, i, size)
        _, gradient = value_aux_and_grad(example, params)
        squares = jax.tree.map(lambda g: jnp.square(trees.widen(g)), gradient)
        return squares, example.batch_weight()

    found = microbatching.mean_over_vmap(square, objective.groups(1), size, params)
    return meshes.laid_like(found, params)


def squared_gradient() -> Stage:
    """Sets the diagonal to the square of the updates, as Adam does.

        D = u²

    `squared_gradient() | ema_mean(b2) | optax.ema(b1) | scale_by_power(0.5)` is Adam. Martens,
    arXiv:1412.1193, section 11.2.

    Returns:
        A stage that sets `diagonal`, in float32 or wider, shaped like the parameters.

    Raises:
        ValueError: in `update`, the updates are local to a device axis; average them first, since
            the square of the mean is wanted.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> stage, g = curvax.squared_gradient(), jnp.array([3.0, -4.0])
        >>> signal, state = stage.update(curvax.Signal(g), stage.init(g), g)
        >>> print(signal.diagonal)
        [ 9. 16.]
    """

    def rule(
        signal: Signal, state: optax.OptState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, optax.OptState]:
        del params, extra
        checks.refuse_local(signal.local, stage="squared_gradient")
        diagonal = jax.tree.map(lambda u: jnp.square(trees.widen(u)), signal.updates)
        return signal._replace(diagonal=diagonal), state

    return stage(lambda params: optax.EmptyState(), rule)


def _floating(name: str) -> Callable[[Tree], optax.EmptyState]:
    def init(params: Tree) -> optax.EmptyState:
        trees.require_floating(params, name)
        return optax.EmptyState()

    return init
