"""The data of a run: a part of the training set, some of it held out, some of its labels wrong."""

import functools
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from curvax import recipe
from curvax.training import augment, data, policies
from curvax.training.data import Split
from curvax.training.step import Transform

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


class Material(NamedTuple):
    """The data of a run."""

    train: Split  # with the labels that it trains on
    wrong: np.ndarray  # bool [N]: where noise replaced the label
    test: Split  # or what was held out
    classes: int


def gather(config: ConfigDict, hold_out: bool = False) -> Material:
    """The data of a config: a part of the training set, some of it held out, some labels wrong."""
    seed, options = config.seed, config.data
    dataset = _load(options.name, options.path, seed)
    train, test = dataset.train, dataset.test
    if options.size is not None:
        train = data.take(train, options.size, seed=seed)
    if hold_out:
        train, test = data.hold_out(train, seed=seed)
    noisy = data.flip_labels(train.labels, options.noise, dataset.classes, seed=seed)
    return Material(train._replace(labels=noisy), noisy != train.labels, test, dataset.classes)


@functools.lru_cache(maxsize=4)
def _load(name: str, path: str | None, seed: int) -> data.Dataset:
    return data.load(name, path=path, seed=seed)


def transform(config: ConfigDict, classes: int) -> Transform:
    """What happens to a training batch: labels become rows, then come the config's augmentations.

    `normalise()` may stand among them; it comes last where it does not.

    Raises:
        RecipeError: a text of `data.augment` cannot be read.
    """
    normalise = functools.partial(augment.normalise, *moments(config))
    names = AUGMENTATIONS | {"normalise": normalise}
    texts = list(config.data.augment)
    if not any("normalise" in text for text in texts):
        texts.append("normalise()")
    changes = [recipe.read(text, names) for text in texts]
    return augment.compose(augment.one_hot(classes, config.data.smoothing), *changes)


def moments(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel, of the training set as it is divided under seed 0, so
    that all seeds of a comparison share them."""
    return _moments(config.data.name, config.data.path)


@functools.lru_cache(maxsize=4)
def _moments(name: str, path: str | None) -> tuple[np.ndarray, np.ndarray]:
    return data.moments(_load(name, path, 0).train.images)
