"""The data of a run: its part of the training set, label noise, and what it is tested on."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from curvax.training import pseudo_labels, tasks
from curvax.training.data import datasets, labelled_images, sources
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Dataset, Examples, Split
from curvax.training.tasks import Task


class RunData(NamedTuple):
    """The data of a run."""

    train: Examples  # with the labels used in training
    wrong: np.ndarray  # bool [N]: the label differs from the data set's own
    test: Examples  # the test set, or the held-out examples
    classes: int | None
    names: Sequence[str] = ()  # of the classes, if they have any

    @property
    def first(self) -> dict[str, np.ndarray]:
        """A batch of the first training example."""
        return self.train.gather(np.arange(1))


def load(config: ConfigDict, task: Task, hold_out: bool = False) -> RunData:
    """Loads the data of a config.

    Args:
        config: its `data` fields and `seed` choose examples and labels.
        task: loads the data set.
        hold_out: test on 10 % of the training set, which is then left out of training.

    Raises:
        DataError: the data cannot be read, or a field does not fit them.
        ConfigError: the run that predicts the labels cannot be used.
    """
    seed, dataset = config.seed, task.load(config.seed)
    train, test = dataset.train, dataset.test
    if config.data.num_train is not None:
        train = datasets.take(train, config.data.num_train, seed=seed)
    if hold_out:
        train, test = datasets.hold_out(train, seed=seed)
    train, wrong = _relabelled(train, dataset, config)
    return RunData(train, wrong, test, dataset.classes, dataset.names)


def _relabelled(
    train: Examples, dataset: Dataset[Examples], config: ConfigDict
) -> tuple[Examples, np.ndarray]:
    """The examples with label noise or with predicted labels, and which labels are now wrong."""
    rate, predicted = config.data.label_noise, config.data.labels is not None
    if not (rate or predicted) or dataset.classes is None:
        return train, np.zeros(train.size, bool)
    if not isinstance(train, Split):
        raise DataError(
            f"`data.{'labels' if predicted else 'label_noise'}` replaces labels in memory, and "
            f"those of `{config.data.name}` are in its records. Leave it out, or convert images in "
            "other class folders."
        )
    if predicted:
        labels = pseudo_labels.predictions(config, train)
    else:
        labels = labelled_images.flip_labels(train.labels, rate, dataset.classes, seed=config.seed)
    return train._replace(labels=labels), labels != train.labels


class DataSpec(NamedTuple):
    """Size and shapes of a run's data."""

    size: int  # training examples
    classes: int | None
    input: jax.ShapeDtypeStruct  # of one example
    label: jax.ShapeDtypeStruct


def data_spec(config: ConfigDict) -> DataSpec:
    """The size and shapes that a training step depends on; for images, without reading any."""
    if config.task in tasks.OF_IMAGES:
        source = sources.of(config.data)
        pixels = jax.ShapeDtypeStruct(source.shape, source.dtype)
        label = jax.ShapeDtypeStruct((), jnp.int32)
        return DataSpec(config.data.num_train or source.train, source.classes, pixels, label)
    data = load(config, tasks.build(config))
    example = data.first
    shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return DataSpec(data.train.size, data.classes, shape(example["input"]), shape(example["label"]))
