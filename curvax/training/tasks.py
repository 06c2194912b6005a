"""Tasks: the examples of a model, the likelihood of its outputs, and its scores.

Image classification, contrastive training, image reconstruction, regression, clicks and language
modelling differ only in what is defined or referred to here.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from curvax import Attack
from curvax.contrastive import supervised_contrastive
from curvax.devices import axes
from curvax.likelihoods import Likelihood, bernoulli, categorical, gaussian
from curvax.training import parallelism, selection_metric
from curvax.training.augment import metrics, preprocessing
from curvax.training.augment.metrics import Metric, Ranking
from curvax.training.augment.preprocessing import Prepare
from curvax.training.augment.transforms import Batch, Transform
from curvax.training.data import flights, sources, tabular, text
from curvax.training.data.datasets import Dataset, Examples, Split
from curvax.training.runtime.errors import ConfigError
from curvax.training.selection_metric import SelectionMetric

LIKELIHOODS: dict[str, Callable[..., Likelihood]] = {
    "softmax": categorical,
    "sigmoid": bernoulli,
    "squared": gaussian,
}
"""The values of the config's `loss`; each is `f(targets, mask=None)`."""
OF_IMAGES = ("images", "contrastive")
"""The tasks on labelled images."""


class Task(NamedTuple):
    """The task of one config."""

    examples: str  # the noun for examples: "images"
    load: Callable[[int], Dataset[Examples]]  # seed ↦ data set
    loss: Callable[..., Any]  # f(targets, mask=None) ↦ loss(outputs, batch)
    scores: Mapping[str, Metric]  # in addition to the loss
    metric: SelectionMetric
    in_training: Transform = lambda key, batch: batch  # applied to training batches
    in_test: Prepare = lambda batch: batch  # applied to all others
    attack: Attack | None = None  # on training inputs
    share_attack: bool = False  # one backward pass for the first gradient and the attack
    probed: bool = False  # whether the accuracy is that of a linear probe of the representation
    rankings: Mapping[str, Ranking] = MappingProxyType({})  # scores of all examples at once


