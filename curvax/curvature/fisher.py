"""A likelihood of a model's outputs and a point ↦ the Fisher product v ↦ F v, exact or sampled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import check_mode
from curvax.curvature.gauss_newton import Metric, linearized_product, loss_curvature
from curvax.curvature.linearization import LossAndGradient
from curvax.likelihoods import Likelihood
from curvax.linear_operator import Product, Root
from curvax.objective import Objective, as_objective, check_key, require_likelihood


def fvp(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    samples: int | None = None,
    key: jax.Array | None = None,
    labels: jax.Array | None = None,
    mode: str = "auto",
    precision: Any = "highest",
) -> Product:
    """The product with the Fisher matrix of the model's distribution at `params`.

        F v = Σᵢ wᵢ E_y[g gᵀ] v / Σᵢ wᵢ,   g = ∇_θ log r(y | zᵢ),   y ~ r(· | zᵢ)

    Exact by default, Jᵀ Cov(y) J, which for these likelihoods is the Gauss-Newton matrix. With
    `samples` or `labels` the expectation is a mean over labels. Linearised once and local to the
    device, as `ggnvp`. Martens, arXiv:1412.1193, eq. 3.

    Args:
        objective: an `Objective` with `model=` and a likelihood as its loss.
        params: the point θ.
        samples: S, labels drawn for each site, the same at each application, on any number of
            devices and with any `microbatch`.
        key: typed, of those draws.
        labels: the draws themselves, [S, ...] or one [...], where [...] is the shape of hard
            targets.
        mode: of J v, as in `ggnvp`.
        precision: of the matrix products (`jax.default_matmul_precision`).

    Returns:
        A linear map on trees like `params`. Without micro-batches it knows its root: that of
        `ggnvp`, or for labels R v = √(w/SΣw) <g, v>, [S, *sites, 1, ...].

    Raises:
        ValueError: the loss is no likelihood, an unknown mode, or options that contradict.
        TypeError: `key` is no typed key, or JAX does not differentiate the model in the mode that
            was asked for.
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
    precision: Any = "highest",
) -> tuple[LossAndGradient, Product]:
    """(((L, aux), ∇L), `fvp`) from one linearisation; `key` is read where there are `samples`."""
    gradient, product = _linearized(objective, params, mode, precision, samples, key)
    return gradient(), product


def _linearized(
    objective: Objective,
    params: Tree,
    mode: str,
    precision: Any,
    samples: int | None,
    key: jax.Array | None,
    labels: jax.Array | None = None,
) -> tuple[Callable[[], LossAndGradient], Product]:
    check_mode(mode)
    likelihood = require_likelihood(objective, "The Fisher matrix")
    metric: Metric = loss_curvature
    beside: tuple[jax.Array, ...] = ()
    if labels is not None:
        shape = likelihood.label_shape(objective.batch)
        metric, beside = given_labels, (_by_example(jnp.asarray(labels), shape),)
    elif samples is not None and key is not None:
        metric, beside = drawn_labels, (sample_keys(objective, key, samples),)
    return linearized_product(objective, params, metric, *beside, mode=mode, precision=precision)


def sample_keys(objective: Objective, key: jax.Array, samples: int) -> jax.Array:
    """Keys of S draws for each example, [n, S], by the example's number in the global batch."""
    return jax.vmap(lambda k: jax.random.split(k, samples))(objective.example_keys(key))


def draw(likelihood: Likelihood, keys: jax.Array, outputs: jax.Array, batch: Tree) -> jax.Array:
    """S labels for each site by keys [n, S]: labels [n, S, ...]."""
    sample = lambda k: likelihood.sample(k, outputs, batch)
    return jax.vmap(sample, in_axes=1, out_axes=1)(keys)


def drawn_labels(part: Objective, outputs: jax.Array, keys: jax.Array) -> Product:
    """The sampled Fisher in the outputs, from keys [n, S]."""
    likelihood = require_likelihood(part, "The Fisher matrix")
    return given_labels(part, outputs, draw(likelihood, keys, outputs, part.batch))


def given_labels(part: Objective, outputs: jax.Array, labels: jax.Array) -> Product:
    """The sampled Fisher in the outputs, from labels [n, S, ...]: the mean of s sᵀ at each site.

    Its root is u ↦ √(w/SΣw) <s, u>, one row for each sample and site.
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


def _by_example(labels: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Labels [S, n, ...] or [n, ...] as [n, S, ...].

    Raises:
        ValueError: they have another shape.
    """
    if labels.shape == shape:
        labels = labels[None]
    if labels.shape[1:] != shape:
        raise ValueError(
            f"`fvp(labels=)` takes labels shaped like hard targets, {list(shape)}, or several such "
            f"along a new first axis, [S, ...], and got {list(labels.shape)}."
        )
    return jnp.moveaxis(labels, 0, 1)


def _check_draws(samples: Any, key: Any, labels: Any) -> None:
    if labels is not None:
        if samples is not None or key is not None:
            raise ValueError(
                "`fvp(labels=)` is given the draws, and `samples` and `key` make them. Pass "
                "either `labels`, or `samples` and `key`."
            )
        return
    if (samples is None) != (key is None):
        raise ValueError(
            "`fvp` draws `samples` labels for each site with `key`, and was given one of the two. "
            "Pass both, as in `fvp(objective, params, samples=1, key=jax.random.key(0))`; without "
            "either the Fisher matrix is exact."
        )
    if samples is not None:
        checks.check_count("fvp", samples=samples)
        check_key(key, "`fvp(key=)`")
