"""Networks that train on wrong labels, SAM's base on each, and runs of a method on them."""

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from curvax.training.config import configs
from curvax.training.experiment import Experiment, build
from curvax.training.step import State


class Task(NamedTuple):
    config: str
    alone: str
    """The base without SAM, at its best rate."""
    base: str
    radii: tuple[float, ...]


TASKS = {
    "mixer": Task("digits", "adamw(cosine(5e-4))", "adamw(cosine(1e-3))", (0.2, 0.3, 0.4)),
    "resnet": Task(
        "digits_resnet",
        "sgd(cosine(3e-3), momentum=0.9)",
        "sgd(cosine(3e-3), momentum=0.9)",
        (0.1, 0.2, 0.3),
    ),
    "vit": Task("digits_vit", "adamw(cosine(3e-4))", "adamw(cosine(2e-3))", (0.3, 0.4, 0.6)),
    "fashion": Task("fashion_mixer", "adamw(cosine(5e-4))", "adamw(cosine(1e-3))", (0.2, 0.3, 0.4)),
}


def experiment_of(task: str, text: str, hold_out: bool, **fields: Any) -> Experiment:
    config = configs.load(TASKS[task].config)
    config.devices, config.optimizer = 1, text
    config.update(fields)
    return build(config, hold_out=hold_out)


def ended(experiment: Experiment, start: State | None = None) -> State:
    """The state at the end of training, from the experiment's own start or from another one."""
    state, batches = start or experiment.init(), experiment.batches()
    for _ in range(experiment.steps):
        state, _ = experiment.step(state, experiment.parallelism.place(next(batches)))
    return state


def trained(experiment: Experiment) -> tuple[float, float]:
    """(accuracy on the test images, λ_max on training images)"""
    found = experiment.final_metrics(ended(experiment))
    return found["test_accuracy"], found["lambda_max"]


def shown(values: list[float], digits: int) -> str:
    """Mean ± half of the 95 % interval by Student's t."""
    student = float(stats.t.ppf(0.975, len(values) - 1))
    half = student * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"
