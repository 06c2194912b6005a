"""Configs: finding and loading them, their fields, and overrides from the command line.

A config is a Python file whose `get_config()` returns a locked `ConfigDict`: `defaults()` with some
fields set. The optimiser's text may use the names of numeric top-level fields: `sam_perturb(rho)`
with `defaults(rho=0.2)` can be swept as `rho`.
"""

import ast
import copy
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import curvax
from curvax.training.config.recipe import near
from curvax.training.config.renamed import DataConfig, RunConfig, current
from curvax.training.runtime.errors import ConfigError

_WORDS = {"true": True, "false": False, "none": None, "null": None}
_LOWEST = {
    "data.image_size": 1,
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
    "keep_checkpoints": 1,
    "hessian_examples": 0,
}
"""The least value of integer fields."""


def defaults(**numbers: float) -> ConfigDict:
    """The default config, locked: its fields can be set, and no others added.

    Args:
        **numbers: further top-level fields that the optimiser's text may use, as `rho=0.2`.
    """
    fields: dict[str, Any] = {
        "name": "experiment",  # in the run folder's name; `load` sets the config file's own
        "task": "images",  # or "contrastive", "autoencoder", "regression", "clicks", "language"
        "model": {"name": "mixer_tiny", "options": {}},
        "data": DataConfig(
            {
                "name": "digits",
                "path": placeholder(str),  # folder or archive of data not in a Python package
                "num_train": placeholder(int),  # training examples used, all by default
                "label_noise": 0.0,  # fraction of the training labels replaced by a wrong one
                "labels": placeholder(str),  # run whose predictions replace the training labels
                "label_smoothing": 0.0,  # ε of the training labels
                "augment": [],  # transforms in order, each as text; no mirroring without flip()
                "seq_len": 64,  # bytes in a window of text
                "image_size": placeholder(int),  # pixels per side; by default 224 for encoded ...
                # ... images, and images in memory keep their own size
                "crop_area": (0.05, 1.0),  # least and greatest share of an encoded image that ...
                # ... a training crop takes
                "threads": placeholder(int),  # that decode images, one per core by default
                "mean": placeholder(tuple),  # per channel, in units of [0, 1], to normalise ...
                "std": placeholder(tuple),  # ... images; both by default measured or the source's
            }
        ),
        "optimizer": "adamw(cosine(1e-3))",
        "baseline": "adamw(cosine(1e-3))",  # first method of `compare`, `bench` and `plan`
        "more_optimizers": [],  # further methods, each as text, of the same commands
        "train_baselines": False,  # `train` also trains `baseline` and `more_optimizers`
        "attack": placeholder(str),  # on training images, as text: pgd(8/255, steps=7)
        "share_attack": False,  # a method's second gradient is at the attack of the first pass
        "loss": placeholder(str),  # the task's own by default; of images "softmax" or "sigmoid"
        "temperature": 0.1,  # τ of the task "contrastive"
        "init_from": placeholder(str),  # pretrained weights: a run's folder or a published .npz
        "new_head": False,  # leave the pretrained head out even if it fits
        "epochs": 60,  # passes over the training set, incomplete batches dropped
        "batch": 64,
        "microbatch": placeholder(int),  # examples in memory at once, the whole batch by default
        "parallelism": "jit",  # how a step is mapped over devices: or "shard_map", "pmap"
        "devices": placeholder(int),  # use the first so many, all by default
        "fsdp": False,  # also divide parameters and optimiser state among the devices
        "seed": 0,  # of parameters, label noise, data order, augmentation and dropout
        "eval_batch": 512,
        "log_every": 10,  # steps
        "test_every": 1,  # epochs
        "checkpoint_every": placeholder(int),  # steps, an epoch by default
        "keep_checkpoints": 2,
        "hessian_examples": 512,  # for the largest eigenvalue at the end, 0 for none
    }
    for name, number in numbers.items():
        fields[current(name)] = number
    config = RunConfig(fields).lock()
    config.model.options.unlock()  # each model has its own
    return config


def folder() -> Path:
    """The folder of curvax's own configs: in the installed package, or next to it in a checkout."""
    package = Path(curvax.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The names of curvax's own configs, sorted."""
    return sorted(path.stem for path in folder().glob("*.py"))


def load(name: str) -> ConfigDict:
    """Loads a config.

    Args:
        name: one of `names()` or the path of a .py file; after a colon the argument of its
            `get_config`, as in `imagenet_vit:b16`.

    Raises:
        ConfigError: there is no such config, or it cannot be read.
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
    """The file of a config; arguments and errors as in `load`."""
    name = name.partition(":")[0]
    path = Path(name) if name.endswith(".py") else folder() / f"{name}.py"
    if not path.is_file():
        raise ConfigError(
            f"There is no config `{name}` ({path} does not exist){near(name, names())} "
            f"Those that come with curvax are {', '.join(names())}; a path to a .py file works too."
        )
    return path


def docstring(name: str) -> str:
    """A config's docstring: paper, command, expected result, cost; errors as in `load`."""
    return ast.get_docstring(ast.parse(find(name).read_text())) or ""


def flat(config: ConfigDict) -> dict[str, Any]:
    """Every field under its dotted name: `{"data.name": "digits", ...}`."""
    fields: dict[str, Any] = flatten_dict(config.to_dict(), sep=".")
    return fields


def override(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """A copy of the config with `--field=value` assignments applied.

    Args:
        config: not changed.
        assignments: fields of nested configs have dotted names; old names work with a warning.

    Raises:
        ConfigError: an unknown field (the message has near matches), or a value of another type.
    """
    changed = copy.deepcopy(config)  # keeps the types of unset fields
    for assignment in assignments:
        name, equals, text = assignment.removeprefix("--").partition("=")
        if not (assignment.startswith("--") and equals):
            raise ConfigError(
                f"`{assignment}` is not an override. Write fields as `--field=value`, for instance "
                "`--epochs=30` or `--data.label_noise=0.2`."
            )
        assign(changed, current(name), text)
    return changed


def assign(config: ConfigDict, name: str, text: str) -> None:
    """Sets one dotted field, under its current or old name, to the value of a text.

    Errors as in `override`.
    """
    *branches, leaf = current(name, warn=False).split(".")
    parent: Any = config
    for branch in branches:
        parent = parent.get(branch) if isinstance(parent, ConfigDict) else None
    free = branches == ["model", "options"]
    if not isinstance(parent, ConfigDict) or (leaf not in parent and not free):
        known = list(flat(config))
        raise ConfigError(
            f"The config has no field `{name}`{near(name, known)} It has {', '.join(known)}."
        )
    kind = parent.get_type(leaf) if leaf in parent else object
    try:
        with parent.unlocked():
            parent[leaf] = value(text, kind)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The field `{name}` has the type `{kind.__name__}`, and `{text}` does not."
        ) from error


def value(text: str, kind: type = object) -> Any:
    """The value of a text: `true`, `false`, `none`, a Python literal, or else the string itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return text if kind is str else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def check(config: ConfigDict) -> None:
    """Checks that integer fields are integers and not too low.

    Raises:
        ConfigError: one is not; the message names the field.
    """
    fields, standard = flat(config), flat(defaults())
    for name, lowest in _LOWEST.items():
        unset = fields[name] is None and standard[name] is None
        if not unset and (type(fields[name]) is not int or fields[name] < lowest):
            raise ConfigError(f"`{name}` is a whole number from {lowest}, and was {fields[name]}.")


def numbers(config: ConfigDict) -> dict[str, float]:
    """The numeric top-level fields, which the optimiser's text may use."""
    return {name: v for name, v in config.items() if type(v) in (int, float)}
