"""Scores against their formulas in NumPy, with and without a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.training.augment import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (40, 7))
LABELS = RNG.integers(0, 7, 40)
ROWS = RNG.dirichlet(np.ones(7), 40)
MASK = np.arange(40) < 29

METRICS = [(metrics.top1, LABELS), (metrics.top5, LABELS), (metrics.squared_error, ROWS)]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_counts_labels_among_the_k_largest_logits(k):
    highest = np.argsort(-LOGITS, -1)[:, :k]
    expected = (highest == LABELS[:, None]).any(-1).mean()
    score = metrics.top_k(k)(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    rows = jax.nn.one_hot(LABELS, 7)
    np.testing.assert_array_equal(metrics.top_k(k)(jnp.asarray(LOGITS), rows), score)


def test_ties_and_nans_score_zero():
    labels = jnp.arange(4)
    assert metrics.top1(jnp.zeros((4, 6)), labels) == 0
    assert metrics.top5(jnp.full((4, 6), jnp.nan), labels) == 0
    one_nan = jnp.eye(6)[:4].at[:, 5].set(jnp.nan)
    assert metrics.top1(one_nan, labels) == 0
    assert metrics.top_k(2)(one_nan, labels) == 1


def test_squared_errors_sum_over_outputs():
    error = metrics.squared_error(jnp.asarray(LOGITS), jnp.asarray(ROWS))
    np.testing.assert_allclose(error, ((LOGITS - ROWS) ** 2).sum(-1).mean(), rtol=1e-12)
    pixels = metrics.pixel_error(jnp.asarray(LOGITS), jnp.asarray(ROWS))
    p = 1 / (1 + np.exp(-LOGITS))
    np.testing.assert_allclose(pixels, ((p - ROWS) ** 2).sum(-1).mean(), rtol=1e-12)


def test_tokens_are_averaged_within_their_example():
    logits, labels = LOGITS.reshape(8, 5, 7), LABELS.reshape(8, 5)
    mask = np.arange(8) < 3
    hits = (logits.argmax(-1) == labels)[:3].mean()
    score = metrics.top1(jnp.asarray(logits), jnp.asarray(labels), mask=jnp.asarray(mask))
    np.testing.assert_allclose(score, hits, rtol=1e-6)


@pytest.mark.parametrize(("metric", "labels"), METRICS)
def test_masked_examples_do_not_count_even_if_nan(metric, labels):
    logits = jnp.where(jnp.asarray(MASK)[:, None], jnp.asarray(LOGITS), jnp.nan)
    masked = metric(logits, jnp.asarray(labels), mask=jnp.asarray(MASK))
    expected = metric(jnp.asarray(LOGITS[MASK]), jnp.asarray(labels[MASK]))
    np.testing.assert_allclose(masked, expected, rtol=1e-6)
    assert metric(logits, jnp.asarray(labels), mask=jnp.zeros(40, bool)) == 0


@pytest.mark.parametrize(("metric", "labels"), METRICS)
def test_weighted_mean_over_batches_is_the_mean_of_all(metric, labels):
    parts = [x.reshape(5, 8, *x.shape[1:]) for x in (LOGITS, labels, MASK)]
    means = jax.vmap(lambda z, y, m: metric(z, y, mask=m))(*parts)
    mean = metrics.weighted_mean(means, jnp.asarray(parts[2].sum(1)))
    whole = metric(jnp.asarray(LOGITS), jnp.asarray(labels), mask=jnp.asarray(MASK))
    np.testing.assert_allclose(mean, whole, rtol=1e-6)


@pytest.mark.parametrize(("metric", "labels"), METRICS)
def test_bfloat16_outputs_are_reduced_in_float32(metric, labels):
    outputs, labels = jnp.asarray(LOGITS, jnp.bfloat16), jnp.asarray(labels, jnp.float32)
    labels = labels if labels.ndim > 1 else labels.astype(jnp.int32)
    score = metric(outputs, labels)
    assert score.dtype == jnp.float32
    expected = metric(outputs.astype(jnp.float32), labels)
    np.testing.assert_array_equal(score, expected)


@pytest.mark.parametrize("k", [0, 7])
def test_top_k_of_all_classes_is_refused(k):
    with pytest.raises(ValueError, match=f"less than the 7 classes, and got {k}"):
        metrics.top_k(k)(jnp.asarray(LOGITS), jnp.asarray(LABELS))
