"""A model, a point and a step ↦ how far apart the predictions at its ends are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.dataset_loss import Sweep
from curvax.analysis.evaluation.whole_sets import as_loss, averaged
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature import fvp
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.likelihoods import Likelihood
from curvax.objective import Objective, require_likelihood


class FisherKL(NamedTuple):
    """Divergences between the predictions at θ and at θ + d, means over sites by weight."""

    quadratic: jax.Array
    """½ dᵀF d, scalar: what both divergences are to second order in d."""
    forward: jax.Array
    """KL(p_θ ‖ p_θ₊d), scalar."""
    reverse: jax.Array
    """KL(p_θ₊d ‖ p_θ), scalar."""


def fisher_kl(
    objective: Objective | Sweep,
    params: Tree,
    step: Tree,
    *,
    mode: str = "auto",
    mean_over: AxisNames = None,
) -> FisherKL:
    """Half the Fisher form of a step beside the divergence that it approximates, both ways.

        ½ dᵀF d ≈ KL(p_θ ‖ p_θ₊d) ≈ KL(p_θ₊d ‖ p_θ)

    Martens, arXiv:1412.1193, section 6. The divergences are differences of mean losses: of those
    below about ε times the loss, ε the precision of the outputs, nothing is left, and the form
    is the better number.

    Args:
        objective: an `Objective`, or a `Sweep` over a loader, with `model=` and a likelihood as
            its loss.
        params: the point θ.
        step: d, a tree like the parameters.
        mode: of the Fisher product, as in `ggnvp`.
        mean_over: the device axes to average over; `()` for each device's own.

    Returns:
        A `FisherKL`.

    Raises:
        ValueError: the loss is no likelihood, or an unknown mode.
    """
    objective = as_loss(objective, "fisher_kl", params)
    return averaged(_fisher_kl, objective, params, step, mode=mode, mean_over=mean_over)


def _fisher_kl(
    objective: Objective, params: Tree, step: Tree, *, mode: str, mean_over: AxisNames
) -> FisherKL:
    require_likelihood(objective, "The divergence between predictions")
    params = trees.wide(params)
    over = checks.averaged_axes(mean_over, objective.local_axes(params), stage="fisher_kl")
    form = 0.5 * trees.dot(step, fvp(objective, params, mode=mode)(step))
    there = trees.add(params, step)

    def divergences(part: Objective) -> tuple[jax.Array, jax.Array]:
        z, z_there = part.outputs(params)[0], part.outputs(there)[0]
        return _divergence(part, z, z_there), _divergence(part, z_there, z)

    with jax.default_matmul_precision("highest"):
        forward, reverse = objective._microbatch_mean(divergences)
    return axes.mean(FisherKL(form, forward, reverse), over, objective.batch_weight())


def _divergence(objective: Objective, z: jax.Array, other: jax.Array) -> jax.Array:
    """KL(p_z ‖ p_other): how much worse the other outputs explain the mean label of z.

    In an exponential family ℓ(z', y) - ℓ(z, y) is linear in the label, so that its expectation is
    the difference at E y.
    """
    likelihood = require_likelihood(objective, "The divergence between predictions")
    z, other = trees.widen(z), trees.widen(other)
    expected = likelihood.on_labels(_mean_label(likelihood, z, objective.batch))
    return expected(other, objective.batch) - expected(z, objective.batch)


def _mean_label(likelihood: Likelihood, z: jax.Array, batch: Tree) -> jax.Array:
    """E y under r(·|z), shaped like z: the score at a label y is E y - y, whatever the label."""
    y = jax.nn.one_hot(jnp.zeros(z.shape[:-1], int), z.shape[-1], dtype=z.dtype)
    return likelihood.on_labels(y).scores(z, batch) + y
