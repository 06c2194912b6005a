"""The diagonal of the Hessian from products with random signs."""

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import check_mode
from curvax.curvature.hessian import gradient_and_product, linearized_gradient
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import estimate_diagonal, rademacher
from curvax.objective import Objective
from curvax.pipes.signal import Stage
from curvax.stages.estimation.diagonal_stage import Curvature, Sampler, diagonal_stage


@injectable
def hutchinson_diag(
    key: jax.Array | int = 0,
    *,
    probes: int = 1,
    sampler: Sampler = rademacher,
    fraction: float = 1.0,
    shards: int = 1,
    mean_over: AxisNames = None,
    mode: str = "auto",
) -> Stage:
    """Estimates the diagonal of the Hessian from products with random signs.

        D = 1/s Σ z ⊙ H z,   E[z zᵀ] = I

    Unbiased, and exact with signs where H is diagonal. Yao et al., AdaHessian, arXiv:2006.00719,
    eq. 8. Handed the very gradient that `objective.value_and_grad` returned, it passes on its own
    copy of it, so that the two share one backward pass.

    Args:
        key: a typed key or a seed.
        probes: s. With two or more, the relative standard error ‖σ‖/‖D‖ is the metric
            `diagonal_relative_error` (under an axis, the mean of the devices' own: a bound).
        sampler: `sampler(key, tree) -> tree` of probes with identity covariance.
        fraction: of the batch (its first part) that is used for curvature.
        shards: 1, one probe for the whole batch; n, one for each contiguous n-th of the global
            batch, less noisy at no cost, and the same whatever the number of devices.
        mean_over: the device axis, or axes, to average the diagonal over; `()` keeps each
            device's own.
        mode: of the Hessian product, as in `hvp`.

    Returns:
        A stage that sets `diagonal`, in float32 or wider and shaped like the parameters.

    Raises:
        ValueError: an option out of range; later, under a device axis, no `mean_over`.
    """
    checks.check_static("hutchinson_diag", sampler=sampler)
    if not callable(sampler):
        raise TypeError(
            "`hutchinson_diag(sampler=)` takes a callable `sampler(key, tree) -> tree`, such as "
            f"`rademacher` or `gaussian_probe`, and got {sampler!r}."
        )
    check_mode(mode)
    estimate = lambda part, params, k, over: _estimate(part, params, k, probes, sampler, mode)
    return diagonal_stage("hutchinson_diag", estimate, key, probes, fraction, shards, mean_over)


def _estimate(
    objective: Objective, params: Tree, key: jax.Array, probes: int, sampler: Sampler, mode: str
) -> Curvature:
    if probes == 1 or not jax.tree.leaves(params):
        z = sampler(key, params)
        (loss, gradient), product = gradient_and_product(objective, params, z, mode=mode)
        diagonal = jax.tree.map(lambda a, b: a * b, trees.wide(z), trees.wide(product))
        return Curvature(diagonal, {}, loss, gradient)
    (loss, gradient), product = linearized_gradient(objective, params, mode=mode)
    z = jax.vmap(sampler, in_axes=(0, None))(jax.random.split(key, probes), params)
    z = axes.vary(z, objective.local_axes(params))
    mean, error = estimate_diagonal(lambda v: trees.wide(product(v)), z)
    return Curvature(mean, jax.tree.map(jnp.square, error), loss, gradient)
