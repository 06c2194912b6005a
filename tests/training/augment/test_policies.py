"""Image operations against Pillow, and the policies against the arguments of the authors' code."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from curvax.training.augment import image_ops as ops
from curvax.training.augment import policies

KEY = jax.random.key(0)
GREY = (128, 128, 128)


def make_bytes(height=20, width=26, seed=0):
    """A smooth image with some noise, whose histogram has gaps at both ends."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10
    waves = np.stack([np.sin(2 * x + y), np.cos(3 * y), np.sin(x * y)], -1)
    return np.clip(120 + 70 * waves + rng.normal(0, 9, waves.shape), 5, 240).astype(np.uint8)


def as_float(image):
    return jnp.asarray(np.asarray(image), jnp.float32) / np.float32(255)


def affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)


def enhanced(kind, factor):
    return lambda image: kind(image).enhance(factor)


def rotated(degrees):
    return lambda image: image.rotate(degrees, fillcolor=GREY)


TABLES = {
    "invert": (ops.invert, ImageOps.invert),
    "posterize": (lambda x: ops.posterize(x, 3), lambda image: ImageOps.posterize(image, 3)),
    "solarize": (lambda x: ops.solarize(x, 100), lambda image: ImageOps.solarize(image, 100)),
    "autocontrast": (ops.autocontrast, ImageOps.autocontrast),
    "equalize": (ops.equalize, ImageOps.equalize),
}
BLENDS = {
    f"{name} {factor}": (lambda x, f=factor, op=op: op(x, f), enhanced(kind, factor))
    for name, op, kind in [
        ("color", ops.color, ImageEnhance.Color),
        ("contrast", ops.contrast, ImageEnhance.Contrast),
        ("brightness", ops.brightness, ImageEnhance.Brightness),
        ("sharpness", ops.sharpness, ImageEnhance.Sharpness),
    ]
    for factor in (0.0, 0.4, 1.9)
}
MAPS = {
    "shear x": (lambda x: ops.shear_x(x, 0.23), affine(1, 0.23, 0, 0, 1, 0)),
    "shear y": (lambda x: ops.shear_y(x, -0.23), affine(1, 0, 0, -0.23, 1, 0)),
    "translate x": (lambda x: ops.translate_x(x, 0.2), affine(1, 0, 5, 0, 1, 0)),
    "translate y": (lambda x: ops.translate_y(x, -0.2), affine(1, 0, 0, 0, 1, -4)),
    "rotate": (lambda x: ops.rotate(x, 17.0), rotated(17)),
    "rotate back": (lambda x: ops.rotate(x, -40.0), rotated(-40)),
}


@pytest.mark.parametrize("name", [*TABLES, *BLENDS, *MAPS])
def test_image_operations_equal_those_of_pillow(name):
    ours, pillow = (TABLES | BLENDS | MAPS)[name]
    image = make_bytes()
    expected = np.asarray(pillow(Image.fromarray(image))).astype(int)
    # Pillow truncates to bytes, and once more inside: grey, its mean, the smoothed image.
    rounding = {"blend": 2.0, "autocontrast": 1.0}.get("blend" if name in BLENDS else name, 1e-3)
    np.testing.assert_allclose(255 * ours(as_float(image)), expected, atol=rounding)
    assert np.any(expected != image)


def test_solarize_add_is_its_definition():
    image = make_bytes().astype(int)
    expected = np.where(image < 128, np.clip(image + 60, 0, 255), image)
    np.testing.assert_allclose(255 * ops.solarize_add(as_float(image), 60), expected, atol=1e-3)


NEUTRAL = {
    "posterize": lambda x: ops.posterize(x, 8),
    "solarize": lambda x: ops.solarize(x, 256),
    "solarize_add": lambda x: ops.solarize_add(x, 0),
    "color": lambda x: ops.color(x, 1.0),
    "contrast": lambda x: ops.contrast(x, 1.0),
    "brightness": lambda x: ops.brightness(x, 1.0),
    "sharpness": lambda x: ops.sharpness(x, 1.0),
    "shear_x": lambda x: ops.shear_x(x, 0.0),
    "shear_y": lambda x: ops.shear_y(x, 0.0),
    "translate_x": lambda x: ops.translate_x(x, 0.0),
    "translate_y": lambda x: ops.translate_y(x, 0.0),
    "rotate": lambda x: ops.rotate(x, 0.0),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_strength_zero_is_the_identity(name):
    image = as_float(make_bytes())
    result = NEUTRAL[name](image)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, image, atol=1e-7)


