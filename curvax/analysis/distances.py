"""A model, a point θ and a step d ↦ divergences between the predictions at θ and at θ + d."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.dataset_loss import DatasetLoss
from curvax.analysis.evaluation import as_loss, evaluate_mean
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature import fvp
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.likelihoods import Likelihood
from curvax.objective import Objective, microbatch_mean, require_likelihood


class FisherKL(NamedTuple):
    """Result of `fisher_kl`: divergences between the predictions at θ and θ + d, weighted means."""

    quadratic: jax.Array
    """½ dᵀF d, scalar: both divergences to second order in d."""
    forward: jax.Array
    """KL(p_θ ‖ p_θ₊d), scalar."""
    reverse: jax.Array
    """KL(p_θ₊d ‖ p_θ), scalar."""


def fisher_kl(
    objective: Objective | DatasetLoss,
    params: Tree,
    step: Tree,
    *,
    mode: str = "auto",
    mean_over: AxisNames = None,
) -> FisherKL:
    """Compares half the Fisher quadratic form of a step with the KL divergences it approximates.

        ½ dᵀF d ≈ KL(p_θ ‖ p_θ₊d) ≈ KL(p_θ₊d ‖ p_θ)

    Martens, arXiv:1412.1193, section 6. The divergences are differences of mean losses and lose
    all digits below the machine epsilon times the loss; for such small steps use the form.

    Args:
        objective: an `Objective` or a `DatasetLoss` with `model=` and a likelihood as its loss.
        params: the point θ.
        step: d, a tree like the parameters.
        mode: differentiation mode of the Fisher product, as in `ggnvp`.
        mean_over: device axes to average over; `()` for the values of each device.

    Returns:
        A `FisherKL`, in nats.

    Raises:
        ValueError: the loss is not a likelihood, or an unknown mode.

    Examples:
        >>> import jax.numpy as jnp
        >>> import curvax
        >>> batch = {"x": jnp.ones((2, 1)), "y": jnp.zeros((2, 1))}
        >>> model = lambda w, batch: batch["x"] * w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=model)
        >>> found = curvax.analysis.fisher_kl(objective, jnp.ones(1), 0.2 * jnp.ones(1))
        >>> [round(float(x), 3) for x in found]  # a linear Gaussian model: all are ½ 0.2²
        [0.02, 0.02, 0.02]
    """
    objective = as_loss(objective, "fisher_kl", params)
    return evaluate_mean(_fisher_kl, objective, params, step, mode=mode, mean_over=mean_over)


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
        forward, reverse = microbatch_mean(objective, divergences)
    return axes.mean(FisherKL(form, forward, reverse), over, objective.batch_weight())


def _divergence(objective: Objective, z: jax.Array, other: jax.Array) -> jax.Array:
    """KL(p_z ‖ p_other) = ℓ(other, ȳ) - ℓ(z, ȳ) with ȳ = E y under p_z.

    In an exponential family ℓ(z', y) - ℓ(z, y) is linear in y, so that its expectation is its
    value at ȳ.
    """
    likelihood = require_likelihood(objective, "The divergence between predictions")
    z, other = trees.widen(z), trees.widen(other)
    expected = likelihood.on_labels(_mean_label(likelihood, z, objective.batch))
    return expected(other, objective.batch) - expected(z, objective.batch)


def _mean_label(likelihood: Likelihood, z: jax.Array, batch: Tree) -> jax.Array:
    """E y under r(·|z), shaped like z. The score at y is E y - y for any y, here class 0."""
    y = jax.nn.one_hot(jnp.zeros(z.shape[:-1], int), z.shape[-1], dtype=z.dtype)
    return likelihood.on_labels(y).scores(z, batch) + y
