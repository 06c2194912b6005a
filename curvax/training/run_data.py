"""The data of a run: a part of the training set, some of it held out, some of its labels wrong."""

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


class Material(NamedTuple):
    """The data of a run."""

    train: Examples  # with the labels that it trains on
    wrong: np.ndarray  # bool [N]: where these are not the labels that came with them
    test: Examples  # or what was held out
    classes: int | None
    names: Sequence[str] = ()  # of the classes, where they have any

    @property
    def first(self) -> dict[str, np.ndarray]:
        """A batch of the first training example."""
        return self.train.gather(np.arange(1))


def gather(config: ConfigDict, task: Task, hold_out: bool = False) -> Material:
    """The data of a config: a part of the training set, some of it held out, some labels wrong.

    Raises:
        DataError: it cannot be read, or does not fit.
        BootstrapError, PretrainedError: the run that predicts its labels cannot be had.
    """
    seed, dataset = config.seed, task.load(config.seed)
    train, test = dataset.train, dataset.test
    if config.data.num_train is not None:
        train = datasets.take(train, config.data.num_train, seed=seed)
    if hold_out:
        train, test = datasets.hold_out(train, seed=seed)
    train, wrong = _relabelled(train, dataset, config)
    return Material(train, wrong, test, dataset.classes, dataset.names)


def _relabelled(
    train: Examples, dataset: Dataset[Examples], config: ConfigDict
) -> tuple[Examples, np.ndarray]:
    """With wrong labels, or with those that a run predicts which was trained on wrong ones."""
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


class Facts(NamedTuple):
    """What there is to know of a run's data without reading it."""

    size: int  # training examples
    classes: int | None
    input: jax.ShapeDtypeStruct  # of an example
    label: jax.ShapeDtypeStruct


def foretell(config: ConfigDict) -> Facts:
    """The facts that a training step follows from."""
    if config.task == "images":
        source = sources.of(config.data)
        pixels = jax.ShapeDtypeStruct(source.shape, source.dtype)
        label = jax.ShapeDtypeStruct((), jnp.int32)
        return Facts(config.data.num_train or source.train, source.classes, pixels, label)
    gathered = gather(config, tasks.build(config))
    train = gathered.train
    example = train.gather(np.arange(1))
    shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return Facts(train.size, gathered.classes, shape(example["input"]), shape(example["label"]))
