"""Diagonals of Gauss-Newton and Fisher matrices, from noise at the model's outputs.

Both matrices are C = Jᵀ B Bᵀ J. For noise e with E[e eᵀ] = I, the entrywise square of Jᵀ B e has
mean diag C. An estimate costs one backward pass; the forward pass is that of the gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key
from curvax.curvature.gauss_newton import model_pass
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.likelihoods import Likelihood
from curvax.linalg import rademacher
from curvax.objective import Objective, microbatch_mean, require_likelihood
from curvax.pipes.signal import Stage
from curvax.stages.estimation.diagonal_stage import Curvature, diagonal_stage

Noise = Callable[[Likelihood, jax.Array, jax.Array, Tree], jax.Array]
"""(likelihood, keys of the examples, outputs, batch) ↦ B e, shaped like the outputs."""


@injectable
def gauss_newton_diag(
    key: Key = 0,
    *,
    probes: int = 1,
    fraction: float = 1.0,
    shards: int = 1,
    mean_over: AxisNames = None,
) -> Stage:
    """Estimates the diagonal of the Gauss-Newton matrix from random signs at the outputs.

        D = 1/s Σ (Jᵀ B e)²,   B Bᵀ = ∇²ℓ,   e = ±1

    The estimate is non-negative and unbiased. Chapelle & Erhan, Improved preconditioner for Hessian
    free optimization (2011); Martens, arXiv:1412.1193, section 11.2.

    Args:
        key: typed PRNG key, or seed. Each example has its own key, by its place in the global
            batch.
        probes: s, probes per estimate. With two or more the metric `diagonal_relative_error` is the
            relative standard error ‖σ‖/‖D‖.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        shards: number of contiguous parts of the global batch that are squared separately; the
            estimate is their mean. More shards mean less noise at equal cost, and the result does
            not depend on the number of devices.
        mean_over: device axis, or tuple of axes, to average over; `()` keeps the diagonal of each
            device.

    Returns:
        A stage that sets `diagonal`, in float32 or wider, shaped like the parameters. It needs
        `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError: an option is out of range; in `update`, the loss is local to a device axis and
            `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[2.0]]), "y": jnp.array([[1.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> stage, w = curvax.gauss_newton_diag(), jnp.zeros(1)
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> print(signal.diagonal)  # x², exact for one example with one output
        [4.]
    """

    def signs(likelihood: Likelihood, keys: jax.Array, z: jax.Array, batch: Tree) -> jax.Array:
        e = jax.vmap(rademacher)(keys, z)
        return likelihood.root(z, batch, e)

    return _from_outputs("gauss_newton_diag", signs, key, probes, fraction, shards, mean_over)


@injectable
def fisher_diag(
    key: Key = 0,
    *,
    probes: int = 1,
    fraction: float = 1.0,
    shards: int = 1,
    mean_over: AxisNames = None,
) -> Stage:
    """Estimates the diagonal of the Fisher matrix from labels drawn from the model's predictions.

        D = 1/s Σ N (∇ 1/N Σₙ ℓ(zₙ, ŷₙ))²,   ŷₙ ~ r(·|zₙ)

    The Gauss-Newton-Bartlett estimator of Liu et al., Sophia, arXiv:2305.14342, Algorithm 2: the
    square of one gradient times the batch size is unbiased, since the score has mean zero. The
    estimate is non-negative. Martens, arXiv:1412.1193, section 11.

    Args:
        key: typed PRNG key, or seed. Each example has its own key, by its place in the global
            batch.
        probes: s, labels drawn per site and estimate. With two or more the metric
            `diagonal_relative_error` is the relative standard error ‖σ‖/‖D‖.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        shards: number of contiguous parts of the global batch that are squared separately; the
            estimate is their mean.
        mean_over: device axis, or tuple of axes, to average over; `()` for a diagonal per device.

    Returns:
        A stage that sets `diagonal`, in float32 or wider, shaped like the parameters. It needs
        `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError: an option is out of range; in `update`, the loss is no likelihood, or it is
            local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch, model = {"x": jnp.array([[2.0]]), "y": jnp.ones((1, 1))}, lambda w, b: b["x"] * w
        >>> objective = curvax.Objective(curvax.bernoulli("y"), batch, model=model)
        >>> stage, w = curvax.fisher_diag(), jnp.zeros(1)
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> print(signal.diagonal)  # p (1 - p) x² with p = ½
        [1.]
    """

    def scores(likelihood: Likelihood, keys: jax.Array, z: jax.Array, batch: Tree) -> jax.Array:
        drawn = likelihood.on_labels(likelihood.sample(keys, z, batch))
        return root(likelihood.site_weights(z, batch)) * trees.widen(drawn.scores(z, batch))

    return _from_outputs("fisher_diag", scores, key, probes, fraction, shards, mean_over)


def _from_outputs(
    name: str,
    noise: Noise,
    key: Key,
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
    """The mean square of the pulled-back noise over probes; the mean over devices comes first."""

    def pulled(part: Objective) -> tuple[tuple[jax.Array, Any], Tree, Tree]:
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

    loss, gradient, x = microbatch_mean(objective, pulled)
    x = axes.mean(x, over, objective.batch_weight())
    weight = require_likelihood(objective, "the diagonal").total_weight(objective.batch)
    weight = lax.psum(axes.vary(weight, over), over) if over else weight
    squares = jax.tree.map(lambda y: weight * jnp.square(y), x)
    mean = jax.tree.map(lambda y: jnp.mean(y, axis=0), squares)
    if probes == 1:
        return Curvature(mean, {}, loss, gradient)
    variance = jax.tree.map(lambda y: jnp.var(y, axis=0, ddof=1) / probes, squares)
    return Curvature(mean, variance, loss, gradient)
