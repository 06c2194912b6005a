"""Scores against their formulas in NumPy, with and without a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from curvax.training.augment import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (40, 7))
LABELS = RNG.integers(0, 7, 40)
ROWS = RNG.dirichlet(np.ones(7), 40)
MASK = np.arange(40) < 29

ONES = (LABELS > 3).astype(float)[:, None] * np.ones((1, 7))

METRICS = [
    (metrics.top1, LABELS),
    (metrics.top5, LABELS),
    (metrics.squared_error, ROWS),
    (metrics.click_accuracy, ONES),
]


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


def test_click_accuracy_counts_signs_and_no_ties_or_nans():
    logits = jnp.array([2.0, -1.0, 3.0, -4.0, 0.0, 0.0, jnp.nan, jnp.nan])[:, None]
    labels = jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])[:, None]
    assert metrics.click_accuracy(logits, labels) == 2 / 8


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_area_under_curve_is_the_share_of_ordered_pairs(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (60, 1)) / 7
    labels = (rng.random((60, 1)) < 0.3).astype(np.float32)
    ones, zeros = scores[labels == 1], scores[labels == 0]
    wins = [(one > zero) + 0.5 * (one == zero) for one in ones for zero in zeros]
    found = metrics.area_under_curve(scores, labels)
    assert found == pytest.approx(np.mean(wins), abs=1e-12)
    assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.area_under_curve(np.exp(scores), labels) == pytest.approx(found)
    assert metrics.area_under_curve(-scores, labels) == pytest.approx(1 - found)


def test_area_under_curve_of_one_class_or_of_nans_is_nan():
    scores, labels = np.arange(4.0)[:, None], np.array([[0.0], [1.0], [0.0], [1.0]])
    assert metrics.area_under_curve(scores, labels) == 0.75
    assert np.isnan(metrics.area_under_curve(scores, 0 * labels))
    assert np.isnan(metrics.area_under_curve(scores, 0 * labels + 1))
    assert np.isnan(metrics.area_under_curve(np.where(scores == 2, np.nan, scores), labels))
