"""Scores of small models of text and of images, at equal steps and at equal time.

    OPENBLAS_NUM_THREADS=1 python -m pytest tests/evidence/test_methods_by_the_clock.py -m evidence

writes methods_on_pydoc.md, methods_on_digits.md and methods_on_fashion.md in tests/evidence; one of
them with `-k pydoc`, `-k digits` or `-k fashion`. Learning rates and dampings are chosen on a tenth
of the training set that is held out, with one seed; then every method trains on all of it with
three seeds, for as many steps as Muon, and for as many steps as fit into Muon's time. The steps are
timed before, so only the first minutes need a quiet machine.
"""

import math
import os
import time
from typing import NamedTuple

import evidence_tables
import jax
import numpy as np
import pytest

from curvax.training.config import configs
from curvax.training.experiment import Experiment, build

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = (
    "OPENBLAS_NUM_THREADS=1 python -m pytest tests/evidence/test_methods_by_the_clock.py "
    "-m evidence"
)
SEEDS, WARMUP = 3, 0.1
AXES = "muon_weight_dimension_numbers=matrix_axes(layout)"
RATE = "warmup_cosine_decay_schedule(0.0, {rate}, {warmup}, {steps})"
KFAC = f"{RATE}, damping={{damping}}, momentum=0.9, mean_over=axes"


class Method(NamedTuple):
    text: str
    rates: tuple[float, ...]
    dampings: tuple[float, ...] = (0.0,)


class Task(NamedTuple):
    config: str
    changes: tuple[str, ...]
    text: str
    """What is measured on what, for the table."""
    score: str
    """A score of the test set; smaller is better for `loss`."""
    methods: dict[str, Method]


def methods(rho: float, scale: float) -> dict[str, Method]:
    """Every method with its rates, as multiples of `scale`."""
    by = lambda *rates: tuple(rate * scale for rate in rates)
    return {
        "Muon": Method(f"muon({RATE}, {AXES})", by(2e-2, 3e-2)),
        "AdamW": Method(f"adamw({RATE})", by(1e-2, 2e-2)),
        "AdaHessian": Method(f"adahessian({RATE}, block=layout)", (0.05, 0.15)),
        "Sophia-G": Method(f"sophia_g({RATE})", by(3e-3, 1e-2)),
        "SAM, Muon": Method(f"sam_perturb({rho}) | muon({RATE}, {AXES})", by(1e-2, 3e-2)),
        "SOAP": Method(f"soap({RATE}, 0.9, layout=layout)", by(2e-2, 3e-2)),
        "Shampoo": Method(
            f"shampoo({RATE}, decay=0.95, momentum=0.9, layout=layout)", by(3e-3, 1e-2)
        ),
        "K-FAC": Method(f"kfac(like, {KFAC}, inverses_every=5)", (0.3, 1.0), (0.3,)),
    }


def of_images(rho: float) -> dict[str, Method]:
    """As `methods`, with SAM also around K-FAC."""
    kfac = f"kfac(like, {KFAC})"
    rates, dampings = (0.03, 0.1, 0.3), (0.03, 0.3)
    return methods(rho, scale=0.3) | {
        "K-FAC": Method(kfac, rates, dampings),
        "SAM, K-FAC": Method(f"sam_perturb({rho}) | {kfac}", rates, dampings),
        "SAM, AdamW": Method(f"sam_perturb({rho}) | adamw({RATE})", (1e-3, 3e-3, 6e-3)),
    }


IMAGES = "share of the test images classified correctly by the config's Mixer"
TASKS = {
    "pydoc": Task(
        "pydoc", ("--epochs=4",),
        "the config's byte-level transformer of two scanned layers, test loss in nats a byte",
        "loss", methods(rho=0.05, scale=1.0),
    ),
    "digits": Task(
        "digits", ("--epochs=20", "--data.label_noise=0.0"),
        f"512 digits without wrong labels, {IMAGES}", "accuracy", of_images(rho=0.1),
    ),
    "fashion": Task(
        "fashion_mixer", ("--epochs=5", "--data.num_train=5120", "--data.label_noise=0.0"),
        f"5120 images of Fashion-MNIST without wrong labels, {IMAGES}", "accuracy",
        of_images(rho=0.1),
    ),
}  # fmt: skip


