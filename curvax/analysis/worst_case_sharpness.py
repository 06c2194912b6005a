"""A loss, a point and a radius ↦ the worst-case rise of the loss, overall or by groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.ascent import ascend, check_ball
from curvax.analysis.compiling import compiled_once
from curvax.analysis.evaluation import Loss, as_loss, evaluate_gradients
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Mask, Scalar, TreePrefix
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.objective import Objective, as_objective, microbatching, pieces, require_batch
from curvax.objective.microbatching import weighed
from curvax.perturbation.ascent_rules import AscentLike


class Sharpness(NamedTuple):
    """Result of `sharpness`: the rise of the loss within a ball."""

    value: jax.Array
    """max L(θ + ε) - L(θ) over the points of the ascent, scalar: a lower bound of the maximum."""
    loss: jax.Array
    """L(θ), scalar."""
    perturbed_loss: jax.Array
    """max L(θ + ε) over the points of the ascent, scalar."""


class MSharpness(NamedTuple):
    """Result of `m_sharpness`: the rise of the loss of each group within its own ball."""

    value: jax.Array
    """The mean over groups, scalar; weighted if the objective has weights."""
    groups: jax.Array
    """The sharpness of each group, [n/m]; of the local groups inside pmap or shard_map."""


class SurrogateGap(NamedTuple):
    """Result of `surrogate_gap`: the gap after one ascent step, and estimates of σ_max from it."""

    gap: jax.Array
    """h = L(θ + ρ ∇L/‖∇L‖) - L(θ), scalar."""
    sigma_max: jax.Array
    """2h/ρ², scalar: estimate of the Hessian's largest eigenvalue at a minimum."""
    sigma_max_corrected: jax.Array
    """2(h - ρ‖∇L‖)/ρ², scalar: the curvature along the gradient, to first order in ρ."""
    loss: jax.Array
    """L(θ), scalar."""
    gradient_norm: jax.Array
    """‖∇L(θ)‖₂, scalar."""


def sharpness(
    objective: Loss,
    params: Tree,
    rho: Scalar | TreePrefix,
    *,
    p: float = 2,
    steps: int = 1,
    step_size: Scalar | None = None,
    projected: bool = True,
    ascent: AscentLike | None = None,
    mask: Mask | None = None,
    mean_over: AxisNames = None,
) -> Sharpness:
    """Computes SAM's sharpness, the rise of the loss within a ρ-ball, by projected gradient ascent.

        max_{‖ε‖_p <= ρ} L(θ + ε) - L(θ)

    Foret et al., SAM, arXiv:2010.01412, eq. 1. The steps are those of `sam_perturb`. Cost: one
    gradient for each step and one forward pass (for a `DatasetLoss` one more gradient instead).
    Half-precision parameters are widened to float32, because rounding would absorb small ε.

    Args:
        objective: an `Objective`, a `DatasetLoss`, or a callable `params -> scalar`.
        params: the point θ.
        rho: ρ >= 0 in the units of the norm; a number, or a tree prefix of numbers.
        p: order of the norm, in [1, ∞].
        steps: number of ascent steps; the result is the highest loss over all of them.
        step_size: length of the steps after the first, which has length ρ; by default ρ/steps.
        projected: rescale later iterates to the ball if they leave it.
        ascent: direction rule such as `curvax.asam(0.01)` for a ball in units of the weights, a
            tree prefix of rules, or a callable `path -> rule`; by default `dual_norm(p)`.
        mask: tree prefix of booleans, or a callable `params -> tree`; False leaves are not
            perturbed.
        mean_over: device axes over which L is the mean; `()` for the loss of each device.

    Returns:
        A `Sharpness`.

    Raises:
        ValueError, TypeError: an option out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> found = analysis.sharpness(loss, jnp.array([3.0, 4.0]), rho=0.1)
        >>> round(float(found.value), 3)  # ½ 5.1² - ½ 5²
        0.505
    """
    ball: dict[str, Any] = dict(p=p, steps=steps, projected=projected, ascent=ascent, mask=mask)
    objective = as_loss(objective, "sharpness", params)
    check_ball("sharpness", params, rho, **ball)
    return evaluate_gradients(
        _sharpness, objective, params, rho, step_size, mean_over=mean_over, **ball
    )


