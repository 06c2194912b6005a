"""A loss, a point and a radius ↦ how far the loss rises nearby at worst, whole or by groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.ascent import ascend, check_ball
from curvax.analysis.evaluation.compiling import compiled_once
from curvax.analysis.evaluation.whole_sets import Loss, as_loss, walked
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.objective import Objective, as_objective, microbatching, require_batch
from curvax.objective.microbatching import weighed


class Sharpness(NamedTuple):
    """How far the loss rises within a ball."""

    value: jax.Array
    """max L(θ + ε) - L(θ) over the points that the ascent visited, scalar: a lower bound."""
    loss: jax.Array
    """L(θ), scalar."""
    perturbed_loss: jax.Array
    """The highest L(θ + ε) that was found, scalar."""


class MSharpness(NamedTuple):
    """How far the loss of each group rises within a ball of its own."""

    value: jax.Array
    """The mean over groups, by weight where there is one, scalar."""
    groups: jax.Array
    """Each group's own, [n/m] (of this device's groups, under an axis)."""


class SurrogateGap(NamedTuple):
    """What one ascent step says of the loss and of its curvature."""

    gap: jax.Array
    """h = L(θ + ρ ∇L/‖∇L‖) - L(θ), scalar."""
    sigma_max: jax.Array
    """2h/ρ², the estimate of the Hessian's largest eigenvalue at a minimum."""
    sigma_max_corrected: jax.Array
    """2(h - ρ‖∇L‖)/ρ², the curvature along the gradient, to first order in ρ."""
    loss: jax.Array
    """L(θ), scalar."""
    gradient_norm: jax.Array
    """‖∇L(θ)‖₂, scalar."""


def sharpness(
    objective: Loss,
    params: Tree,
    rho: Any,
    *,
    p: float = 2,
    steps: int = 1,
    step_size: Any = None,
    projected: bool = True,
    ascent: Any = None,
    mask: Any = None,
    mean_over: AxisNames = None,
) -> Sharpness:
    """SAM's sharpness: how far the loss rises within a ρ-ball, by projected gradient ascent.

        max_{‖ε‖_p <= ρ} L(θ + ε) - L(θ)

    It costs a gradient for each step and a forward pass (over a `Sweep` a gradient in its place).
    Parameters in half precision are widened to float32 first: a small perturbation would be lost in
    their rounding. Foret et al., SAM, arXiv:2010.01412, eq. 1; the steps are those of
    `sam_perturb`.

    Args:
        objective: an `Objective`, a `Sweep` over a loader, or a callable `params -> scalar`.
        params: the point θ.
        rho: ρ >= 0 in the units of the norm; a number, or a tree prefix of numbers.
        p: the norm of the ball, in [1, ∞].
        steps: ascent steps; the highest loss that any of them reaches counts.
        step_size: the length of steps after the first, which has length ρ; ρ/steps by default.
        projected: pull later steps back, radially, into the ball.
        ascent: a rule of `curvax.linalg.ascent`, such as `asam(0.01)` for a ball in units of the
            weights, or a tree prefix or a callable `path -> rule`; by default `dual_norm(p)`.
        mask: a tree prefix of booleans, or a callable `params -> tree`: False leaves stay.
        mean_over: the device axes over which L is the mean; `()` for each device's own.

    Returns:
        A `Sharpness`.

    Raises:
        ValueError, TypeError: an option out of range.
    """
    ball = dict(p=p, steps=steps, projected=projected, ascent=ascent, mask=mask)
    objective = as_loss(objective, "sharpness", params)
    check_ball("sharpness", params, rho, **ball)
    return walked(_sharpness, objective, params, rho, step_size, mean_over=mean_over, **ball)


def m_sharpness(
    objective: Objective,
    params: Tree,
    rho: Any,
    m: int,
    *,
    chunk: int = 1,
    mean_over: AxisNames = None,
    **ball: Any,
) -> MSharpness:
    """The mean sharpness of contiguous groups of m examples, each in a ball of its own.

        1/G Σ_g [max_{‖ε‖_p <= ρ} L_g(θ + ε) - L_g(θ)]

    For small m it follows the generalisation gap better than the sharpness of the whole. Foret et
    al., SAM, arXiv:2010.01412, section 4.1.

    Args:
        objective: an `Objective` with a batch.
        params: the point θ.
        rho: as in `sharpness`.
        m: examples in a group; divides the batch (of each device, under an axis).
        chunk: groups climbed for at once; pass their number to have a sharded batch climb in
            parallel.
        mean_over: the device axes to average over; `()` for each device's own groups.
        **ball: the options `p`, `steps`, `step_size`, `projected`, `ascent` and `mask` of
            `sharpness`.

    Returns:
        An `MSharpness`.

    Raises:
        ValueError, TypeError: an option out of range; no batch, or one that m does not divide.
    """
    objective = require_batch(as_objective(objective, "m_sharpness", params), "m_sharpness")
    check_ball("m_sharpness", params, rho, **ball)
    checks.check_count("m_sharpness", m=m, chunk=chunk)
    objective.groups(m)
    step_size = ball.pop("step_size", None)
    options = dict(m=m, chunk=chunk, mean_over=mean_over, **ball)
    return _m_sharpness(objective, params, rho, step_size, **options)


