"""SAM under the contrastive loss beside cross-entropy: the accuracy of a linear probe.

    python -m pytest tests/evidence/test_contrastive_training.py -m evidence

writes tests/evidence/contrastive.md. Rates and radii are chosen on held-out images, and the table
says which.
"""

import os

import evidence_tables
import jax
import numpy as np
import pytest
from wrong_labels import shown

from curvax.training.config import configs
from curvax.training.experiment import Experiment, build

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_contrastive_training.py -m evidence"
CONFIG = "digits_contrastive"
NOISE, SEEDS, CHOOSING = 0.4, 5, 2
RATES, RADII = ("1e-3", "3e-3", "1e-2"), ("0.1", "0.2", "0.3")
LOSSES = {"contrastive": "contrastive, linear probe", "images": "cross-entropy"}


def accuracies(task: str, text: str, seeds: int, hold_out: bool) -> list[float]:
    """In %, over seeds."""
    config = configs.load(CONFIG)
    config.update(devices=1, task=task, optimizer=text)
    config.data.label_noise = NOISE
    experiment = build(config, hold_out=hold_out)
    return [100 * accuracy(experiment.with_seed(seed)) for seed in range(seeds)]


def accuracy(experiment: Experiment) -> float:
    state, batches = experiment.init(), experiment.batches()
    for _ in range(experiment.steps):
        state, _ = experiment.step(state, experiment.parallelism.place(next(batches)))
    return experiment.test(state)["accuracy"]


def best(task: str, texts: list[str]) -> str:
    return max(texts, key=lambda text: np.mean(accuracies(task, text, CHOOSING, True)))


def test_sam_improves_the_representation_of_wrong_labels():
    rows, means = [], {}
    for task, name in LOSSES.items():
        base = best(task, [f"adamw(cosine({rate}))" for rate in RATES])
        sam = best(task, [f"sam_perturb({rho}) | {base}" for rho in RADII])
        for text in (base, sam):
            found = accuracies(task, text, SEEDS, False)
            means[task, text == sam] = np.mean(found)
            rows.append((name, f"`{text}`", shown(found, 1)))
    evidence_tables.write(
        "contrastive",
        "SAM under the supervised contrastive loss",
        f"Made by `{COMMAND}` with jax {jax.__version__} on a CPU of {os.cpu_count()} cores: the "
        f"config `{CONFIG}`, 512 training images, {NOISE:.0%} wrong labels. Accuracy on clean test images in %, mean of "
        f"{SEEDS} seeds ± half of the 95 % interval. The rate is the best of {', '.join(RATES)}, "
        f"and ρ the best of {', '.join(RADII)} at that rate, each on a tenth of the training "
        f"images that is held out, over {CHOOSING} seeds.",
        ["loss", "method", "accuracy"],
        rows,
    )
    assert means["contrastive", True] > means["contrastive", False]
