"""The images of a config, and the transforms of its batches: augmentation, normalisation, size."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from curvax import Attack, pgd
from curvax.training.augment import policies, transforms
from curvax.training.augment.transforms import Batch, Transform
from curvax.training.config import recipe
from curvax.training.data import encoded_images, labelled_images, sources
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Dataset, Examples, Split
from curvax.training.runtime.errors import ConfigError

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
"""The functions that `data.augment` may use, besides `normalise()`."""


def load(options: ConfigDict, seed: int) -> Dataset[Examples]:
    """The data set of a config's `data`; errors as in `labelled_images` and `encoded_images`."""
    if sources.find(options.name).records:
        return encoded_images.load(options)
    return in_memory(options.name, options.path, seed)


@functools.lru_cache(maxsize=4)
def in_memory(name: str, path: str | None, seed: int) -> Dataset[Split]:
    """`labelled_images.load` with a cache."""
    return labelled_images.load(name, path=path, seed=seed)


def in_training(config: ConfigDict) -> Transform:
    """The transform of training batches: one-hot labels, `data.augment`, then `data.image_size`.

    `normalise()` is applied after the augmentations, unless `data.augment` places it. Resizing does
    nothing if the augmentations, as `inception_crop`, already gave the size.

    Raises:
        ConfigError: a text of `data.augment` cannot be parsed.
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
    """The transform of all other batches: one-hot labels, normalisation, `data.image_size`."""
    changes = transforms.compose(_rows(config, 0.0), _normalise(config), *_resize(config))
    return functools.partial(changes, jax.random.key(0))  # nothing is drawn


def attack(config: ConfigDict, text: str) -> Attack:
    """The attack of a text such as `pgd(8/255, steps=7)`, on images as `normalise()` leaves them.

    Raises:
        ConfigError: the text cannot be parsed, or is not a call of `pgd`.
        DataError: as in `in_training`.
    """
    mean, std = (tuple(moment.tolist()) for moment in _moments(config))
    own = functools.partial(pgd, inputs="input", mean=mean, std=std)
    found = recipe.read(text, {"pgd": own})
    if not isinstance(found, Attack):
        raise ConfigError(f"`attack` is a call of `pgd`, as `pgd(8/255, steps=7)`, not `{text}`.")
    return found


def _resize(config: ConfigDict) -> list[Transform]:
    side = config.data.image_size
    return [] if side is None else [transforms.resize(side)]


def _rows(config: ConfigDict, smoothing: float) -> Transform:
    """One-hot labels, and images of bytes as numbers in [0, 1]."""
    rows = transforms.one_hot(sources.of(config.data).classes, smoothing)

    def transform(key: jax.Array, batch: Batch) -> Batch:
        image = batch["input"]
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 255
        return rows(key, batch | {"input": image})

    return transform


def _normalise(config: ConfigDict) -> Transform:
    """Normalises by `_moments`; errors as there."""
    return transforms.normalise(*_moments(config))


def _moments(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """The config's mean and deviation, the source's, or measured ones, in this order.

    Raises:
        DataError: only one of the config's is set, or they have another number of channels than
            the images.
    """
    options = config.data
    if (options.mean is None) != (options.std is None):
        raise DataError("`data.mean` and `data.std` are used together: set both of them or none.")
    source = sources.of(options)
    if options.mean is None:
        found = source.moments or _measured(options.name, options.path)
        return np.asarray(found[0]), np.asarray(found[1])
    channels = source.shape[-1]
    if {len(options.mean), len(options.std)} != {channels}:
        raise DataError(
            "`data.mean` and `data.std` have a number for each channel, of which the images of "
            f"`{options.name}` have {channels}, and were {options.mean} and {options.std}. Give as "
            "many, or leave both out."
        )
    return np.asarray(options.mean), np.asarray(options.std)


@functools.lru_cache(maxsize=4)
def _measured(name: str, path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel over the training set of seed 0, the same for all seeds."""
    train = in_memory(name, path, 0).train
    assert isinstance(train, Split)
    return labelled_images.moments(train.inputs)
