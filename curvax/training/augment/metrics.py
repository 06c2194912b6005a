"""Scores of a model: (outputs, labels) ↦ a mean over examples, or a number of all of them.

A mask, bool [B], leaves out the padding of the last batch of an evaluation.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Metric = Callable[..., jax.Array]
"""`f(outputs, labels, mask=None)` ↦ scalar, float32 or wider; a mean over the examples."""
Ranking = Callable[[np.ndarray, np.ndarray], float]
"""`f(outputs, labels)` ↦ a number that is no mean over examples: it needs all of them at once."""


def weighted_mean(values: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The weighted mean Σ wᵢ xᵢ / Σ wᵢ, in float32 or wider; 0 if all weights are 0.

    Args:
        values: [B, ...], first averaged over further axes.
        weights: [B], for instance a mask; equal by default.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if weights is None:
        return jnp.mean(values)
    values = jnp.mean(values, axis=range(1, values.ndim))
    weights = weights.astype(values.dtype)
    total = jnp.sum(weights)
    kept = jnp.where(weights == 0, 0, values)  # a masked NaN has no effect
    return jnp.sum(weights * kept) / jnp.where(total == 0, 1, total)


def top_k(k: int) -> Metric:
    """The share of examples whose label is among the k highest logits.

    Ties count against the label, and a NaN ranks above all numbers, so that a constant or broken
    model scores 0.

    Args:
        k: from 1 to one less than the number of classes.

    Returns:
        A metric of logits [..., classes] and labels, integers [...] or rows [..., classes] whose
        highest entry is the label.

    Raises:
        ValueError: k is out of range.
    """

    def share(logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        if not 0 < k < logits.shape[-1]:
            raise ValueError(
                f"`top_k` takes k from 1 to one less than the {logits.shape[-1]} classes, and got "
                f"{k}. Leave top-{k} out for so few classes."
            )
        hard = labels.ndim < logits.ndim
        targets = labels if hard else jnp.argmax(labels, axis=-1)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        ahead = jnp.sum(~(logits < own), axis=-1) - 1
        return weighted_mean(ahead < k, mask)

    return share


top1, top5 = top_k(1), top_k(5)


def click_accuracy(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """The share of yes-or-no labels, 1 or 0, that the sign of the logit predicts.

    A logit that is 0 or NaN counts as wrong.
    """
    return weighted_mean(logits * (2 * labels - 1) > 0, mask)


def area_under_curve(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve: the share of pairs of a 1 and a 0 in which the 1 is higher.

        AUC = (Σ ranks of the ones - P (P + 1) / 2) / (P N)

    The statistic of Mann and Whitney (1947) with mean ranks: an equal pair counts one half.

    Args:
        outputs: a number for each label, in any increasing scale.
        labels: P ones and N zeros, in the shape of the outputs.

    Returns:
        A number in [0, 1]; NaN if an output is NaN or all labels are equal.
    """
    one = labels.ravel() > 0.5
    pairs = int(one.sum()) * int((~one).sum())
    if not pairs or np.isnan(outputs).any():
        return math.nan
    _, place, counts = np.unique(outputs.ravel(), return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    return float((rank[place[one]].sum() - one.sum() * (one.sum() + 1) / 2) / pairs)


def squared_error(
    outputs: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """The mean over examples of ‖z - y‖²."""
    square = jnp.square(outputs - labels)
    return weighted_mean(jnp.sum(square, axis=range(1, square.ndim)), mask)


def pixel_error(
    logits: jax.Array, pixels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """The mean over images of ‖sigmoid(z) - x‖², for pixels x in [0, 1].

    The score of the autoencoder in Martens, ICML 2010, and in kfac-jax's example.
    """
    return squared_error(jax.nn.sigmoid(logits), pixels, mask=mask)
