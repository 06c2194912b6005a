"""Training labels predicted by an earlier run.

Foret et al., SAM, arXiv:2010.01412, section 3.3: "the model is first trained as usual and then
retrained from scratch on the labels predicted by the initially trained model".
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from curvax import models
from curvax.training import pretrained, tasks
from curvax.training.data import datasets, sources
from curvax.training.data.datasets import Split
from curvax.training.runtime import run_dir
from curvax.training.runtime.errors import ConfigError
from curvax.training.runtime.run_dir import SEED, VARIANT

_SHARED = ("name", "num_train", "label_noise")
"""Fields of `data` that determine the training examples and their labels."""


def predictions(config: ConfigDict, train: Split) -> np.ndarray:
    """The labels int32 [N] that the run of `data.labels` predicts for these images.

    Predicted by its newest checkpoint without augmentation, in chunks of `eval_batch` on one
    device, so that every process and every resumed run gets the same labels. Label noise is drawn
    by the seed, so each seed uses the run of the same seed.

    Args:
        config: of the new run.
        train: its training images.

    Raises:
        ConfigError: there is no such run, it was trained on other data, or its checkpoint cannot
            be read.
    """
    folder = find(config, config.seed)
    first = run_dir.read_config(folder.parent.parent)
    first.data.path = config.data.path  # the same data, which may have moved
    predict = _predictor(first, folder, train)
    chunks = datasets.batches(
        train, min(config.eval_batch, train.size), shuffle=False, epochs=1, drop_remainder=False
    )
    found = [np.asarray(predict(chunk))[chunk["mask"]] for chunk in chunks]
    return np.concatenate(found).astype(np.int32)


def find(config: ConfigDict, seed: int) -> Path:
    """The folder of the run that predicts the labels for a seed; errors as in `predictions`."""
    folder = _folder(Path(config.data.labels).expanduser().resolve(), seed)
    root = folder.parent.parent
    _require_same_data(root, run_dir.read_config(root), config)
    if run_dir.outcome(folder) is None:
        raise ConfigError(
            f"Labels are predicted by a finished run, and {folder} is not finished. Continue it "
            f"first: `curvax resume {root}`."
        )
    return folder


def _predictor(first: ConfigDict, folder: Path, train: Split) -> Any:
    """The compiled map batch ↦ int [B], the top-1 class of a run's newest checkpoint."""
    task = tasks.build(first)
    classes = sources.of(first.data).classes
    model = models.build(first.model.name, classes, **first.model.options)
    taken = jax.eval_shape(task.in_test, train.gather(np.arange(1)))["input"]
    shapes = jax.eval_shape(model.init, jax.random.key(0), taken)
    variables = pretrained.read(folder, model, shapes)

    @jax.jit
    def predict(variables: Any, batch: Any) -> jax.Array:
        logits: Any = model.apply(variables, task.in_test(batch)["input"])
        return jnp.argmax(logits, -1)

    return lambda batch: predict(variables, batch)


def _folder(given: Path, seed: int) -> Path:
    """The folder of a seed, given that of a run with one method, of the method, or of the seed."""
    if not given.is_dir():
        raise ConfigError(
            f"`data.labels` names the run that predicts the labels, and {given} does not exist. "
            "Restore its folder; resuming or inspecting a run trained on its labels needs it too."
        )
    variants = [given] if VARIANT.fullmatch(given.name) else _inside(given, VARIANT)
    if SEED.fullmatch(given.name):
        variants = [given.parent]
    if len(variants) != 1:
        found = ", ".join(variant.name for variant in variants) or "none"
        raise ConfigError(
            f"`data.labels` names a run of one method, and {given} has these: {found}. Give the "
            "folder of one, such as RUN/1-sam_perturb-sgd."
        )
    folder = variants[0] / f"seed{seed}"
    if not folder.is_dir() or (SEED.fullmatch(given.name) and given.name != folder.name):
        raise ConfigError(
            f"Label noise is drawn by the seed, so the labels of seed {seed} are predicted by a "
            f"run of seed {seed}, and {given} is of {_seeds(variants[0], given)}. Train it first, "
            "or give the folder that holds the seeds."
        )
    return folder


def _inside(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _seeds(variant: Path, given: Path) -> str:
    if SEED.fullmatch(given.name):
        return given.name
    return ", ".join(path.name for path in _inside(variant, SEED)) or "none"


def _require_same_data(root: Path, first: ConfigDict, config: ConfigDict) -> None:
    """Refuses a run that was trained on other examples."""
    if run_dir.read_spec(root)["fields"]:
        raise ConfigError(
            f"`data.labels` names a run on the whole training set, and {root} is a sweep, which "
            "holds out a part of it. Train with the settings that it chose."
        )
    fields = {"task": (first.task, config.task)}
    fields |= {f"data.{name}": (first.data[name], config.data[name]) for name in _SHARED}
    for field, (theirs, ours) in fields.items():
        if theirs != ours:
            raise ConfigError(
                f"`data.labels` names a run on the same examples, and `{field}` of {root} is "
                f"`{theirs}` where here it is `{ours}`. Set both to the same value."
            )
