"""Kronecker factors of the curvature: stages that set `factors`, with nothing registered."""

from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key
from curvax.curvature.kronecker.cotangents import draws_of
from curvax.curvature.kronecker.estimate import kronecker_factors
from curvax.curvature.kronecker.factors import KroneckerFactors
from curvax.curvature.kronecker.operator import Structure
from curvax.curvature.kronecker.options import Options, required
from curvax.curvature.kronecker.sums import Sums, sums_of
from curvax.curvature.kronecker.tapped import tapped
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.objective import (
    LossAndGradient,
    Objective,
    as_objective,
    microbatch_mean,
    pieces,
    require_batch,
)
from curvax.pipes import initial
from curvax.pipes.signal import Stage
from curvax.stages.estimation.gradient_sharing import gradient_sharing_stage


@injectable
def fisher_kronecker(
    like: Objective | None = None,
    key: Key = 0,
    *,
    sharing: str = "expand",
    bias: str = "joint",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Estimates the Kronecker factors of the Fisher matrix with labels drawn from the model.

        F ≈ G ⊗ A,   A = E[a aᵀ],   G = E[g gᵀ]

    for every kernel, where a are its inputs and g the derivatives of log r(ŷ|z) in its outputs, at
    one draw ŷ for each site. `kronecker_factors` says which parameters get factors. If the updates
    are the gradient of the objective, the stage's own gradient replaces them: same values, and one
    forward pass for both. Martens & Grosse, K-FAC, arXiv:1503.05671, sections 2 and 5.

    Args:
        like: an objective with the model and with shapes of training, if later stages keep factors
            from step to step (`ema_mean`, `every`, `kronecker(every=)`): `init` traces its model,
            and computes nothing. Its batch may be of `jax.ShapeDtypeStruct`.
        key: typed PRNG key, or seed, of the labels.
        sharing: `expand` or `reduce`, as in `kronecker_factors`.
        bias: `joint` or `separate`, as in `kronecker_factors`.
        fraction: fraction of the batch in (0, 1], its first examples, that the factors are computed
            on.
        mean_over: device axis, or tuple of axes, to average over, by one all-reduce of all factors;
            `()` keeps the factors of each device.

    Returns:
        A stage that sets `factors`, in float32 or wider. It needs `value_fn=` an `Objective` with
        `model=` and a likelihood.

    Raises:
        ValueError: an option is out of range; in `update`, the loss is no likelihood, or it is
            local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.zeros((2, 1))}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.bernoulli("y"), batch, model=predict)
        >>> stage, w = curvax.fisher_kronecker(), jnp.zeros((2, 1))
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> signal.factors(jnp.ones((2, 1)))[:, 0].round(3).tolist()  # E[x xᵀ] p (1 - p), p = ½
        [0.125, 0.5]
    """
    options = Options("sampled", sharing, bias)
    return _kronecker("fisher_kronecker", options, like, fraction, mean_over, key)


@injectable
def gauss_newton_kronecker(
    like: Objective | None = None,
    *,
    sharing: str = "expand",
    bias: str = "joint",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Computes the Kronecker factors of the Gauss-Newton matrix, that of the exact Fisher matrix.

    By one backward pass for each output of an example, so that nothing is drawn. Botev et al.,
    arXiv:1706.03662; Martens, arXiv:1412.1193, section 9.

    Args:
        like: an objective with the model and with shapes of training, if later stages keep factors
            from step to step.
        sharing: `expand` or `reduce`, as in `kronecker_factors`.
        bias: `joint` or `separate`, as in `kronecker_factors`.
        fraction: fraction of the batch in (0, 1], its first examples, that the factors are computed
            on.
        mean_over: device axis, or tuple of axes, to average over; `()` keeps the factors of each
            device.

    Returns:
        A stage that sets `factors`, in float32 or wider. It needs `value_fn=` an `Objective` with
        `model=` and a likelihood.

    Raises:
        ValueError: an option is out of range; in `update`, the loss is no likelihood, or it is
            local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.zeros((2, 1))}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> stage, w = curvax.gauss_newton_kronecker(), jnp.zeros((2, 1))
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> signal.factors(jnp.ones((2, 1)))[:, 0].round(3).tolist()  # E[x xᵀ]
        [0.5, 2.0]
    """
    options = Options("exact", sharing, bias)
    return _kronecker("gauss_newton_kronecker", options, like, fraction, mean_over)


