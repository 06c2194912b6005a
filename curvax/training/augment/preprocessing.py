"""Images of a config, and what happens to a batch of them: augmented in training, normalised,
resized."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from curvax.training.augment import policies, transforms
from curvax.training.augment.transforms import Batch, Transform
from curvax.training.config import recipe
from curvax.training.data import encoded_images, labelled_images, sources
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Dataset, Examples, Split

Prepare = Callable[[Batch], Batch]

AUGMENTATIONS = {
    each.__name__: each
    for each in (
        transforms.flip,
        transforms.shift_crop,
        transforms.cutout,
        transforms.mixup,
        transforms.inception_crop,
        policies.rand_augment,
        policies.auto_augment,
    )
}
"""What `data.augment` may name."""


def load(options: ConfigDict, seed: int) -> Dataset[Examples]:
    """The data set of a config's `data`; errors as in `images.load` and `pictures.load`."""
    if sources.find(options.name).records:
        return encoded_images.load(options)
    return in_memory(options.name, options.path, seed)


@functools.lru_cache(maxsize=4)
def in_memory(name: str, path: str | None, seed: int) -> Dataset[Split]:
    """`images.load`, the newest few kept."""
    return labelled_images.load(name, path=path, seed=seed)


def in_training(config: ConfigDict) -> Transform:
    """What happens to a training batch: labels become rows, then come the config's augmentations.

    `normalise()` may stand among them; it comes after them where it does not. The size that
    `data.image_size` says comes last, and does nothing where they gave it, as `inception_crop` may.

    Raises:
        RecipeError: a text of `data.augment` cannot be read.
    """
    normalise = _normalise(config)
    names = AUGMENTATIONS | {"normalise": lambda: normalise}
    texts = list(config.data.augment)
    if not any("normalise" in text for text in texts):
        texts.append("normalise()")
    changes = [recipe.read(text, names) for text in texts]
    return transforms.compose(
        _rows(config, config.data.label_smoothing), *changes, *_resize(config)
    )


def in_test(config: ConfigDict) -> Prepare:
    """What happens to any other batch: labels become rows, images are normalised and resized."""
    changes = transforms.compose(_rows(config, 0.0), _normalise(config), *_resize(config))
    return functools.partial(changes, jax.random.key(0))  # nothing is drawn


def _resize(config: ConfigDict) -> list[Transform]:
    side = config.data.image_size
    return [] if side is None else [transforms.resize(side)]


def _rows(config: ConfigDict, smoothing: float) -> Transform:
    """Labels become rows, and bytes numbers in [0, 1]."""
    rows = transforms.one_hot(sources.of(config.data).classes, smoothing)

    def transform(key: jax.Array, batch: Batch) -> Batch:
        image = batch["input"]
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 255
        return rows(key, batch | {"input": image})

    return transform


def _normalise(config: ConfigDict) -> Transform:
    """By the config's own moments, those of its source, or what is measured, in this order.

    Raises:
        DataError: its own are not two, or are not of as many channels as the images have.
    """
    options = config.data
    if (options.mean is None) != (options.std is None):
        raise DataError("`data.mean` and `data.std` normalise together: set both of them or none.")
    source = sources.of(options)
    if options.mean is None:
        return transforms.normalise(*source.moments or _measured(options.name, options.path))
    channels = source.shape[-1]
    if {len(options.mean), len(options.std)} != {channels}:
        raise DataError(
            "`data.mean` and `data.std` give a number for each channel, of which the images of "
            f"`{options.name}` have {channels}, and were {options.mean} and {options.std}. Give as "
            "many, or leave both out."
        )
    return transforms.normalise(options.mean, options.std)


@functools.lru_cache(maxsize=4)
def _measured(name: str, path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel, of the training set as it is divided under seed 0, so
    that all seeds of a comparison share them."""
    train = in_memory(name, path, 0).train
    assert isinstance(train, Split)
    return labelled_images.moments(train.inputs)