def m_sharpness(
    objective: Objective,
    params: Tree,
    rho: Scalar | TreePrefix,
    m: int,
    *,
    chunk: int = 1,
    mean_over: AxisNames = None,
    **ball: Any,
) -> MSharpness:
    """Computes the m-sharpness: the mean sharpness of contiguous groups of m examples.

        1/G Σ_g [max_{‖ε‖_p <= ρ} L_g(θ + ε) - L_g(θ)],   G = n/m

    Small m predicts the generalisation gap better than m = n. Foret et al., SAM,
    arXiv:2010.01412, section 4.1.

    Args:
        objective: an `Objective` with a batch.
        params: the point θ.
        rho: as in `sharpness`.
        m: examples in a group; divides the batch (the local batch inside pmap or shard_map).
        chunk: groups evaluated at once; set it to n/m for a sharded batch, so that all devices
            work in parallel.
        mean_over: device axes to average over; `()` for the groups of each device.
        **ball: the options `p`, `steps`, `step_size`, `projected`, `ascent` and `mask` of
            `sharpness`.

    Returns:
        An `MSharpness`.

    Raises:
        ValueError, TypeError: an option out of range, no batch, or one that m does not divide.

    Examples:
        >>> import jax.numpy as jnp
        >>> import curvax
        >>> loss = lambda w, batch: jnp.mean(batch @ w)
        >>> objective = curvax.Objective(loss, jnp.array([[1.0, 0.0], [0.0, 2.0]]))
        >>> found = curvax.analysis.m_sharpness(objective, jnp.ones(2), rho=0.1, m=1)
        >>> [round(float(x), 3) for x in found.groups]
        [0.1, 0.2]
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
    rho: Scalar,
    *,
    mean_over: AxisNames = None,
) -> SurrogateGap:
    """Computes GSAM's surrogate gap h and the estimate of the Hessian's largest eigenvalue from it.

        h = L(θ + ρ ∇L/‖∇L‖) - L(θ),   σ_max ≈ 2h/ρ²

    Zhuang et al., GSAM, arXiv:2203.08065, eq. 4 and Lemma 3.3. The estimate holds at a minimum.
    Elsewhere h contains ρ‖∇L‖, which `sigma_max_corrected` subtracts. Cost: one gradient and one
    forward pass (for a `DatasetLoss` two gradients). For a whole training set pass
    `Objective(loss, all_examples, microbatch=n)` or a `DatasetLoss`.

    Args:
        objective: an `Objective`, a `DatasetLoss`, or a callable `params -> scalar`.
        params: the point θ.
        rho: ρ >= 0, in the units of the weights; at 0 both estimates are 0.
        mean_over: device axes over which L is the mean; `()` for the loss of each device.

    Returns:
        A `SurrogateGap`.

    Raises:
        ValueError: ρ < 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 5.0 * jnp.sum(w**2)
        >>> found = analysis.surrogate_gap(loss, jnp.array([0.01]), rho=1.0)
        >>> round(float(found.sigma_max), 2), round(float(found.sigma_max_corrected), 2)
        (10.2, 10.0)
    """
    objective = as_loss(objective, "surrogate_gap", params)
    check_ball("surrogate_gap", params, rho)
    return evaluate_gradients(_surrogate_gap, objective, params, rho, mean_over=mean_over)


def _sharpness(
    objective: Objective,
    params: Tree,
    rho: Scalar | TreePrefix,
    step_size: Scalar | None,
    *,
    mean_over: AxisNames,
    **ball: Any,
) -> Sharpness:
    over = _averaged_axes(objective, params, mean_over, "sharpness")
    found = ascend(objective, params, rho, over, step_size=step_size, **ball)
    highest = jnp.max(found.visited)
    return Sharpness(highest - found.loss, found.loss, highest)


@compiled_once
def _m_sharpness(
    objective: Objective,
    params: Tree,
    rho: Scalar | TreePrefix,
    step_size: Scalar | None,
    *,
    m: int,
    chunk: int,
    mean_over: AxisNames,
    **ball: Any,
) -> MSharpness:
    over = _averaged_axes(objective, params, mean_over, "m_sharpness")
    groups, count = objective.groups(m), objective.size // m
    first = pieces.shard_number(objective, objective.local_axes(params))[0] * count

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
    objective: Objective, params: Tree, rho: Scalar, *, mean_over: AxisNames
) -> SurrogateGap:
    over = _averaged_axes(objective, params, mean_over, "surrogate_gap")
    found = ascend(objective, params, rho, over)
    gap, norm = found.visited[0] - found.loss, trees.norm(found.gradient)
    radius = jnp.asarray(rho, gap.dtype)
    estimate = lambda h: trees.ratio(trees.ratio(2 * h, radius), radius)
    return SurrogateGap(gap, estimate(gap), estimate(gap - rho * norm), found.loss, norm)


def _averaged_axes(
    objective: Objective, params: Tree, mean_over: AxisNames, name: str
) -> tuple[str, ...]:
    return checks.averaged_axes(mean_over, objective.local_axes(params), stage=name)