def build(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
        ConfigError: there is no task of that name, a field does not fit it, or a text of
            `data.augment` cannot be parsed.
        DataError: the data cannot be read.
    """
    if config.task not in TASKS:
        raise ConfigError(f"`task` is one of {', '.join(TASKS)}, and was `{config.task}`.")
    if config.task not in OF_IMAGES:
        _refuse_changes(config)
    return TASKS[config.task](config)


def _images(config: ConfigDict) -> Task:
    options, attack = config.data, config.attack
    few = sources.of(options).classes <= 10
    return Task(
        "images",
        lambda seed: preprocessing.load(options, seed),
        _likelihood(config, "softmax", "sigmoid"),
        {"accuracy": metrics.top1} | ({} if few else {"top5": metrics.top5}),
        selection_metric.CLASSIFICATION,
        preprocessing.in_training(config),
        preprocessing.in_test(config),
        preprocessing.attack(config, attack) if attack else None,
        config.share_attack,
    )


def _contrastive(config: ConfigDict) -> Task:
    """Images in two views, each augmented by its own draws, and the loss of their embeddings."""
    _refuse_for_views(config)
    images = _images(config)

    def loss(targets: str, mask: str | None = None) -> Any:
        classes = lambda batch: jnp.argmax(batch[targets], axis=-1)
        # Every axis that is bound where the loss is made divides the batch.
        options = {"temperature": config.temperature, "mask": mask, "sync_over": axes.manual()}
        return supervised_contrastive(classes, **options)

    def views(key: jax.Array, batch: Batch) -> Batch:
        one, other = (images.in_training(k, batch) for k in jax.random.split(key))
        return one | {"input": jnp.stack([one["input"], other["input"]], axis=1)}

    def one_view(batch: Batch) -> Batch:
        seen = images.in_test(batch)
        return seen | {"input": seen["input"][:, None]}

    return images._replace(loss=loss, scores={}, in_training=views, in_test=one_view, probed=True)


def _refuse_for_views(config: ConfigDict) -> None:
    """Refuses what changes labels to rows that are no classes, or makes another loss of each
    parallelism."""
    mixed = any("mixup" in text for text in config.data.augment)
    for what, given in {
        "`loss`": config.loss,
        "`attack`": config.attack,
        "`data.label_smoothing`": config.data.label_smoothing,
        "`mixup` in `data.augment`": mixed,
    }.items():
        if given:
            raise ConfigError(
                f"The task `contrastive` has a loss of its own, of images with one class each, and "
                f"{what} is set. Leave it out, or use the task `images`."
            )
    if config.parallelism != "jit" and parallelism.group_sizes(config):
        raise ConfigError(
            "The task `contrastive` compares the examples of a group of `per_group` with each "
            f"other, and under `parallelism={config.parallelism}` also with those of the groups of "
            "the same number on other devices. Use `parallelism=jit`, or a method without groups."
        )


def _autoencoder(config: ConfigDict) -> Task:
    options = config.data

    def load(seed: int) -> Dataset[Split]:
        images = preprocessing.load(options, seed)
        train, test = (_own_targets(part) for part in (images.train, images.test))
        return Dataset(train, test)

    likelihood, scores = _likelihood(config, "sigmoid"), {"squared_error": metrics.pixel_error}
    return Task("images", load, likelihood, scores, selection_metric.RECONSTRUCTION)


def _own_targets(part: Examples) -> Split:
    if not isinstance(part, Split):
        raise ConfigError(
            "An autoencoder is trained on images in memory, and these are records. Use another "
            "`data.name`, or the task `images`."
        )
    return Split(part.inputs, part.inputs)


def _regression(config: ConfigDict) -> Task:
    options = config.data
    if options.path is not None:
        raise ConfigError(
            "The task `regression` uses a table that comes with scikit-learn, and `data.path` is "
            f"{options.path}. Leave it out."
        )
    load = lambda seed: tabular.load(options.name, seed=seed)
    likelihood, scores = _likelihood(config, "squared"), {"squared_error": metrics.squared_error}
    return Task("rows", load, likelihood, scores, selection_metric.REGRESSION)


def _clicks(config: ConfigDict) -> Task:
    options = config.data

    def load(seed: int) -> Dataset[Split]:
        del seed  # the test follows the training in time
        rows = flights.load(options.name, path=options.path)
        _refuse_categories(config, flights.category_counts(rows))
        return rows

    likelihood, scores = _likelihood(config, "sigmoid"), {"accuracy": metrics.click_accuracy}
    rankings = {"auc": metrics.area_under_curve}
    return Task("rows", load, likelihood, scores, selection_metric.CLICKS, rankings=rankings)


def _language(config: ConfigDict) -> Task:
    options = config.data
    where = {"path": options.path, "length": options.seq_len}
    load = lambda seed: text.load(options.name, seed=seed, **where)
    likelihood, scores = _likelihood(config, "softmax"), {"accuracy": metrics.top1}
    return Task("windows", load, likelihood, scores, selection_metric.LANGUAGE)


TASKS = {
    "images": _images,
    "contrastive": _contrastive,
    "autoencoder": _autoencoder,
    "regression": _regression,
    "clicks": _clicks,
    "language": _language,
}


def _likelihood(config: ConfigDict, *fitting: str) -> Callable[..., Likelihood]:
    """The likelihood that the config's `loss` names, by default the first that fits the task."""
    name = config.loss or fitting[0]
    if name not in fitting:
        raise ConfigError(
            f"`loss` is one of {', '.join(fitting)} for the task `{config.task}`, and was `{name}`."
        )
    return LIKELIHOODS[name]


def _refuse_changes(config: ConfigDict) -> None:
    """Refuses fields that only labelled images have."""
    if config.attack:
        raise ConfigError(
            "`attack` moves the pixels of labelled images, and the task is "
            f"`{config.task}`. Leave it out, or use the task `images`."
        )
    for field in ("label_noise", "labels", "label_smoothing", "augment", "image_size"):
        if config.data[field]:
            raise ConfigError(
                f"`data.{field}` is for labelled images, and the task is `{config.task}`. Leave it "
                "out, or use the task `images`."
            )


def _refuse_categories(config: ConfigDict, counts: tuple[int, ...]) -> None:
    """Refuses a model with other tables than the data have categories."""
    tables = config.model.options.get("categories", counts)
    if tuple(tables) != counts:
        raise ConfigError(
            "The tables of the model hold the categories of the data, and "
            f"`model.options.categories` is {tuple(tables)} where `{config.data.name}` has "
            f"{counts}. Set the latter."
        )
