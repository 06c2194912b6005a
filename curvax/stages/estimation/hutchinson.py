"""Hutchinson's estimator of the Hessian diagonal."""

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, Sampler
from curvax.curvature.differentiability import check_mode
from curvax.curvature.hessian import gradient_and_product, linearized_gradient
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import estimate_diagonal, rademacher
from curvax.objective import Objective
from curvax.pipes.signal import Stage
from curvax.stages.estimation.diagonal_stage import Curvature, diagonal_stage


@injectable
def hutchinson_diag(
    key: Key = 0,
    *,
    probes: int = 1,
    sampler: Sampler = rademacher,
    fraction: float = 1.0,
    shards: int = 1,
    mean_over: AxisNames = None,
    mode: str = "auto",
) -> Stage:
    """Estimates the diagonal of the Hessian from products with random probes.

        D = 1/s Σ z ⊙ H z,   E[z zᵀ] = I

    The estimate is unbiased; with random signs it is exact for a diagonal Hessian. Yao et al.,
    AdaHessian, arXiv:2006.00719, eq. 8. If the updates are the gradient that
    `objective.value_and_grad` returned, the estimator's own gradient replaces them: same values,
    and one backward pass for both.

    Args:
        key: typed PRNG key, or seed.
        probes: s, probes per estimate. With two or more the metric `diagonal_relative_error` is the
            relative standard error ‖σ‖/‖D‖ (under a device axis the mean over devices, an upper
            bound).
        sampler: `sampler(key, tree) -> tree` of probes with identity covariance.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        shards: number of contiguous parts of the global batch with a probe of their own; the
            estimate is their mean. More shards mean less noise at equal cost, and the result does
            not depend on the number of devices.
        mean_over: device axis, or tuple of axes, to average the diagonal over; `()` keeps the
            diagonal of each device.
        mode: differentiation mode of the Hessian product, as in `hvp`.

    Returns:
        A stage that sets `diagonal`, in float32 or wider, shaped like the parameters. It needs
        `value_fn`.

    Raises:
        TypeError: `sampler` is not callable.
        ValueError: an option is out of range; in `update`, the loss is local to a device axis and
            `mean_over` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
        >>> stage, w = curvax.hutchinson_diag(), jnp.ones(2)
        >>> signal = curvax.Signal(jax.grad(loss)(w))
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=loss)
        >>> print(signal.diagonal)
        [ 1. 10.]
    """
    checks.check_sampler("hutchinson_diag", sampler)
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
