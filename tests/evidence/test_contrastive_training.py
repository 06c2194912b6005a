"""SAM under the contrastive loss beside cross-entropy: the accuracy of a linear probe.

    python -m pytest tests/evidence/test_contrastive_training.py -m evidence

writes tests/evidence/contrastive.md. Rates and radii are chosen on held-out images, and the table
says which.
"""

import os
from typing import Any

import evidence_tables
import jax
import numpy as np
import pytest
from wrong_labels import shown, trained

from curvax.training.config import configs
from curvax.training.experiment import build

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_contrastive_training.py -m evidence"
CONFIG = "digits_contrastive"
SEEDS, SEEDS_OF_CHOICE = 5, 3
RATES, RADII = ("1e-3", "3e-3", "1e-2"), ("0.1", "0.2", "0.3")
LOSSES = {"contrastive": "contrastive, linear probe", "images": "cross-entropy"}


def scores(task: str, noise: float, text: str, seeds: int, hold_out: bool) -> list[Any]:
    """(accuracy, λ_max) over seeds."""
    config = configs.load(CONFIG)
    config.update(devices=1, task=task, optimizer=text)
    config.data.label_noise = noise
    if hold_out:
        config.hessian_examples = 8  # not read
    experiment = build(config, hold_out=hold_out)
    return [trained(experiment.with_seed(seed)) for seed in range(seeds)]


def best(task: str, noise: float, texts: list[str]) -> str:
    mean = lambda text: np.mean(
        [accuracy for accuracy, _ in scores(task, noise, text, SEEDS_OF_CHOICE, True)]
    )
    return max(texts, key=mean)


def test_sam_improves_the_representation_of_wrong_labels():
    rows, means = [], {}
    for noise in (0.0, 0.4):
        for task, name in LOSSES.items():
            base = best(task, noise, [f"adamw(cosine({rate}))" for rate in RATES])
            sam = best(task, noise, [f"sam_perturb({rho}) | {base}" for rho in RADII])
            for text in (base, sam):
                found = scores(task, noise, text, SEEDS, False)
                means[noise, task, text == sam] = np.mean([score for score, _ in found])
                accuracy = shown([100 * score for score, _ in found], 1)
                rows.append((f"{noise:.0%}", name, f"`{text}`", accuracy))
    evidence_tables.write(
        "contrastive",
        "SAM under the supervised contrastive loss",
        f"Made by `{COMMAND}` with jax {jax.__version__} on a CPU of {os.cpu_count()} cores: the "
        f"config `{CONFIG}`, 512 training images. Accuracy on clean test images in %, mean of "
        f"{SEEDS} seeds ± half of the 95 % interval. The rate is the best of {', '.join(RATES)}, "
        f"and ρ the best of {', '.join(RADII)} at that rate, each on a tenth of the training "
        f"images that is held out, over {SEEDS_OF_CHOICE} seeds.",
        ["wrong labels", "loss", "method", "accuracy"],
        rows,
    )
    assert means[0.4, "contrastive", True] > means[0.4, "contrastive", False]
