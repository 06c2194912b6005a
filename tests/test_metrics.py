"""Losses and scores against their formulas in NumPy, with and without a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.training import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (40, 7))
LABELS = RNG.integers(0, 7, 40)
ROWS = RNG.dirichlet(np.ones(7), 40)
MASK = np.arange(40) < 29

METRICS = [metrics.softmax_cross_entropy, metrics.sigmoid_cross_entropy, metrics.top1, metrics.top5]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_softmax_cross_entropy_is_its_formula():
    soft = metrics.softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(ROWS))
    np.testing.assert_allclose(soft, -(ROWS * log_softmax(LOGITS)).sum(-1).mean(), rtol=1e-12)
    hard = metrics.softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    expected = -log_softmax(LOGITS)[np.arange(40), LABELS].mean()
    np.testing.assert_allclose(hard, expected, rtol=1e-12)


def test_sigmoid_cross_entropy_is_a_sum_over_classes():
    p = 1 / (1 + np.exp(-LOGITS))
    expected = -(ROWS * np.log(p) + (1 - ROWS) * np.log(1 - p)).sum(-1).mean()
    loss = metrics.sigmoid_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(ROWS))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_a_head_that_knows_nothing_pays_the_logarithm_of_the_classes():
    logits, labels = jnp.zeros((3, 10)), jnp.arange(3)
    np.testing.assert_allclose(metrics.softmax_cross_entropy(logits, labels), np.log(10))
    np.testing.assert_allclose(metrics.sigmoid_cross_entropy(logits, labels), 10 * np.log(2))


def test_the_gradients_are_probability_minus_label():
    logits, rows = jnp.asarray(LOGITS), jnp.asarray(ROWS)
    softmax = jax.grad(metrics.softmax_cross_entropy)(logits, rows)
    np.testing.assert_allclose(softmax, (np.exp(log_softmax(LOGITS)) - ROWS) / 40, atol=1e-14)
    sigmoid = jax.grad(metrics.sigmoid_cross_entropy)(logits, rows)
    np.testing.assert_allclose(sigmoid, (1 / (1 + np.exp(-LOGITS)) - ROWS) / 40, atol=1e-14)


def test_smoothing_keeps_the_mass_and_lifts_every_class():
    smoothed = metrics.smooth(jnp.array([[0.0, 1.0, 0.0, 0.0]]), 0.1)
    np.testing.assert_allclose(smoothed, [[0.025, 0.925, 0.025, 0.025]], rtol=1e-15)
    np.testing.assert_array_equal(metrics.smooth(jnp.asarray(ROWS), 0.0), ROWS)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_a_place_among_the_sorted(k):
    highest = np.argsort(-LOGITS, -1)[:, :k]
    expected = (highest == LABELS[:, None]).any(-1).mean()
    score = metrics.top_k(k)(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    rows = jax.nn.one_hot(LABELS, 7)
    np.testing.assert_array_equal(metrics.top_k(k)(jnp.asarray(LOGITS), rows), score)


def test_ties_and_nans_score_nothing():
    labels = jnp.arange(4)
    assert metrics.top1(jnp.zeros((4, 6)), labels) == 0
    assert metrics.top5(jnp.full((4, 6), jnp.nan), labels) == 0
    one_nan = jnp.eye(6)[:4].at[:, 5].set(jnp.nan)
    assert metrics.top1(one_nan, labels) == 0
    assert metrics.top_k(2)(one_nan, labels) == 1


@pytest.mark.parametrize("metric", METRICS)
def test_a_mask_leaves_examples_out_whatever_they_hold(metric):
    logits = jnp.where(jnp.asarray(MASK)[:, None], jnp.asarray(LOGITS), jnp.nan)
    masked = metric(logits, jnp.asarray(LABELS), mask=jnp.asarray(MASK))
    expected = metric(jnp.asarray(LOGITS[MASK]), jnp.asarray(LABELS[MASK]))
    np.testing.assert_allclose(masked, expected, rtol=1e-6)
    assert metric(logits, jnp.asarray(LABELS), mask=jnp.zeros(40, bool)) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_means_of_batches_weighted_by_their_size_are_the_mean_of_all(metric):
    logits, labels, mask = (x.reshape(5, 8, *x.shape[1:]) for x in (LOGITS, LABELS, MASK))
    means = jax.vmap(lambda z, y, m: metric(z, y, mask=m))(logits, labels, mask)
    mean = metrics.weighted_mean(means, jnp.asarray(mask.sum(1)))
    whole = metric(jnp.asarray(LOGITS), jnp.asarray(LABELS), mask=jnp.asarray(MASK))
    np.testing.assert_allclose(mean, whole, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_bfloat16_logits_are_reduced_in_float32(metric):
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    score = metric(logits, jnp.asarray(LABELS, jnp.int32))
    assert score.dtype == jnp.float32
    expected = metric(logits.astype(jnp.float32), jnp.asarray(LABELS))
    np.testing.assert_array_equal(score, expected)


@pytest.mark.parametrize("loss", METRICS[:2])
@pytest.mark.parametrize("labels", [np.zeros((40, 1), int), np.zeros(39, int), np.zeros(40)])
def test_labels_that_do_not_fit_the_logits_are_refused(loss, labels):
    with pytest.raises(ValueError, match=r"integers of shape \(40,\) or rows of shape \(40, 7\)"):
        loss(jnp.asarray(LOGITS), jnp.asarray(labels))


@pytest.mark.parametrize("k", [0, 7])
def test_a_top_k_that_is_always_right_is_refused(k):
    with pytest.raises(ValueError, match=f"less than the 7 classes, and got {k}"):
        metrics.top_k(k)(jnp.asarray(LOGITS), jnp.asarray(LABELS))
