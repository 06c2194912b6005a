"""Corruptions of images against their definitions, and the order of their strengths."""

import numpy as np
import pytest
from scipy.ndimage import convolve1d

from curvax.training.data.datasets import numbers
from curvax.training.data.labelled_images import load
from curvax.training.evaluation import corruptions
from curvax.training.evaluation.corruptions import CORRUPTIONS, STRENGTHS, corrupt


def make_images(side=32, channels=3, count=4):
    return np.random.default_rng(side).uniform(0.2, 0.8, (count, side, side, channels))


def distance(images, name, strength):
    return np.abs(corrupt(images, name, strength) - images).mean()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (28, 1), (20, 1), (16, 3), (8, 1)])
def test_stronger_corruption_is_further_from_the_image(name, side, channels):
    images = make_images(side, channels)
    distances = [distance(images, name, strength) for strength in STRENGTHS]
    assert distances == sorted(distances)
    assert len(set(distances)) == 5
    worse = corrupt(images, name, 5)
    assert worse.shape == images.shape
    assert worse.dtype == np.float32
    assert worse.min() >= 0
    assert worse.max() <= 1
    np.testing.assert_array_equal(worse, corrupt(images, name, 5))


def test_bytes_are_corrupted_like_floats():
    images = (255 * make_images()).astype(np.uint8)
    np.testing.assert_allclose(
        corrupt(images, "contrast", 2), corrupt(images / 255, "contrast", 2), atol=1e-6
    )


def test_gaussian_noise_has_its_deviation():
    images = np.full((8, 32, 32, 3), 0.5)
    noise = corrupt(images, "gaussian_noise", 3) - images
    assert noise.std() == pytest.approx(0.08, rel=0.02)  # of 24 576 draws: 0.5 %
    assert abs(noise.mean()) < 0.003


def test_gaussian_blur_is_the_convolution_with_its_gaussian():
    images = make_images(32, 1)
    place = np.arange(-4, 5)
    kernel = np.exp(-(place**2) / 2)
    for axis in (1, 2):
        images = convolve1d(images, kernel / kernel.sum(), axis, mode="nearest")
    blurred = corruptions.gaussian_blur(make_images(32, 1), 1.0)
    np.testing.assert_allclose(blurred, images, atol=1e-12)


@pytest.mark.parametrize(("side", "deviation"), [(65, 65 / 32), (15, 1.0)])
def test_gaussian_blur_scales_with_the_side_of_large_images(side, deviation):
    point = np.zeros((1, side, side, 1))
    point[0, side // 2, side // 2] = 1
    spread = corruptions.gaussian_blur(point, 1.0)[0, :, :, 0].sum(0)
    place = np.arange(side) - side // 2
    assert np.sum(spread * place**2) == pytest.approx(deviation**2, rel=0.01)


def test_corruptions_show_on_the_smallest_images():
    """The 8×8 digits, and in order on them as they are."""
    images = load("digits").test.inputs
    for name in CORRUPTIONS:
        distances = [distance(numbers(images), name, strength) for strength in STRENGTHS]
        assert distances == sorted(set(distances))
        assert distances[0] > 0.01


def test_contrast_keeps_the_mean_and_scales_the_deviation():
    images = make_images()
    flat = corrupt(images, "contrast", 5)
    np.testing.assert_allclose(flat.mean((1, 2)), images.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(flat.std((1, 2)), 0.15 * images.std((1, 2)), rtol=1e-5)


def test_pixelate_makes_blocks_of_means():
    images = make_images(32)
    blocks = corruptions.pixelate(images, 0.5)
    means = images.reshape(4, 16, 2, 16, 2, 3).mean((2, 4))
    np.testing.assert_allclose(blocks, means.repeat(2, 1).repeat(2, 2), atol=1e-6)
