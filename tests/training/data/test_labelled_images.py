"""Label noise, normalisation and the check of labelled images."""

import numpy as np
import pytest
from image_archives import make_images

from curvax.training.data import datasets
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Split
from curvax.training.data.labelled_images import checked, flip_labels, moments, normalise

# Label noise


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 1.0])
def test_label_noise_flips_the_exact_fraction_to_wrong_labels(rate):
    labels = np.arange(1000, dtype=np.int32) % 10
    noisy = flip_labels(labels, rate, 10, seed=3)
    assert (noisy != labels).sum() == rate * 1000
    assert noisy.dtype == np.int32
    np.testing.assert_array_equal(noisy, flip_labels(labels, rate, 10, seed=3))


def test_label_noise_is_uniform_over_the_other_classes_or_over_all():
    labels = np.full(100_000, 2, np.int32)
    others = np.bincount(flip_labels(labels, 0.5, 5, seed=0), minlength=5)
    assert others[2] == 50_000
    # five standard deviations of a binomial of 50 000 draws
    np.testing.assert_allclose(np.delete(others, 2), 12_500, atol=5 * 97)
    every = np.bincount(flip_labels(labels, 0.5, 5, seed=0, any_class=True), minlength=5)
    np.testing.assert_allclose(np.delete(every, 2), 10_000, atol=5 * 90)
    np.testing.assert_allclose(every[2], 60_000, atol=5 * 90)


def test_label_noise_at_a_lower_rate_is_contained_in_that_at_a_higher():
    labels = np.arange(500, dtype=np.int32) % 10
    low, high = (flip_labels(labels, rate, 10, seed=1) for rate in (0.2, 0.6))
    flipped = low != labels
    np.testing.assert_array_equal(high[flipped], low[flipped])
    assert not np.array_equal(low, flip_labels(labels, 0.2, 10, seed=2))


@pytest.mark.parametrize(("rate", "classes"), [(40, 10), (-0.1, 10), (0.4, 1)])
def test_label_noise_out_of_range_is_refused(rate, classes):
    with pytest.raises(DataError, match=r"rate in \[0, 1\]"):
        flip_labels(np.zeros(4, np.int32), rate, classes, seed=0)


def test_normalised_images_have_mean_zero_and_deviation_one():
    images = make_images(9000, 2, 2, 3)  # more than one chunk
    images[..., 2] = 7
    mean, std = moments(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-6)
    np.testing.assert_allclose(std[:2], images[..., :2].std((0, 1, 2)) / 255, rtol=1e-5)
    scaled = normalise(datasets.numbers(images), mean, std)
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 1, 2)), [1, 1, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((6, 1), np.int32), r"int32 of shape \[6, 1\].*labels.ravel"),
        (np.zeros((6, 10), np.float32), r"argmax"),
        (np.zeros(5, np.int32), r"here of shape \[6\].*\[5\]"),
    ],
)
def test_labels_of_a_wrong_shape_are_refused(labels, words):
    with pytest.raises(DataError, match=words):
        checked(Split(make_images(6, 2, 2, 1), labels), "mine")


def test_images_without_channels_are_refused():
    with pytest.raises(DataError, match=r"uint8 of shape \[6, 2, 2\].*last axis of 1"):
        checked(Split(make_images(6, 2, 2), np.zeros(6, np.int32)), "mine")
