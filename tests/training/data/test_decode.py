"""Decoding of images to squares of bytes: central and random crops, modes, damaged files."""

import io

import numpy as np
import photographs
import pytest
from PIL import Image

from curvax.training.data import decode
from curvax.training.data.archives import DataError


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def ramp(height, width):
    """An image whose red grows by one a column, and whose green by one a row."""
    down, across = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([across, down, np.zeros_like(down)], axis=-1)


def read_box(pixels):
    """(left, top, right, bottom) of the part of a ramp that a resized piece shows."""
    pixels = pixels.astype(float)
    side = len(pixels)
    inner = slice(2, -2)  # the filter folds at the edges
    edges = []
    for channel, axis in ((0, 0), (1, 1)):
        line = pixels[..., channel].mean(axis)
        slope, start = np.polyfit(np.arange(side)[inner] + 0.5, line[inner] + 0.5, 1)
        edges.append((start, start + slope * side))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def test_central_crop_shows_the_middle_square():
    left, top, right, bottom = read_box(decode.central_crop(png(ramp(160, 240)), 70))
    np.testing.assert_allclose(
        [left, top, right, bottom], [120 - 70, 80 - 70, 120 + 70, 80 + 70], atol=0.6
    )  # 160 · 224/256 = 140, to a bytes' rounding


def test_central_crop_agrees_with_resize_then_crop():
    image = photographs.photographs()["temple"]
    short = image.resize((round(256 * image.width / image.height), 256), Image.Resampling.BILINEAR)
    left = (short.width - 224) // 2
    expected = np.asarray(short.crop((left, 16, left + 224, 240)), float)
    found = decode.central_crop(png(np.asarray(image)), 224).astype(float)
    assert np.abs(found - expected).mean() < 3  # half a pixel of rounding in the long side


def test_central_crop_of_an_image_of_its_size_is_the_image():
    pixels = ramp(32, 32)
    np.testing.assert_array_equal(decode.central_crop(png(pixels), 32), pixels)


def test_random_crops_lie_inside_with_their_areas_and_aspects():
    height, width = 150, 240
    content = png(ramp(height, width))
    areas, aspects = [], []
    for seed in range(120):
        pixels = decode.random_crop(content, 24, (0.3, 0.6), np.random.default_rng(seed))
        assert pixels[0, 0, 0] < pixels[0, -1, 0]  # as it is, not mirrored
        left, top, right, bottom = read_box(pixels)
        assert min(left, top) > -1.5
        assert right < width + 1.5
        assert bottom < height + 1.5
        areas.append((right - left) * (bottom - top) / (height * width))
        aspects.append((right - left) / (bottom - top))
    assert 0.28 < min(areas) < 0.33
    assert 0.57 < max(areas) < 0.62
    assert 0.72 < min(aspects) < 0.85
    assert 1.2 < max(aspects) < 1.37


def test_random_crop_is_determined_by_its_generator():
    content = png(ramp(90, 90))
    crop = lambda seed: decode.random_crop(content, 16, (0.05, 1.0), np.random.default_rng(seed))
    np.testing.assert_array_equal(crop(3), crop(3))
    assert not np.array_equal(crop(3), crop(4))


def test_random_crop_takes_the_whole_image_where_no_box_fits():
    pixels = decode.random_crop(png(ramp(16, 250)), 16, (0.9, 1.0), np.random.default_rng(0))
    left, _, right, _ = read_box(pixels)
    np.testing.assert_allclose([left, right], [0, 250], atol=4)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P"])
def test_grey_cmyk_and_palette_images_become_rgb(mode):
    image = photographs.photographs()["bloom"].crop((0, 0, 80, 60)).convert(mode)
    content = io.BytesIO()
    image.save(content, "PNG" if mode == "P" else "JPEG")
    found = decode.central_crop(content.getvalue(), 24)
    assert found.shape == (24, 24, 3)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: b"not a picture", "Pillow does not know its format"),
        (lambda content: b"", "Pillow does not know its format"),
    ],
)
def test_damaged_images_are_refused(spoil, words):
    content = spoil(photographs.jpeg(photographs.photographs()["bloom"]))
    with pytest.raises(DataError, match=f"cannot be decoded: .*{words}"):
        decode.check(content)
    with pytest.raises(DataError, match=words):
        decode.central_crop(content, 24)


def test_wrong_area_is_not_reported_as_a_damaged_image():
    with pytest.raises(ValueError) as error:
        decode.random_crop(png(ramp(9, 9)), 4, (1.0, 0.1), np.random.default_rng(0))
    assert not isinstance(error.value, DataError)
