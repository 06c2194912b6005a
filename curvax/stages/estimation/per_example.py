"""Diagonals that need no draw: from the gradients of the examples, and exact ones."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.objective import Objective, as_objective, microbatching, require_batch
from curvax.pipes.signal import Signal, Stage, stage
from curvax.stages.estimation.diagonal_stage import check_fraction, part_of


@injectable
def empirical_fisher_diag(*, fraction: float = 1.0, mean_over: AxisNames = None) -> Stage:
    """The diagonal of the empirical Fisher matrix, from the gradient of each example.

        D = 1/N Σₙ gₙ²,   gₙ = ∇ℓ(θ, xₙ)

    Uncentred, and not the square of the mean gradient. The examples' gradients are all in memory
    at once; `Objective(microbatch=n)` keeps n of them. Each example goes through the loss as a
    batch of one. Martens, arXiv:1412.1193, section 11.

    Args:
        fraction: of the batch (its first part) that is used.
        mean_over: the device axis, or axes, to average over; `()` keeps each device's own.

    Returns:
        A stage that sets `diagonal`, in float32 or wider. It needs an `Objective` with a batch.

    Raises:
        ValueError: an option out of range; later, under a device axis, no `mean_over`.
    """
    check_fraction(fraction, "empirical_fisher_diag")

    def rule(
        signal: Signal, state: Any, params: Tree, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Signal, Any]:
        del extra
        objective = as_objective(value_fn, "empirical_fisher_diag", params)
        require_batch(objective, "empirical_fisher_diag")
        local = objective.local_axes(params)
        over = checks.averaged_axes(mean_over, local, stage="empirical_fisher_diag")
        here = part_of(objective, fraction, "empirical_fisher_diag")
        diagonal = here._microbatch_mean(lambda part: _mean_of_squares(part, params))
        return signal._replace(diagonal=axes.mean(diagonal, over, here.batch_weight())), state

    return stage(_floating("empirical_fisher_diag"), rule)


def _mean_of_squares(objective: Objective, params: Tree) -> Tree:
    size = objective.size

    def square(i: jax.Array, batch: Tree, params: Tree) -> tuple[Tree, jax.Array | None]:
        example = objective.piece(batch, i, size)
        _, gradient = example._value_aux_and_grad(params)
        squares = jax.tree.map(lambda g: jnp.square(trees.widen(g)), gradient)
        return squares, example.batch_weight()

    found = microbatching.mean_over_vmap(square, objective.groups(1), size, params)
    return meshes.laid_like(found, params)


def squared_gradient() -> Stage:
    """The square of the updates in the place of a curvature diagonal: what Adam uses.

        D = u²

    `squared_gradient() | ema_mean(b2) | optax.ema(b1) | scale_by_power(0.5, eps=1e-8)` is Adam.
    Martens, arXiv:1412.1193, section 11.2.

    Returns:
        A stage that sets `diagonal`, in float32 or wider.

    Raises:
        ValueError: at update, the updates are one device's own: the square of the mean is wanted.
    """

    def rule(signal: Signal, state: Any, params: Tree = None, **extra: Any) -> Any:
        del params, extra
        checks.refuse_local(signal.local, stage="squared_gradient")
        diagonal = jax.tree.map(lambda u: jnp.square(trees.widen(u)), signal.updates)
        return signal._replace(diagonal=diagonal), state

    return stage(lambda params: optax.EmptyState(), rule)


def _floating(name: str) -> Any:
    def init(params: Tree) -> optax.EmptyState:
        trees.require_floating(params, name)
        return optax.EmptyState()

    return init
