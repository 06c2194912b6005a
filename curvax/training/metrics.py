"""Losses and scores of a classifier: logits [B, classes] and labels ↦ a mean over examples.

Labels are integers [B] or rows [B, classes] that sum to 1. A mask, bool [B], leaves out the copies
that fill up the last batch of a test.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Metric = Callable[..., jax.Array]


def weighted_mean(values: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Σ wᵢ xᵢ / Σ wᵢ in float32, and 0 where all weights are 0.

    With a mask as weights it is the mean of a batch; of the means of batches, weighted by how many
    examples each had, the mean of all.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if weights is None:
        return jnp.mean(values)
    weights = weights.astype(values.dtype)
    total = jnp.sum(weights)
    kept = jnp.where(weights == 0, 0, values)  # a masked NaN must not count
    return jnp.sum(weights * kept) / jnp.where(total == 0, 1, total)


def smooth(labels: jax.Array, smoothing: float) -> jax.Array:
    """Smoothed rows [B, K]: (1 - ε) y + ε / K. Szegedy et al., arXiv:1512.00567, section 7."""
    return (1 - smoothing) * labels + smoothing / labels.shape[-1]


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """-Σₖ yₖ log softmax(z)ₖ, averaged over examples."""
    targets = _rows(logits, labels)
    return weighted_mean(optax.softmax_cross_entropy(_wide(logits), targets), mask)


def sigmoid_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """-Σₖ [yₖ log σ(zₖ) + (1 - yₖ) log(1 - σ(zₖ))], averaged over examples.

    One binary problem for each class, *summed* over classes: Beyer et al., arXiv:2006.07159, and
    the loss of GSAM's ViTs, whose head starts with the bias -10.
    """
    targets = _rows(logits, labels)
    losses = jnp.sum(optax.sigmoid_binary_cross_entropy(_wide(logits), targets), axis=-1)
    return weighted_mean(losses, mask)


def top_k(k: int) -> Metric:
    """The metric (logits, labels, mask=None) ↦ the share whose label is among the k highest logits.

    A row label stands for its highest class. A label tied with others counts as ranked behind
    them, and a logit that is NaN ranks before all: a constant or broken model scores 0.

    Raises:
        ValueError: k is not in 1 … classes - 1, where every answer would be right.
    """

    def share(logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        if not 0 < k < logits.shape[-1]:
            raise ValueError(
                f"`top_k` takes k from 1 to one less than the {logits.shape[-1]} classes, and got "
                f"{k}. Leave top-{k} out for so few classes."
            )
        targets = labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1)
        own = jnp.take_along_axis(logits, targets[:, None], axis=-1)
        ahead = jnp.sum(~(logits < own), axis=-1) - 1
        return weighted_mean(ahead < k, mask)

    return share


top1, top5 = top_k(1), top_k(5)


def _rows(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Labels as rows [B, classes] of the logits' dtype, at least float32.

    Raises:
        ValueError: their shape is neither [B] nor that of the logits.
    """
    if labels.shape == logits.shape:
        return _wide(labels)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"Labels are integers of shape {logits.shape[:-1]} or rows of shape {logits.shape}, "
            f"as the logits, and got {labels.dtype} of shape {labels.shape}."
        )
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=_wide(logits).dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
