"""Diagonals of Gauss-Newton and Fisher matrices, pulled back from noise at the model's outputs.

Both matrices are C = Jᵀ B Bᵀ J. With E[e eᵀ] = I the square of Jᵀ B e, entry by entry, has the
diagonal of C as its mean: one backward pass, and the forward pass is the gradient's own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.curvature.gauss_newton import model_pass
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.likelihoods import Likelihood
from curvax.linalg import rademacher
from curvax.objective import Objective, require_likelihood
from curvax.pipes.signal import Stage
from curvax.stages.estimation.diagonal_stage import Curvature, diagonal_stage

Noise = Callable[[Likelihood, jax.Array, jax.Array, Tree], jax.Array]
"""(likelihood, keys of the examples, outputs, batch) ↦ B e, shaped like the outputs."""


@injectable
def gauss_newton_diag(
    key: jax.Array | int = 0,
    *,
    probes: int = 1,
    fraction: float = 1.0,
    shards: int = 1,
    mean_over: AxisNames = None,
) -> Stage:
    """Estimates the diagonal of the Gauss-Newton matrix from random signs at the outputs.

        D = 1/s Σ (Jᵀ B e)²,   B Bᵀ = ∇²ℓ,   e = ±1

    Never negative and unbiased. Chapelle & Erhan, Improved preconditioner for Hessian free
    optimization (2011); Martens, arXiv:1412.1193, section 11.2.

    Args:
        key: a typed key or a seed. Each example draws by its place in the global batch.
        probes: s. With two or more, the relative standard error ‖σ‖/‖D‖ is the metric
            `diagonal_relative_error`.
        fraction: of the batch (its first part) that is used for curvature.
        shards: the number of contiguous parts of the global batch that are squared each on its
            own, then averaged: less noisy at no cost. The same run on any number of devices.
        mean_over: the device axis, or axes, to average over; `()` keeps each device's own.

    Returns:
        A stage that sets `diagonal`, in float32 or wider and shaped like the parameters. It needs
        an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError: an option out of range; later, under a device axis, no `mean_over`.
    """

    def signs(likelihood: Likelihood, keys: jax.Array, z: jax.Array, batch: Tree) -> jax.Array:
        e = jax.vmap(rademacher)(keys, z)
        return likelihood.root(z, batch, e)

    return _from_outputs("gauss_newton_diag", signs, key, probes, fraction, shards, mean_over)


@injectable
def fisher_diag(
    key: jax.Array | int = 0,
    *,
    probes: int = 1,
    fraction: float = 1.0,
    shards: int = 1,
    mean_over: AxisNames = None,
) -> Stage:
    """Estimates the diagonal of the Fisher matrix from labels drawn from the model.

        D = 1/s Σ N (∇ 1/N Σₙ ℓ(zₙ, ŷₙ))²,   ŷₙ ~ r(·|zₙ)

    The Gauss-Newton-Bartlett estimator of Liu et al., Sophia, arXiv:2305.14342, Algorithm 2: the
    square of one gradient, times the batch size, is unbiased since the score has mean zero. Never
    negative. Martens, arXiv:1412.1193, section 11. The rest as in `gauss_newton_diag`.

    Args:
        key: a typed key or a seed. Each example draws by its place in the global batch.
        probes: s, labels drawn for each site.
        fraction: of the batch (its first part) that is used for curvature.
        shards: contiguous parts of the global batch that are squared each on its own.
        mean_over: the device axis, or axes, to average over; `()` keeps each device's own.
    """

    def scores(likelihood: Likelihood, keys: jax.Array, z: jax.Array, batch: Tree) -> jax.Array:
        drawn = likelihood.on_labels(likelihood.sample(keys, z, batch))
        return root(likelihood.site_weights(z, batch)) * drawn.scores(z, batch)

    return _from_outputs("fisher_diag", scores, key, probes, fraction, shards, mean_over)


def _from_outputs(
    name: str,
    noise: Noise,
    key: jax.Array | int,
    probes: int,
    fraction: float,
    shards: int,
    mean_over: AxisNames,
) -> Stage:
    estimate = lambda part, params, k, over: _squared(part, params, k, probes, noise, over)
    needs = lambda objective: require_likelihood(objective, f"`{name}`")
    return diagonal_stage(name, estimate, key, probes, fraction, shards, mean_over, needs)


def _squared(
    objective: Objective,
    params: Tree,
    key: jax.Array,
    probes: int,
    noise: Noise,
    over: tuple[str, ...],
) -> Curvature:
    """The mean square of the pulled-back noise, over probes; over devices before the square."""

    def pulled(part: Objective) -> tuple[Any, Tree, Tree]:
        at, likelihood = model_pass(part, params), require_likelihood(part, "the diagonal")
        loss, gradient = at.loss_and_gradient()
        weight = likelihood.total_weight(part.batch)
        root_weight = root(weight)

        def once(k: jax.Array) -> Tree:
            e = noise(likelihood, part.example_keys(k), at.outputs, part.batch)
            x = at.pull_sum(e.astype(at.outputs.dtype), weight)
            share = lambda y: trees.ratio(y, root_weight.astype(y.dtype))
            return jax.tree.map(share, trees.wide(x))

        return loss, gradient, jax.vmap(once)(jax.random.split(key, probes))

    loss, gradient, x = objective.average(pulled)
    x = axes.mean(x, over, objective.batch_weight())
    weight = require_likelihood(objective, "the diagonal").total_weight(objective.batch)
    weight = lax.psum(axes.vary(weight, over), over) if over else weight
    squares = jax.tree.map(lambda y: weight * jnp.square(y), x)
    mean = jax.tree.map(lambda y: jnp.mean(y, axis=0), squares)
    if probes == 1:
        return Curvature(mean, {}, loss, gradient)
    variance = jax.tree.map(lambda y: jnp.var(y, axis=0, ddof=1) / probes, squares)
    return Curvature(mean, variance, loss, gradient)
