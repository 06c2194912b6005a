"""An objective, a point and a ball ↦ the losses and gradients along an ascent within the ball."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Mask, Period, Scalar, TreePrefix
from curvax.devices import axes
from curvax.objective import Objective, value_aux_and_grad
from curvax.perturbation import dual_norm
from curvax.perturbation.ascent_rules import AscentLike
from curvax.perturbation.ascent_steps import AscentRules, BallAscent, check_ascent


class Ascended(NamedTuple):
    """Losses and gradients at a point and along the ascent from it."""

    loss: jax.Array
    """L(θ), scalar."""
    gradient: Tree
    """∇L(θ), in float32 or wider."""
    visited: jax.Array
    """L(θ + ε) after each step, [steps]."""
    last_gradient: Tree
    """∇L(θ + ε) after the last step."""


def ascend(
    objective: Objective,
    params: Tree,
    rho: Scalar | TreePrefix,
    over: tuple[str, ...],
    number: Period = 0,
    *,
    p: float = 2,
    steps: int = 1,
    step_size: Scalar | None = None,
    projected: bool = True,
    ascent: AscentLike | None = None,
    mask: Mask | None = None,
) -> Ascended:
    """Runs the ascent of `sam_perturb` from parameters in float32 or wider.

    Args:
        objective: the loss.
        params: the point.
        rho: a number or a tree prefix of numbers.
        over: bound device axes; the results are means over them.
        number: folded into the keys of random ascent rules.
        p, steps, step_size, projected, ascent, mask: as in `sam_perturb`.
    """
    params = trees.wide(params)
    local = objective.local_axes(params)
    rules = AscentRules(dual_norm(p) if ascent is None else ascent, p, mask, params)
    ball = BallAscent(
        objective=objective,
        params=axes.vary(params, local),
        rules=rules,
        keys=tuple(jax.random.fold_in(key, number) for key in rules.keys),
        radius=trees.broadcast_prefix(rho, params),
        steps=steps,
        step_size=step_size,
        projected=projected,
        sync=over,
        local=local,
    )
    with jax.default_matmul_precision("highest"):
        (loss, _), gradient = value_aux_and_grad(objective, ball.params)
        visited = list(ball.visited(gradient))
    losses = jnp.stack([value for (value, _), _ in visited])
    found = Ascended(loss, gradient, losses, visited[-1][1])
    return axes.mean(found, over, objective.batch_weight())


def check_ball(
    name: str,
    params: Tree,
    rho: Scalar | TreePrefix,
    *,
    p: float = 2,
    steps: int = 1,
    step_size: Scalar | None = None,
    projected: bool = True,
    ascent: AscentLike | None = None,
    mask: Mask | None = None,
) -> None:
    """Checks the options of `ascend` before compilation.

    Raises:
        ValueError, TypeError: an option out of range.
    """
    del step_size, mask
    trees.require_floating(params, name)
    check_ascent(name, rho, p, steps, ascent)
    checks.check_static(name, projected=projected)
