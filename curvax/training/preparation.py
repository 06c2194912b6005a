"""What happens to a batch of images before a model sees it: augmented in training, normalised."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from curvax import recipe
from curvax.training import augment, images, policies, sources
from curvax.training.augment import Batch, Transform
from curvax.training.data import Dataset

Prepare = Callable[[Batch], Batch]

AUGMENTATIONS = {
    each.__name__: each
    for each in (
        augment.flip,
        augment.shift_crop,
        augment.cutout,
        augment.mixup,
        augment.inception_crop,
        policies.rand_augment,
        policies.auto_augment,
    )
}
"""What `data.augment` may name."""


@functools.lru_cache(maxsize=4)
def load(name: str, path: str | None, seed: int) -> Dataset:
    """`images.load`, the newest few kept; errors as there."""
    return images.load(name, path=path, seed=seed)


def in_training(config: ConfigDict) -> Transform:
    """What happens to a training batch: labels become rows, then come the config's augmentations.

    `normalise()` may stand among them; it comes last where it does not.

    Raises:
        RecipeError: a text of `data.augment` cannot be read.
    """
    normalise = _normalise(config)
    names = AUGMENTATIONS | {"normalise": lambda: normalise}
    texts = list(config.data.augment)
    if not any("normalise" in text for text in texts):
        texts.append("normalise()")
    changes = [recipe.read(text, names) for text in texts]
    return augment.compose(_rows(config, config.data.smoothing), *changes)


def in_test(config: ConfigDict) -> Prepare:
    """What happens to any other batch: labels become rows, images are normalised."""
    both = augment.compose(_rows(config, 0.0), _normalise(config))
    return functools.partial(both, jax.random.key(0))  # nothing is drawn


def _rows(config: ConfigDict, smoothing: float) -> Transform:
    return augment.one_hot(sources.find(config.data.name).classes, smoothing)


def _normalise(config: ConfigDict) -> Transform:
    return augment.normalise(*_moments(config.data.name, config.data.path))


@functools.lru_cache(maxsize=4)
def _moments(name: str, path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel, of the training set as it is divided under seed 0, so
    that all seeds of a comparison share them."""
    return images.moments(load(name, path, 0).train.inputs)
