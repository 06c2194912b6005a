"""Configs: where they are found, what fields they have, and how the command line changes them.

A config is a Python file whose `get_config()` returns a locked `ConfigDict`: `defaults()` with some
fields set. Numbers among its top-level fields are names that the optimiser's text may use, so
`sam_perturb(rho)` with `config.rho = 0.2` can be swept as `rho`.
"""

import ast
import copy
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import curvax
from curvax.training.config.recipe import near

_WORDS = {"true": True, "false": False, "none": None, "null": None}
_LOWEST = {
    "data.side": 1,
    "data.threads": 1,
    "epochs": 1,
    "batch": 1,
    "microbatch": 1,
    "devices": 1,
    "seed": 0,
    "eval_batch": 1,
    "log_every": 1,
    "test_every": 1,
    "checkpoint_every": 1,
    "keep": 1,
    "hessian_examples": 0,
}
"""The least value of fields that count."""


class ConfigError(ValueError):
    """A config that cannot be found or read, or a field it does not have."""


def defaults(**numbers: float) -> ConfigDict:
    """The fields of every experiment, locked.

    Args:
        **numbers: further top-level fields for the optimiser's text to name, as `rho=0.2`.
    """
    fields: dict[str, Any] = {
        "name": "experiment",  # of the run's folder; the config file's own name when loaded
        "task": "images",  # or "autoencoder", "regression", "language"
        "model": {"name": "mixer_tiny", "options": {}},
        "data": {
            "name": "digits",
            "path": placeholder(str),  # folder or archive of data that is not embedded
            "size": placeholder(int),  # training examples used, all by default
            "noise": 0.0,  # fraction of the training labels replaced by a wrong one
            "labels": placeholder(str),  # run whose predictions replace the training labels
            "smoothing": 0.0,  # of the training labels
            "augment": [],  # transforms in order, each as text; nothing is mirrored without flip()
            "length": 64,  # bytes in a window of text
            "side": placeholder(int),  # pixels of an image, 224 of one made of a picture in ...
            # ... records by default; images in memory keep their size unless it is given
            "area": (0.05, 1.0),  # of such a picture that a training crop takes, least and greatest
            "threads": placeholder(int),  # that decode pictures, one for each core by default
            "mean": placeholder(tuple),  # that normalises images, a number for each channel in ...
            "std": placeholder(tuple),  # ... units of [0, 1]; both measured, or the source's own
        },
        "optimizer": "adamw(cosine(1e-3))",
        "base": "adamw(cosine(1e-3))",  # what `compare` and `bench` measure against
        "others": [],  # further methods, each as text, that they take in too
        "beside": False,  # whether `train` trains the base and the others too
        "loss": placeholder(str),  # the task's own by default; of images "softmax" or "sigmoid"
        "start": placeholder(str),  # trained weights to begin with: a run's folder, or a ...
        "new_head": False,  # ... published .npz; whether their head stays out although it fits
        "epochs": 60,  # of each example once, but for those left over by whole batches
        "batch": 64,
        "microbatch": placeholder(int),  # examples in memory at once, the whole batch by default
        "regime": "jit",  # how a step is mapped over the devices, or "shard_map", "pmap"
        "devices": placeholder(int),  # the first of those there are, all by default
        "fsdp": False,  # whether parameters and optimiser state are divided among them too
        "seed": 0,  # of parameters, label noise, data order, augmentation and dropout
        "eval_batch": 512,
        "log_every": 10,  # steps
        "test_every": 1,  # epochs
        "checkpoint_every": placeholder(int),  # steps, an epoch by default
        "keep": 2,  # checkpoints
        "hessian_examples": 512,  # for the largest eigenvalue at the end, 0 for none
        **numbers,
    }
    config = ConfigDict(fields).lock()
    config.model.options.unlock()  # each model has its own
    return config


def folder() -> Path:
    """Where the configs that come with curvax are: in the package, or beside it in a checkout."""
    package = Path(curvax.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.py"))


def load(name: str) -> ConfigDict:
    """The config of that name, or of that path to a Python file.

    What follows a colon, as in `imagenet_vit:b16`, is the variant that `get_config` is given.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path, (_, _, variant) = find(name), name.partition(":")
    try:
        config = runpy.run_path(str(path))["get_config"](*[variant] * bool(variant))
    except Exception as error:
        raise ConfigError(
            f"The config {path} cannot be read ({type(error).__name__}: {error}). Let it define "
            "`get_config()`, which returns `curvax.training.config.defaults()` with fields set."
        ) from error
    config.name = "_".join([path.stem, variant]) if variant else path.stem
    return config


def find(name: str) -> Path:
    """The file of a config; errors as in `load`."""
    name = name.partition(":")[0]
    path = Path(name) if name.endswith(".py") else folder() / f"{name}.py"
    if not path.is_file():
        raise ConfigError(
            f"There is no config `{name}` ({path} does not exist){near(name, names())} "
            f"Those that come with curvax are {', '.join(names())}; a path to a .py file works too."
        )
    return path


def docstring(name: str) -> str:
    """What a config says of itself: paper, command, expected result, cost; errors as in `load`."""
    return ast.get_docstring(ast.parse(find(name).read_text())) or ""


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its dotted name."""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def override(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """A copy of the config with `--field=value` applied, dots reaching inside.

    Raises:
        ConfigError: an unknown field (with near matches), or a value of another type.
    """
    changed = copy.deepcopy(config)  # with the types of the fields that are not set
    for assignment in assignments:
        name, equals, text = assignment.removeprefix("--").partition("=")
        if not (assignment.startswith("--") and equals):
            raise ConfigError(
                f"`{assignment}` is not an override. Write fields as `--field=value`, for instance "
                "`--epochs=30` or `--data.noise=0.2`."
            )
        assign(changed, name, text)
    return changed


def assign(config: ConfigDict, name: str, text: str) -> None:
    """Sets one dotted field to the value that the text stands for; errors as in `override`."""
    *branches, leaf = name.split(".")
    parent: Any = config
    for branch in branches:
        parent = parent.get(branch) if isinstance(parent, ConfigDict) else None
    free = branches == ["model", "options"]
    if not isinstance(parent, ConfigDict) or (leaf not in parent and not free):
        known = [field for field, _ in flat(config)]
        raise ConfigError(
            f"The config has no field `{name}`{near(name, known)} It has {', '.join(known)}."
        )
    kind = parent.get_type(leaf) if leaf in parent else object
    try:
        with parent.unlocked():
            parent[leaf] = value(text, kind)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The field `{name}` has the type `{kind.__name__}`, and `{text}` has another."
        ) from error


def value(text: str, kind: type = object) -> Any:
    """What a text stands for: `true`, `false`, `none`, a Python literal, or itself, a string."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return text if kind is str else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def check(config: ConfigDict) -> None:
    """Refuses fields that are no whole numbers where they should be, or too low.

    Raises:
        ConfigError: naming the field.
    """
    fields, standard = dict(flat(config)), dict(flat(defaults()))
    for name, lowest in _LOWEST.items():
        left_out = fields[name] is None and standard[name] is None
        if not left_out and (type(fields[name]) is not int or fields[name] < lowest):
            raise ConfigError(f"`{name}` is a whole number from {lowest}, and was {fields[name]}.")


def numbers(config: ConfigDict) -> dict[str, float]:
    """The top-level numbers, which the optimiser's text may name."""
    return {name: v for name, v in config.items() if type(v) in (int, float)}
