"""Tasks: the examples of a model, the likelihood of its outputs, and its scores.

Image classification, image reconstruction, regression, clicks and language modelling differ only in
what is defined or referred to here.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ml_collections import ConfigDict

from curvax.likelihoods import Likelihood, bernoulli, categorical, gaussian
from curvax.training import selection_metric
from curvax.training.augment import metrics, preprocessing
from curvax.training.augment.metrics import Metric, Ranking
from curvax.training.augment.preprocessing import Prepare
from curvax.training.augment.transforms import Transform
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


class Task(NamedTuple):
    """The task of one config."""

    examples: str  # the noun for examples: "images"
    load: Callable[[int], Dataset[Examples]]  # seed ↦ data set
    likelihood: Callable[..., Likelihood]  # f(targets, mask=None)
    scores: Mapping[str, Metric]  # in addition to the loss
    metric: SelectionMetric
    in_training: Transform = lambda key, batch: batch  # applied to training batches
    in_test: Prepare = lambda batch: batch  # applied to all others
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
    if config.task != "images":
        _refuse_changes(config)
    return TASKS[config.task](config)


def _images(config: ConfigDict) -> Task:
    options = config.data
    few = sources.of(options).classes <= 10
    return Task(
        "images",
        lambda seed: preprocessing.load(options, seed),
        _likelihood(config, "softmax", "sigmoid"),
        {"accuracy": metrics.top1} | ({} if few else {"top5": metrics.top5}),
        selection_metric.CLASSIFICATION,
        preprocessing.in_training(config),
        preprocessing.in_test(config),
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