def test_rotate_by_quarter_turns_and_invert_twice_are_exact():
    image = as_float(make_bytes(12, 12))
    np.testing.assert_array_equal(ops.rotate(image, 90.0), np.rot90(image))
    np.testing.assert_array_equal(ops.rotate(image, 180.0), np.rot90(image, 2))
    np.testing.assert_allclose(ops.invert(ops.invert(image)), image, atol=1e-7)


@pytest.mark.parametrize("op", [ops.autocontrast, ops.equalize])
def test_autocontrast_and_equalize_keep_constant_channels(op):
    image = jnp.full((6, 6, 3), np.float32(0.4))
    np.testing.assert_allclose(op(image), image, atol=1e-7)


def test_colour_operations_accept_grey_images():
    image = as_float(make_bytes())[..., :1]
    np.testing.assert_allclose(ops.color(image, 0.3), image, atol=1e-7)
    np.testing.assert_allclose(
        ops.contrast(image, 0.0), np.full_like(image, image.mean()), atol=1e-6
    )


# Policies

SIDES = (-1, 1)
AUTHORS: dict[
    tuple[str, int], list[Callable]
] = {  # level: what the authors' CIFAR code then does, to either side
    ("Invert", 7): [ImageOps.invert],
    ("AutoContrast", 8): [ImageOps.autocontrast],
    ("Posterize", 7): [lambda image: ImageOps.posterize(image, 4 - 2)],
    ("Solarize", 3): [lambda image: ImageOps.solarize(image, 256 - 76)],
    ("Color", 3): [enhanced(ImageEnhance.Color, 0.64)],
    ("Brightness", 7): [enhanced(ImageEnhance.Brightness, 1.36)],
    ("Rotate", 2): [rotated(6 * side) for side in SIDES],
    ("ShearY", 8): [affine(1, 0, 0, 0.24 * side, 1, 0) for side in SIDES],
    ("TranslateX", 9): [affine(1, 0, 9 * side, 0, 1, 0) for side in SIDES],
    ("TranslateY", 3): [affine(1, 0, 0, 0, 1, 3 * side) for side in SIDES],
}


def make_batch(image, size):
    return {"input": jnp.broadcast_to(as_float(image), (size, *image.shape))}


def distances(images, candidates):
    """The share of pixels by which each image differs from each candidate, by over two bytes."""
    candidates = np.stack([np.asarray(candidate, int) for candidate in candidates])
    apart = np.abs(255 * np.asarray(images)[:, None] - candidates[None]) > 2.01
    return apart.mean((2, 3, 4))


@pytest.fixture
def policy(monkeypatch):
    """Makes `auto_augment` with a policy of one pair."""

    def make(*pair):
        known = dict(policies.POLICIES, one=((pair,), policies.POLICIES["cifar10"][1]))
        monkeypatch.setattr(policies, "POLICIES", known)
        return policies.auto_augment("one")

    return make


@pytest.mark.parametrize(("name", "level"), AUTHORS)
def test_levels_of_auto_augment_are_those_of_the_authors_code(name, level, policy):
    image = make_bytes(32, 32)
    changed = policy((name, 1.0, level), ("Invert", 0.0, 0))(KEY, make_batch(image, 12))["input"]
    candidates = [pillow(Image.fromarray(image)) for pillow in AUTHORS[name, level]]
    near = distances(changed, candidates) < 1e-3
    assert np.all(near.sum(1) == 1)
    assert np.all(near.any(0))  # both sides occur


def test_operations_of_a_pair_run_in_order_with_their_probabilities(policy):
    image = make_bytes(32, 32)
    pair = policy(("Brightness", 0.7, 9), ("Solarize", 0.4, 5))
    changed = pair(KEY, make_batch(image, 400))["input"]
    first = enhanced(ImageEnhance.Brightness, 1.72)
    second = lambda image: ImageOps.solarize(image, 128)
    plain = Image.fromarray(image)
    candidates = [plain, first(plain), second(plain), second(first(plain))]
    counts = np.bincount(distances(changed, candidates).argmin(1), minlength=4)
    shares = np.array([0.3 * 0.6, 0.7 * 0.6, 0.3 * 0.4, 0.7 * 0.4])
    np.testing.assert_allclose(counts, 400 * shares, atol=5 * 10)  # five standard deviations