def surrogate_gap(
    objective: Loss,
    params: Tree,
    rho: Any,
    *,
    mean_over: AxisNames = None,
) -> SurrogateGap:
    """GSAM's surrogate gap, and the largest eigenvalue of the Hessian that it estimates.

        h = L(θ + ρ ∇L/‖∇L‖) - L(θ),   σ_max ≈ 2h/ρ²

    The estimate holds at a minimum; elsewhere h contains ρ‖∇L‖, and the corrected one stands
    beside it. It costs a gradient and a forward pass (over a `Sweep` two gradients). For h over a
    whole training set pass `Objective(loss, all_examples, microbatch=n)`, or a `Sweep`. Zhuang et
    al., GSAM, arXiv:2203.08065, eq. 4 and Lemma 3.3.

    Args:
        objective: an `Objective`, a `Sweep` over a loader, or a callable `params -> scalar`.
        params: the point θ.
        rho: ρ >= 0, in the units of the weights; at 0 both estimates are 0.
        mean_over: the device axes over which L is the mean; `()` for each device's own.

    Returns:
        A `SurrogateGap`.

    Raises:
        ValueError: ρ < 0.
    """
    objective = as_loss(objective, "surrogate_gap", params)
    check_ball("surrogate_gap", params, rho)
    return walked(_surrogate_gap, objective, params, rho, mean_over=mean_over)


def _sharpness(
    objective: Objective,
    params: Tree,
    rho: Any,
    step_size: Any,
    *,
    mean_over: AxisNames,
    **ball: Any,
) -> Sharpness:
    over = _averaged(objective, params, mean_over, "sharpness")
    found = ascend(objective, params, rho, over, step_size=step_size, **ball)
    highest = jnp.max(found.visited)
    return Sharpness(highest - found.loss, found.loss, highest)


@compiled_once
def _m_sharpness(
    objective: Objective,
    params: Tree,
    rho: Any,
    step_size: Any,
    *,
    m: int,
    chunk: int,
    mean_over: AxisNames,
    **ball: Any,
) -> MSharpness:
    over = _averaged(objective, params, mean_over, "m_sharpness")
    groups, count = objective.groups(m), objective.size // m
    first = objective._shard_number(objective.local_axes(params))[0] * count

    def one(i: jax.Array, batch: Tree, params: Tree) -> tuple[jax.Array, jax.Array | None]:
        group = objective.piece(batch, i, count)
        found = ascend(group, params, rho, (), first + i, step_size=step_size, **ball)
        return jnp.max(found.visited) - found.loss, group.batch_weight()

    found = microbatching.map_over(one, groups, count, chunk, params)
    values, weight = meshes.gathered(found)
    w = jnp.ones_like(values) if weight is None else weight
    mean = trees.ratio(jnp.sum(weighed(w, values)), jnp.sum(w))
    return MSharpness(axes.mean(mean, over, objective.batch_weight()), values)


def _surrogate_gap(
    objective: Objective, params: Tree, rho: Any, *, mean_over: AxisNames
) -> SurrogateGap:
    over = _averaged(objective, params, mean_over, "surrogate_gap")
    found = ascend(objective, params, rho, over)
    gap, norm = found.visited[0] - found.loss, trees.norm(found.gradient)
    radius = jnp.asarray(rho, gap.dtype)
    estimate = lambda h: trees.ratio(trees.ratio(2 * h, radius), radius)
    return SurrogateGap(gap, estimate(gap), estimate(gap - rho * norm), found.loss, norm)


def _averaged(
    objective: Objective, params: Tree, mean_over: AxisNames, name: str
) -> tuple[str, ...]:
    return checks.averaged_axes(mean_over, objective.local_axes(params), stage=name)
