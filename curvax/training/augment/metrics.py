"""Scores of a model: outputs and labels ↦ a mean over examples.

A mask, bool [B], leaves out the copies that fill up the last batch of a test.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Metric = Callable[..., jax.Array]
"""`f(outputs, labels, mask=None)` ↦ a scalar, float32 or wider."""


def weighted_mean(values: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Σ wᵢ xᵢ / Σ wᵢ of values [B, ...] in float32 or wider, and 0 where all weights are 0.

    Values with further axes are averaged over those first. With a mask [B] as weights it is the
    mean of a batch; of the means of batches, weighted by how many examples each had, the mean of
    all.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if weights is None:
        return jnp.mean(values)
    values = jnp.mean(values, axis=range(1, values.ndim))
    weights = weights.astype(values.dtype)
    total = jnp.sum(weights)
    kept = jnp.where(weights == 0, 0, values)  # a masked NaN must not count
    return jnp.sum(weights * kept) / jnp.where(total == 0, 1, total)


def smooth(labels: jax.Array, smoothing: float) -> jax.Array:
    """Smoothed rows [B, K]: (1 - ε) y + ε / K. Szegedy et al., arXiv:1512.00567, section 7."""
    return (1 - smoothing) * labels + smoothing / labels.shape[-1]


def top_k(k: int) -> Metric:
    """The metric (logits, labels, mask=None) ↦ the share whose label is among the k highest logits.

    Logits are [..., classes], labels integers [...] or rows shaped like the logits, which stand for
    their highest class. A label tied with others counts as ranked behind them, and a logit that is
    NaN ranks before all: a constant or broken model scores 0.

    Raises:
        ValueError: k is not in 1 … classes - 1, where every answer would be right.
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


def squared_error(
    outputs: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """‖z - y‖², averaged over examples."""
    square = jnp.square(outputs - labels)
    return weighted_mean(jnp.sum(square, axis=range(1, square.ndim)), mask)


def pixel_error(
    logits: jax.Array, pixels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """‖sigmoid(z) - x‖² of pixels in [0, 1], averaged over images.

    What Martens, ICML 2010, and kfac-jax's example report of the autoencoder.
    """
    return squared_error(jax.nn.sigmoid(logits), pixels, mask=mask)