def test_the_cifar_policy_is_the_published_table():
    pairs, operations = policies.POLICIES["cifar10"]
    assert len(set(pairs)) == len(pairs) == 25
    halves = [half for pair in pairs for half in pair]
    assert {name for name, _, _ in halves} <= set(operations)
    assert all(round(10 * p) == 10 * p and level in range(10) for _, p, level in halves)
    # sums of the columns printed in arXiv:1805.09501
    assert round(sum(p for _, p, _ in halves), 1) == 26.5
    assert sum(level for _, _, level in halves) == 267


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"\['cifar10'\], and got 'imagenet'"):
        policies.auto_augment("imagenet")


RAND = [  # what big_vision's code does at magnitude 15 to a 32 × 32 image
    ImageOps.autocontrast,
    ImageOps.equalize,
    ImageOps.invert,
    lambda image: ImageOps.posterize(image, 6),
    lambda image: image,  # solarize at threshold 384
    *(enhanced(kind, 2.8) for kind in (ImageEnhance.Color, ImageEnhance.Contrast)),
    *(enhanced(kind, 2.8) for kind in (ImageEnhance.Brightness, ImageEnhance.Sharpness)),
    *(rotated(45 * side) for side in SIDES),
    *(affine(1, 0.45 * side, 0, 0, 1, 0) for side in SIDES),
    *(affine(1, 0, 0, 0.45 * side, 1, 0) for side in SIDES),
    *(affine(1, 0, 21 * side, 0, 1, 0) for side in SIDES),
    *(affine(1, 0, 0, 0, 1, 21 * side) for side in SIDES),
    lambda image: image.point(lambda v: min(v + 165, 255) if v < 128 else v),
]


def test_rand_augment_draws_each_of_its_sixteen_operations():
    image = make_bytes(32, 32)
    changed = np.asarray(policies.rand_augment(1, 15)(KEY, make_batch(image, 300))["input"])
    candidates = [pillow(Image.fromarray(image)) for pillow in RAND]
    # Strong blends amplify Pillow's rounding, so the nearest within 1 % of the pixels counts.
    apart = distances(changed, candidates)
    known = apart.min(1) < 0.01
    assert set(apart[known].argmin(1)) == set(range(len(RAND)))
    erased = np.abs(255 * changed[~known] - image).max(-1) > 0.01
    assert 5 < len(erased) < 40  # a sixteenth
    grey = np.abs(255 * changed[~known] - 128).max(-1) < 0.01
    np.testing.assert_array_equal(erased, grey & erased)
    assert erased.sum((1, 2)).max() <= 16**2  # 2 · ⌊40 · 32 / 224 · 1.5⌋ = 16


def test_rand_augment_applies_its_layers_in_turn():
    image = make_bytes(32, 32)
    changed = np.asarray(policies.rand_augment(2, 15)(KEY, make_batch(image, 64))["input"])
    candidates = [pillow(Image.fromarray(image)) for pillow in RAND]
    single = distances(changed, candidates).min(1) < 0.01
    # one of the two does nothing, or two translations add up, in a seventh of the cases
    assert single.mean() < 0.3


@pytest.mark.parametrize("options", [{"layers": 0}, {"magnitude": 30}, {"magnitude": -1}])
def test_rand_augment_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"magnitude in \[0, 20\]"):
        policies.rand_augment(**options)


def test_rand_augment_under_vmap_equals_one_image_at_a_time():
    """Under vmap every operation is computed and one is taken, as on a GPU."""
    batch = make_batch(make_bytes(16, 16), 40)
    transform = policies.rand_augment(1)
    in_turn = jax.jit(transform)(KEY, batch)["input"]
    together = jax.jit(jax.vmap(transform, (0, None)))(KEY[None], batch)["input"][0]
    assert in_turn.dtype == jnp.float32
    # A rotation's nearest pixel is a tie at a few places, which rounding decides.
    assert np.mean(np.abs(together - in_turn) > 1e-5) < 1e-3
