"""Products with the Fisher matrix of a model's predictive distribution, exact or sampled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import check_mode
from curvax.curvature.gauss_newton import Metric, linearized_product, loss_curvature
from curvax.likelihoods import Likelihood
from curvax.linear_operator import Product, Root
from curvax.objective import LossAndGradient, Objective, as_objective, check_key, require_likelihood


def fvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    samples: int | None = None,
    key: jax.Array | None = None,
    labels: jax.Array | None = None,
    mode: str = "auto",
    precision: str | None = "highest",
) -> Product:
    """The product with the Fisher matrix of the model's predictive distribution at `params`.

        F v = Σᵢ wᵢ E_y[g gᵀ] v / Σᵢ wᵢ,   g = ∇_θ log r(y | zᵢ),   y ~ r(· | zᵢ)

    By default F is exact, Jᵀ Cov(y) J, which equals the Gauss-Newton matrix for these likelihoods.
    With `samples` or `labels` the expectation is a mean over labels. Cost, micro-batches and
    device axes are as in `ggnvp`. Martens, arXiv:1412.1193, eq. 3.

    Args:
        objective: an `Objective` with `model=` and a likelihood as its loss.
        params: the point θ.
        samples: S >= 1, labels drawn at each site. All products take the same draws, which do not
            depend on the number of devices or on `microbatch`.
        key: a typed key for these draws, required with `samples`.
        labels: draws given explicitly instead, [S, ...] or [...], where [...] is the shape of hard
            targets.
        mode: how J v is computed, as in `ggnvp`.
        precision: of matrix products, as in `jax.default_matmul_precision`.

    Returns:
        A `Product` on trees like `params`. Without micro-batches it has a root: that of `ggnvp` if
        exact, R v = √(w/SΣw) <g, v>, [S, *sites, 1, ...], if sampled.

    Raises:
        ValueError: the loss is not a likelihood, `mode` is unknown, or `samples`, `key` and
            `labels` do not go together.
        TypeError: `key` is not a typed key, or JAX cannot differentiate the model in the given
            mode.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([0.0, 1.0])}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.bernoulli("y"), batch, model=predict)
        >>> product = curvax.fvp(objective, jnp.zeros(1))
        >>> product(jnp.ones(1)).tolist()  # p (1 - p) mean(x²)
        [0.625]
    """
    _check_draws(samples, key, labels)
    objective = as_objective(objective, "fvp", params)
    return _linearized(objective, params, mode, precision, samples, key, labels)[1]


def linearized_fisher(
    objective: Objective,
    params: Tree,
    *,
    samples: int | None = None,
    key: jax.Array | None = None,
    mode: str = "auto",
    precision: str | None = "highest",
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), product of `fvp`) from one linearisation; `key` is unused if exact."""
    gradient, product = _linearized(objective, params, mode, precision, samples, key)
    return gradient(), product


def _linearized(
    objective: Objective,
    params: Tree,
    mode: str,
    precision: str | None,
    samples: int | None,
    key: jax.Array | None,
    labels: jax.Array | None = None,
) -> tuple[Callable[[], LossAndGradient], Product]:
    check_mode(mode)
    likelihood = require_likelihood(objective, "The Fisher matrix")
    metric: Metric = loss_curvature
    batched: tuple[jax.Array, ...] = ()
    if labels is not None:
        shape = likelihood.label_shape(objective.batch)
        metric, batched = given_labels, (by_example(jnp.asarray(labels), shape, "fvp"),)
    elif samples is not None and key is not None:
        metric, batched = drawn_labels, (sample_keys(objective, key, samples),)
    return linearized_product(objective, params, metric, *batched, mode=mode, precision=precision)


def sample_keys(objective: Objective, key: jax.Array, samples: int) -> jax.Array:
    """Keys for S draws per example, [n, S], from the example's number in the global batch."""
    return jax.vmap(lambda k: jax.random.split(k, samples))(objective.example_keys(key))


def draw(likelihood: Likelihood, keys: jax.Array, outputs: jax.Array, batch: Tree) -> jax.Array:
    """Draws S labels at each site, [n, S, ...], from keys [n, S]."""
    sample = lambda k: likelihood.sample(k, outputs, batch)
    return jax.vmap(sample, in_axes=1, out_axes=1)(keys)


def drawn_labels(part: Objective, outputs: jax.Array, keys: jax.Array) -> Product:
    """The sampled Fisher matrix in the space of the outputs, from keys [n, S]."""
    likelihood = require_likelihood(part, "The Fisher matrix")
    return given_labels(part, outputs, draw(likelihood, keys, outputs, part.batch))


def given_labels(part: Objective, outputs: jax.Array, labels: jax.Array) -> Product:
    """The sampled Fisher matrix in the space of the outputs, from labels [n, S, ...].

    At each site this is the mean of s sᵀ over the scores s = ∇_z log r(y | z). Its root is
    u ↦ √(w/SΣw) <s, u>, one row for each sample and site.
    """
    likelihood, batch = require_likelihood(part, "The Fisher matrix"), part.batch
    scores = lambda y: likelihood.on_labels(y).scores(outputs, batch)
    s = trees.widen(jax.vmap(scores, in_axes=1)(labels))
    w = likelihood.site_weights(outputs, batch)[None]
    rows = safe_math.root(w / s.shape[0]) * s
    inside = tuple(axis for axis, n in enumerate(w.shape) if axis and n == 1)

    def forward(u: jax.Array) -> jax.Array:
        return jnp.sum(rows * trees.widen(u)[None], axis=inside, keepdims=True)

    def transpose(c: jax.Array) -> jax.Array:
        return jnp.sum(rows * c, axis=0).astype(outputs.dtype)

    root = Root(forward, transpose, jax.eval_shape(forward, outputs))
    return Product(lambda u: transpose(forward(u)), root)


def by_example(labels: jax.Array, shape: tuple[int, ...], where: str) -> jax.Array:
    """Labels [S, n, ...] or [n, ...] as [n, S, ...].

    Args:
        labels: draws.
        shape: of hard targets.
        where: the function that they were passed to, for errors.

    Raises:
        ValueError: they have another shape.
    """
    if labels.shape == shape:
        labels = labels[None]
    if labels.shape[1:] != shape:
        raise ValueError(
            f"`{where}(labels=)` takes labels shaped like hard targets, {list(shape)}, or S of "
            f"them stacked along a new first axis, [S, ...], and received {list(labels.shape)}."
        )
    return jnp.moveaxis(labels, 0, 1)


def _check_draws(samples: int | None, key: jax.Array | None, labels: jax.Array | None) -> None:
    if labels is not None:
        if samples is not None or key is not None:
            raise ValueError(
                "`fvp` takes the draws themselves as `labels`, or makes them with `samples` and "
                "`key`, and received both. Pass either `labels`, or `samples` and `key`."
            )
        return
    if (samples is None) != (key is None):
        raise ValueError(
            "`fvp` draws `samples` labels at each site with `key`, and received only one of the "
            "two. Pass both, as in `fvp(objective, params, samples=1, key=jax.random.key(0))`, or "
            "neither for the exact Fisher matrix."
        )
    if samples is not None:
        checks.check_count("fvp", samples=samples)
        check_key(key, "`fvp(key=)`")
