"""EfficientNet: a naive twin with loops for the depthwise convolutions, scaling, frozen norms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_twins import Layers, along, random_variables, run, with_statistics

from curvax.models import build
from curvax.models.efficientnet import B0, SCALINGS, MBConvs, rounded

# A block with a shortcut, one with a stride of two, and one more of that width.
BLOCKS = (MBConvs(3, 1, 1, 32, 1), MBConvs(5, 2, 6, 24, 2))
OPTIONS = {"blocks": BLOCKS, "width": 0.25}
QUIET = {"dropout": 0.0, "stochastic_depth": 0.0}


def images(n: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (n, 8, 8, 1))


def net(**options):
    return build("efficientnet_b0", 2, **OPTIONS, **options)


def padded_pixels(x, window, stride):
    """For each place of the window, the pixels under it: TensorFlow's SAME padding."""
    side = x.shape[1]
    out = -(-side // stride)
    pad = max(0, (out - 1) * stride + window - side)
    x = np.pad(x, ((0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2), (0, 0)))
    last = (out - 1) * stride + 1
    for i, j in np.ndindex(window, window):
        yield i, j, x[:, i : i + last : stride, j : j + last : stride]


class Twin(Layers):
    """With BLOCKS at a quarter of the width: blocks of 8, 8 and 8 channels, 320 at the top."""

    def __call__(self, x):
        x = self.active(self.conv(x, "conv_stem", 2), "norm_stem")
        for block, window, stride, expand, shortcut in (
            ("stage0_block0", 3, 1, 1, True),
            ("stage1_block0", 5, 2, 6, False),
            ("stage1_block1", 5, 1, 6, True),
        ):
            h = x
            if expand > 1:
                h = self.active(self.conv(x, f"{block}/conv_expand"), f"{block}/norm_expand")
            kernel = np.asarray(self.get(f"{block}/conv_depthwise/kernel"))
            h = sum(
                pixels * along(kernel[i, j, 0], pixels)
                for i, j, pixels in padded_pixels(np.asarray(h), window, stride)
            )
            h = self.active(h, f"{block}/norm_depthwise")
            squeezed = swish(self.dense(h.mean((1, 2)), f"{block}/squeeze"))
            gates = 1 / (1 + jnp.exp(-self.dense(squeezed, f"{block}/excite")))
            h = h * gates[:, None, None]
            h = self.norm(self.conv(h, f"{block}/conv_project"), f"{block}/norm_project")
            x = x + h if shortcut else h
        x = self.active(self.conv(x, "conv_top"), "norm_top")
        return self.dense(x.mean((1, 2)), "head")

    def active(self, x, at):
        return swish(self.norm(x, at))


def swish(x):
    return x / (1 + jnp.exp(-x))


@pytest.mark.parametrize("train", [True, False])
def test_outputs_equal_those_of_the_naive_twin(train):
    x, model = images(), net(**QUIET)
    variables = with_statistics(random_variables(model, x))
    found, new = run(model, variables, x, train=train, mutable=["batch_stats"])
    expected = Twin(variables, train, 1e-3)(x)
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    stem = Layers(variables, train, 1e-3).conv(x, "conv_stem", 2).mean((0, 1, 2))
    old = variables["batch_stats"]["norm_stem"]["mean"]
    moved = 0.99 * old + 0.01 * stem if train else old
    np.testing.assert_allclose(new["batch_stats"]["norm_stem"]["mean"], moved, rtol=1e-10)


def test_frozen_norm_normalises_in_training_as_in_evaluation():
    x, plain, frozen = images(), net(**QUIET), net(**QUIET, freeze_norm=True)
    variables = with_statistics(random_variables(plain, x))
    found, new = run(frozen, variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, run(plain, variables, x), rtol=1e-12)
    for a, b in zip(*map(jax.tree.leaves, (new, {"batch_stats": variables["batch_stats"]}))):
        np.testing.assert_array_equal(a, b)


def test_stochastic_depth_grows_from_zero_and_dropout_keeps_the_mean():
    """Of three blocks the branch of the last one, at 2/3 of the rate, alone can be dropped here."""
    x, rate = images(), 0.6
    model, quiet = (net(dropout=0.0, stochastic_depth=p, freeze_norm=True) for p in (rate, 0.0))
    variables = random_variables(quiet, x)
    kept = variables | {"params": dict(variables["params"])}
    norm = variables["params"]["stage1_block1"]["norm_project"]
    scaled = lambda factor: jax.tree.map(lambda leaf: factor * leaf, norm)
    outputs = []
    for factor in (0.0, 1 / (1 - rate * 2 / 3)):  # dropped, and kept and scaled
        last = variables["params"]["stage1_block1"] | {"norm_project": scaled(factor)}
        kept["params"]["stage1_block1"] = last
        outputs.append(run(quiet, kept, x))
    draw = lambda key: model.apply(variables, x, train=True, rngs={"dropout": key})
    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 60))
    is_either = [np.isclose(found, each[None], rtol=1e-9).all(-1) for each in outputs]
    assert (is_either[0] ^ is_either[1]).all()
    share = is_either[1].mean()  # five standard errors of 120 draws
    assert abs(share - (1 - rate * 2 / 3)) < 5 * np.sqrt(0.24 / 120)


def test_batch_norm_synced_over_an_axis_sees_the_whole_batch_of_an_efficientnet():
    x = images(4)
    whole, local = (net(**QUIET, sync_over=axis) for axis in (None, "devices"))
    variables = random_variables(whole, x)
    train = lambda m, x: m.apply(variables, x, train=True, mutable="batch_stats")[0]
    shards = jax.jit(jax.vmap(partial(train, local), axis_name="devices"))
    expected = jax.jit(partial(train, whole))(x)
    np.testing.assert_allclose(shards(x.reshape(2, 2, 8, 8, 1)).reshape(4, 2), expected, rtol=1e-9)


@pytest.mark.parametrize(("size", "last"), [("b0", 320), ("b4", 448), ("b7", 640)])
def test_channels_of_the_last_stage_are_those_of_the_authors(size, last):
    assert rounded(B0[-1].channels, SCALINGS[size].width) == last


def test_channels_are_rounded_down_by_less_than_a_tenth():
    assert [rounded(channels, 1.0) for channels in (1, 11, 12, 20, 83)] == [8, 16, 16, 24, 80]


def test_depthwise_kernels_keep_the_variance_of_activations():
    conv = net().style().conv(1000, 5, depthwise=True, name="conv")
    kernel = jax.jit(conv.init)(jax.random.key(0), jnp.zeros((1, 5, 5, 1000)))["params"]["kernel"]
    assert kernel.shape == (5, 5, 1, 1000)
    # the sum over a window of halved activations; five standard errors of 25 000 squares
    assert abs(25 * np.mean(kernel**2) - 2) < 5 * 2 * np.sqrt(2 / 25_000)
