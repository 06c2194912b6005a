"""Labels that a trained run predicts, in the place of those that it was trained on.

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

_ARM, _SEED = re.compile(r"\d+-.*"), re.compile(r"seed\d+")
_SHARED = ("name", "num_train", "label_noise")
"""Fields of `data` that say which examples a run was trained on, and under which labels."""


class BootstrapError(ValueError):
    """Labels that cannot be had from a run."""


def predictions(config: ConfigDict, train: Split) -> np.ndarray:
    """The labels int32 [N] that the run of `data.labels` gives to these images.

    They are those of its newest checkpoint without augmentation, `eval_batch` images at a time on
    one device, so that every process and every resumed run has the same. Wrong labels are drawn by
    the seed, so each seed takes the run of its own.

    Raises:
        BootstrapError: there is no such run, or it was trained on something else.
        PretrainedError: its checkpoint cannot be read.
    """
    folder = find(config, config.seed)
    first = run_dir.read_config(folder.parent.parent)
    first.data.path = config.data.path  # the same data, which may lie elsewhere by now
    predict = _predictor(first, folder, train)
    chunks = datasets.batches(
        train, min(config.eval_batch, train.size), shuffle=False, epochs=1, drop_remainder=False
    )
    found = [np.asarray(predict(chunk))[chunk["mask"]] for chunk in chunks]
    return np.concatenate(found).astype(np.int32)


def find(config: ConfigDict, seed: int) -> Path:
    """The folder of the run that predicts the labels of a seed; errors as in `predictions`."""
    folder = _folder(Path(config.data.labels).expanduser().resolve(), seed)
    root = folder.parent.parent
    _require_same_data(root, run_dir.read_config(root), config)
    if run_dir.outcome(folder) is None:
        raise BootstrapError(
            f"Labels are predicted by a run that is done, and {folder} is not. Go on with it "
            f"first: `curvax resume {root}`."
        )
    return folder


def _predictor(first: ConfigDict, folder: Path, train: Split) -> Any:
    """The compiled map batch ↦ int [B], the class that a run's newest state puts first."""
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
    """The folder of a seed in that of a run with one method, of an arm, or of the seed itself."""
    if not given.is_dir():
        raise BootstrapError(
            f"`data.labels` names the run that predicts the labels, and {given} does not exist. "
            "Put its folder back, also to resume or to look at what was trained on its labels."
        )
    arms = [given] if _ARM.fullmatch(given.name) else _inside(given, _ARM)
    if _SEED.fullmatch(given.name):
        arms = [given.parent]
    if len(arms) != 1:
        found = ", ".join(arm.name for arm in arms) or "none"
        raise BootstrapError(
            f"`data.labels` names a run of one method, and {given} has these: {found}. Give the "
            "folder of one, such as RUN/1-sam_perturb-sgd."
        )
    folder = arms[0] / f"seed{seed}"
    if not folder.is_dir() or (_SEED.fullmatch(given.name) and given.name != folder.name):
        raise BootstrapError(
            f"Wrong labels are drawn by the seed, so those of seed {seed} are predicted by a run "
            f"of seed {seed}, and {given} is of {_seeds(arms[0], given)}. Train it first, or give "
            "the folder that holds the seeds."
        )
    return folder


def _inside(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _seeds(arm: Path, given: Path) -> str:
    if _SEED.fullmatch(given.name):
        return given.name
    return ", ".join(path.name for path in _inside(arm, _SEED)) or "none"


def _require_same_data(root: Path, first: ConfigDict, config: ConfigDict) -> None:
    """Refuses a run that was not trained on the examples whose labels it is to predict."""
    if run_dir.read_spec(root)["fields"]:
        raise BootstrapError(
            f"`data.labels` names a run on the whole training set, and {root} is a sweep, which "
            "holds a part of it out. Train with the settings that it chose."
        )
    told = {"task": (first.task, config.task)}
    told |= {f"data.{name}": (first.data[name], config.data[name]) for name in _SHARED}
    for field, (theirs, ours) in told.items():
        if theirs != ours:
            raise BootstrapError(
                f"`data.labels` names a run on the same examples, and `{field}` of {root} is "
                f"`{theirs}` where here it is `{ours}`. Set both alike."
            )
