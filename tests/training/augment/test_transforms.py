"""Crops, flips, mixup, cutout: what they must keep, and naive twins."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.training.augment import transforms

SIZE, CLASSES = 256, 5
KEY = jax.random.key(1)


def make_batch(height=9, width=9, channels=2, size=SIZE):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((size, height, width, channels)), jnp.float32)
    label = jnp.asarray(np.eye(CLASSES)[rng.integers(0, CLASSES, size)], jnp.float32)
    return {"input": image, "label": label}


def ramps(height, width, size=SIZE):
    """Images whose two channels are their own pixel coordinates, y and x."""
    grid = np.stack([*np.mgrid[:height, :width]], -1).astype(np.float32)
    return {"input": jnp.asarray(np.broadcast_to(grid, (size, height, width, 2)))}


def test_a_flip_mirrors_half_of_the_images_and_undoes_itself():
    batch = make_batch()
    flipped = transforms.flip()(KEY, batch)
    mirrored = np.asarray(batch["input"])[:, :, ::-1]
    changed = np.any(flipped["input"] != batch["input"], (1, 2, 3))
    np.testing.assert_array_equal(flipped["input"][changed], mirrored[changed])
    assert abs(changed.sum() - SIZE / 2) < 5 * np.sqrt(SIZE) / 2
    twice = transforms.flip()(KEY, flipped)
    np.testing.assert_array_equal(twice["input"], batch["input"])
    np.testing.assert_array_equal(flipped["label"], batch["label"])


@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_a_shift_crop_is_a_window_of_the_padded_image(mode):
    batch = make_batch(5, 7)
    cropped = np.asarray(transforms.shift_crop(2, mode)(KEY, batch)["input"])
    padded = np.pad(batch["input"], [(0, 0), (2, 2), (2, 2), (0, 0)], mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 7), (1, 2))
    matches = np.all(windows == np.moveaxis(cropped, -1, 1)[:, None, None], (-1, -2, -3))
    assert np.all(matches.any((1, 2)))
    assert np.all(matches.any(0))  # every place occurs


def test_shift_crop_without_padding_changes_nothing():
    batch = make_batch()
    np.testing.assert_array_equal(transforms.shift_crop(0)(KEY, batch)["input"], batch["input"])


def test_a_reflection_beyond_the_image_is_refused():
    with pytest.raises(ValueError, match=r"`pad` 4 for 4×9.*constant"):
        transforms.shift_crop(4)(KEY, make_batch(4, 9))


@pytest.mark.parametrize("size", [3, 4])
def test_cutout_erases_one_square_that_may_hang_over_the_edge(size):
    ones = {"input": jnp.ones((SIZE, 12, 10, 2), jnp.float32)}
    erased = np.asarray(transforms.cutout(size, fill=-1.0)(KEY, ones)["input"]) == -1
    assert np.all(erased[..., 0] == erased[..., 1])
    rows, columns = erased.any((2, 3)), erased.any((1, 3))
    np.testing.assert_array_equal(erased[..., 0], rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):
        np.testing.assert_array_less(np.abs(np.diff(lines.astype(int))).sum(1), 3)  # one stretch
    inside = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
    assert np.all(erased[inside, :, :, 0].sum((1, 2)) == size**2)
    centres = {
        (int(i) + size // 2, int(j) + size // 2) for i, j in first_true(rows, columns, inside)
    }
    assert len(centres) > 20
    assert erased.any((0, 3)).all()


def first_true(rows, columns, chosen):
    return zip(rows[chosen].argmax(1), columns[chosen].argmax(1))


def test_mixup_is_its_equation_for_images_and_labels():
    batch = make_batch()
    mixed = transforms.mixup(probability=1.0, alpha=1.0)(KEY, batch)
    label, neighbour = (np.asarray(x) for x in (batch["label"], jnp.roll(batch["label"], 1, 0)))
    differ = (label * neighbour).sum(1) == 0
    weight = (np.asarray(mixed["label"]) * label).sum(1)[differ]  # λ stands where the own class is
    image, other = (np.asarray(x)[differ] for x in (batch["input"], jnp.roll(batch["input"], 1, 0)))
    twin = weight[:, None, None, None] * image + (1 - weight)[:, None, None, None] * other
    np.testing.assert_allclose(mixed["input"][differ], twin, atol=1e-6)
    np.testing.assert_allclose(mixed["label"].sum(1), 1, atol=1e-6)
    assert weight.min() >= 0.5
    # Beta(1, 1) folded is uniform on [½, 1]; five standard errors
    np.testing.assert_allclose(weight.mean(), 0.75, atol=5 * 0.145 / np.sqrt(len(weight)))


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_mixup_leaves_unselected_images_unchanged(probability):
    batch = make_batch()
    mixed = transforms.mixup(probability, alpha=8.0)(KEY, batch)
    same = np.all(mixed["input"] == batch["input"], (1, 2, 3))
    assert abs(same.sum() - (1 - probability) * SIZE) <= 5 * np.sqrt(SIZE * probability) / 2
    np.testing.assert_array_equal(mixed["label"][same], batch["label"][same])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"probability": 1.5}, r"`probability` in \[0, 1\]"), ({"alpha": 0}, "positive `alpha`")],
)
def test_mixup_refuses_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        transforms.mixup(**options)


def test_mixup_of_integer_labels_is_refused_with_one_hot_as_the_cure():
    batch = make_batch() | {"label": jnp.zeros(SIZE, jnp.int32)}
    with pytest.raises(ValueError, match=r"Place `one_hot\(classes\)` before it"):
        transforms.mixup()(KEY, batch)


def test_an_inception_crop_of_the_whole_image_is_the_image():
    batch = make_batch()
    crop = transforms.inception_crop(9, area=(1.0, 1.0), aspect=(1.0, 1.0))
    np.testing.assert_allclose(crop(KEY, batch)["input"], batch["input"], atol=1e-6)


def test_inception_crop_is_a_resized_box_within_area_and_aspect():
    height, width, size = 40, 60, 6
    batch = ramps(height, width)
    crop = transforms.inception_crop(size, area=(0.2, 0.5), aspect=(0.5, 2.0))
    # A bilinear crop of a ramp is a ramp: pixel i shows the coordinate corner + (i + ½) scale - ½.
    image = np.asarray(crop(KEY, batch)["input"])
    shown = image[:, :, 0, 0], image[:, 0, :, 1]
    boxes = []
    for lines in shown:
        scale = (lines[:, 3] - lines[:, 2])[:, None]
        corner = lines[:, 2:3] - 2.5 * scale + 0.5
        twin = corner + (np.arange(size) + 0.5) * scale - 0.5
        np.testing.assert_allclose(lines[:, 1:-1], twin[:, 1:-1], atol=1e-3)
        boxes += [corner[:, 0], size * scale[:, 0]]
    top, tall, left, wide = boxes
    assert np.all((top > -1e-3) & (top + tall < height + 1e-3))
    assert np.all((left > -1e-3) & (left + wide < width + 1e-3))
    rounding = 0.5 * (tall + wide)  # both sides are rounded to whole pixels
    share = tall * wide
    assert np.all((share > 0.2 * 2400 - rounding) & (share < 0.5 * 2400 + rounding))
    ratio, slack = wide / tall, 0.6 * (1 / tall + wide / tall**2)
    assert np.all((ratio > 0.5 - slack) & (ratio < 2 + slack))
    assert top.std() > 2
    assert (tall * wide).std() > 100


def test_inception_crop_takes_the_whole_image_where_no_box_fits():
    batch = ramps(8, 8, size=4)
    crop = transforms.inception_crop(8, area=(1.0, 1.0), aspect=(3.0, 4.0))
    np.testing.assert_allclose(crop(KEY, batch)["input"], batch["input"], atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"area": (0.5, 0.2)}, {"area": (0.5, 1.5)}, {"aspect": (0.0, 1.0)}]
)
def test_inception_crop_refuses_wrong_ranges(options):
    with pytest.raises(ValueError, match=r"`area` and `aspect` as \(least, greatest\)"):
        transforms.inception_crop(8, **options)


def test_one_hot_smooths_labels():
    batch = {"label": jnp.array([2, 0])}
    label = transforms.one_hot(4, smoothing=0.2)(KEY, batch)["label"]
    np.testing.assert_allclose(
        label, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6
    )
    assert label.dtype == jnp.float32


def test_normalise_acts_on_each_channel():
    batch = make_batch()
    image = transforms.normalise([0.1, 0.2], [0.5, 2.0])(KEY, batch)["input"]
    expected = (np.asarray(batch["input"]) - [0.1, 0.2]) / [0.5, 2.0]
    np.testing.assert_allclose(image, expected, atol=1e-6)
    assert image.dtype == jnp.float32


def test_composed_transforms_run_in_order_with_keys_of_their_own():
    shift = lambda by: lambda key, batch: batch | {"input": 2 * batch["input"] + by}
    both = transforms.compose(shift(1.0), shift(10.0))(KEY, {"input": jnp.ones(3)})
    np.testing.assert_array_equal(both["input"], np.full(3, 16.0))
    flips = transforms.compose(transforms.flip(), transforms.flip())(KEY, make_batch())
    assert np.any(flips["input"] != make_batch()["input"])


def test_every_image_draws_from_its_own_key():
    noise = transforms.per_image(lambda key, image: jax.random.normal(key, image.shape))
    drawn = noise(KEY, make_batch())["input"].reshape(SIZE, -1)
    assert len(np.unique(drawn[:, 0])) == SIZE


@pytest.fixture(scope="module")
def pipeline():
    return transforms.compose(
        transforms.one_hot(CLASSES, 0.1),
        transforms.inception_crop(8),
        transforms.flip(),
        transforms.shift_crop(2),
        transforms.normalise([0.5, 0.5], [0.2, 0.2]),
        transforms.cutout(3),
        transforms.mixup(),
    )


def test_a_pipeline_compiles_once_and_vmaps_over_seeds(pipeline):
    batch = make_batch(size=6) | {"label": jnp.arange(6) % CLASSES, "index": jnp.arange(6)}
    jitted = jax.jit(chex.assert_max_traces(pipeline, n=1))
    once, again = jitted(KEY, batch), jitted(jax.random.key(2), batch)
    assert np.any(once["input"] != again["input"])
    np.testing.assert_array_equal(once["index"], batch["index"])
    assert {name: (x.shape, str(x.dtype)) for name, x in once.items()} == {
        "input": ((6, 8, 8, 2), "float32"),
        "label": ((6, CLASSES), "float32"),
        "index": ((6,), "int64"),
    }
    keys = jnp.stack([KEY, jax.random.key(2)])
    seeds = jax.jit(jax.vmap(pipeline, (0, None)))(keys, batch)
    np.testing.assert_allclose(seeds["input"][1], again["input"], atol=1e-5)