def experiment_of(
    task: str, text: str, steps: int | None, hold_out: bool
) -> tuple[Experiment, int]:
    """The experiment whose schedules end at `steps`, by default after the epochs of the task."""
    config = configs.override(configs.load(TASKS[task].config), TASKS[task].changes)
    config.devices, config.optimizer = 1, "sgd(0.1)"
    per_epoch = build(config, hold_out=hold_out).steps_per_epoch
    steps = steps or per_epoch * config.epochs
    config.epochs = math.ceil(steps / per_epoch)
    config.optimizer = text.format(steps=steps, warmup=max(1, round(WARMUP * steps)))
    return build(config, hold_out=hold_out), steps


def seconds_of(task: str, method: Method) -> float:
    """Of a step, the mean of sixty without the first ten."""
    experiment, _ = experiment_of(task, next(iter(settings(method).values())), None, False)
    state, batches, clock = experiment.init(), experiment.batches(), []
    for _ in range(70):
        batch = experiment.parallelism.place(next(batches))
        began = time.perf_counter()
        state, _ = experiment.step(state, batch)
        jax.block_until_ready(state.params)
        clock.append(time.perf_counter() - began)
    return float(np.mean(clock[10:]))


def train(experiment: Experiment, steps: int, task: str) -> float:
    """The score at the end; NaN if it is not finite."""
    state, batches = experiment.init(), experiment.batches()
    for _ in range(steps):
        state, _ = experiment.step(state, experiment.parallelism.place(next(batches)))
    score = experiment.test(state)[TASKS[task].score]
    return score if math.isfinite(score) else math.nan


def settings(method: Method) -> dict[str, str]:
    """What is tried ↦ the text of the method, with its schedule still open."""
    tried = {}
    for damping in method.dampings:
        for rate in method.rates:
            name = f"{rate:g}" if len(method.dampings) == 1 else f"{rate:g}, λ {damping:g}"
            filled = method.text.replace("{rate}", f"{rate:g}")
            tried[name] = filled.replace("{damping}", f"{damping:g}")
    return tried


def best(sweep: dict[str, float], task: str) -> str:
    sign = 1 if TASKS[task].score == "loss" else -1
    return min(sweep, key=lambda name: math.inf if np.isnan(sweep[name]) else sign * sweep[name])


def seeds(task: str, text: str, steps: int | None) -> list[float]:
    experiment, steps = experiment_of(task, text, steps, hold_out=False)
    return [train(experiment.with_seed(seed), steps, task) for seed in range(SEEDS)]


def shown(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


@pytest.mark.parametrize("task", TASKS)
def test_methods_at_equal_steps_and_at_equal_time(task):
    found: dict[str, list[float]] = {}
    rows: list[tuple[str, ...]] = []
    seconds = {name: seconds_of(task, method) for name, method in TASKS[task].methods.items()}
    _, steps = experiment_of(task, "sgd(0.1)", None, hold_out=False)
    for name, method in TASKS[task].methods.items():
        tried = settings(method)
        sweep = {s: train(*experiment_of(task, t, None, True), task) for s, t in tried.items()}
        setting = best(sweep, task)
        equal = seeds(task, tried[setting], None)
        fitting = min(steps, int(steps * seconds["Muon"] / seconds[name]))
        timed = equal if fitting == steps else seeds(task, tried[setting], fitting)
        found[name] = equal
        text = ", ".join(f"{s}: {score:.3f}" for s, score in sweep.items())
        clock = f"{seconds[name]:.4f}"
        rows.append((name, setting, clock, shown(equal), shown(timed), str(fitting), text))
    write(task, steps, rows)
    assert all(np.isfinite(scores).all() for scores in found.values())


def write(task: str, steps: int, rows: list[tuple[str, ...]]) -> None:
    evidence_tables.write(
        f"methods_on_{task}",
        f"Methods at equal steps and at equal time: {task}",
        f"Made by `{COMMAND} -k {task}` with jax {jax.__version__} on a CPU of {os.cpu_count()} "
        f"cores: {TASKS[task].text}, in {steps} steps. A warm-up of {WARMUP:.0%} of the steps and "
        "a cosine to 0 for every method; the setting is the best of the sweep on held-out training "
        f"data with one seed. Mean ± standard deviation of {SEEDS} seeds; seconds of a step, mean "
        "of sixty without compilation. Equal time is Muon's, with schedules as long as the steps "
        "that fit into it.",
        ["method", "setting", "seconds a step", "equal steps", "equal time", "steps in it",
         "sweep"],
        rows,
    )  # fmt: skip