@injectable
def empirical_fisher_kronecker(
    like: Objective | None = None,
    *,
    sharing: str = "expand",
    bias: str = "joint",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Computes the Kronecker factors of the empirical Fisher matrix, at the labels of the batch.

    For any loss of a model's outputs. Far from a good fit it does not approximate the Fisher
    matrix: Martens, arXiv:1412.1193, section 11.

    Args:
        like: an objective with the model and with shapes of training, if later stages keep factors
            from step to step.
        sharing: `expand` or `reduce`, as in `kronecker_factors`.
        bias: `joint` or `separate`, as in `kronecker_factors`.
        fraction: fraction of the batch in (0, 1], its first examples, that the factors are computed
            on.
        mean_over: device axis, or tuple of axes, to average over; `()` keeps the factors of each
            device.

    Returns:
        A stage that sets `factors`, in float32 or wider. It needs `value_fn=` an `Objective` with
        `model=`.

    Raises:
        ValueError: an option is out of range; in `update`, the objective has no `model`, or the
            loss is local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([[1.0], [3.0]])}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> stage, w = curvax.empirical_fisher_kronecker(), jnp.zeros((2, 1))
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> signal.factors(jnp.ones((2, 1)))[:, 0].round(3).tolist()  # E[x xᵀ] E[y²]
        [2.5, 10.0]
    """
    options = Options("empirical", sharing, bias)
    return _kronecker("empirical_fisher_kronecker", options, like, fraction, mean_over)


def _kronecker(
    name: str,
    options: Options,
    like: Objective | None,
    fraction: float,
    mean_over: AxisNames,
    key: Key | None = None,
) -> Stage:
    """A stage that sets these factors; `key` is None for factors that draw no labels."""
    options.checked(name)

    def evaluate(
        here: Objective, params: Tree, draw: jax.Array | None, over: tuple[str, ...]
    ) -> tuple[LossAndGradient, dict[str, Any]]:
        def one_pass(part: Objective, *draws: jax.Array) -> tuple[LossAndGradient, Sums]:
            at = tapped(part, params)
            with jax.default_matmul_precision("highest"):
                return at.loss_and_gradient(), sums_of(at, options, *draws)

        draws = draws_of(here, options.fisher, None, draw)
        found, sums = microbatch_mean(here, one_pass, *draws)
        averaged = axes.mean(sums, over, here.batch_weight())
        return found, {"factors": averaged.finished(here.local_axes(params) - set(over))}

    needs = lambda objective, params: required(objective, params, options.fisher, name)
    factors = None
    if like is not None:
        shapes = _shapes_of(like, name)
        factors = lambda params, factors: _zeros(shapes, params, options)
    return gradient_sharing_stage(name, evaluate, fraction, mean_over, key, needs, factors)


def _shapes_of(like: Objective, name: str) -> Objective:
    """`like` with shapes in place of its batch, so that a stage does not hold the arrays."""
    like = require_batch(as_objective(like, f"{name}(like=)"), f"{name}(like=)")
    shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    return pieces.changed(like, batch=jax.tree.map(shape, like.batch))


def _zeros(like: Objective, params: Tree, options: Options) -> KroneckerFactors:
    """Factors of zeros for a model; its operations are traced and not computed."""
    if not jax.tree.leaves(params):
        return KroneckerFactors((), (), {}, Structure((), (), (), (), options))

    def factors(params: Tree, batch: Tree) -> KroneckerFactors:
        objective = pieces.changed(like, batch=batch).through(initial.whole)
        key = jax.random.key(0) if options.fisher == "sampled" else None
        return kronecker_factors(objective, params, **options._asdict(), key=key, mean_over=())

    found = jax.eval_shape(factors, params, like.batch)
    return jax.tree.map(jnp.zeros_like, found)
