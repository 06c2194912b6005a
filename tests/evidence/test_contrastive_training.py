"""SAM under the contrastive loss beside cross-entropy, on wrong labels.

    python -m pytest tests/evidence/test_contrastive_training.py -m evidence

writes tests/evidence/contrastive.md, a grid of rates and ρ.
"""

import os

import evidence_tables
import jax
import numpy as np
import pytest
from wrong_labels import ended, shown

from curvax.training.config import configs
from curvax.training.experiment import build

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_contrastive_training.py -m evidence"
CONFIG, SEEDS = "digits_contrastive", 3
RADII = ("0.1", "0.3")
LOSSES = {
    "contrastive": ("contrastive, linear probe", ("1e-3", "3e-3", "1e-2")),
    "images": ("cross-entropy", ("1e-3", "3e-3")),
}


def accuracies(task: str, text: str) -> list[float]:
    """In %, over seeds."""
    config = configs.load(CONFIG)
    config.update(devices=1, task=task, optimizer=text)
    experiment = build(config)
    seeded = [experiment.with_seed(seed) for seed in range(SEEDS)]
    return [100 * each.test(ended(each))["accuracy"] for each in seeded]


def test_sam_keeps_the_accuracy_of_a_linear_probe():
    rows, best = [], {}
    for task, (name, rates) in LOSSES.items():
        for rate in rates:
            base = f"adamw(cosine({rate}))"
            texts = [base, *(f"sam_perturb({rho}) | {base}" for rho in RADII)]
            found = [accuracies(task, text) for text in texts]
            rows.append((name, rate, *(shown(each, 1) for each in found)))
            best[task, rate] = float(np.mean(found[0])), max(float(np.mean(f)) for f in found[1:])
    evidence_tables.write(
        "contrastive",
        "SAM under the supervised contrastive loss",
        f"Made by `{COMMAND}` with jax {jax.__version__} on a CPU of {os.cpu_count()} cores: the "
        f"config `{CONFIG}`, 512 training images, 40 % of them wrongly labelled. Accuracy on clean "
        f"test images in %, mean of {SEEDS} seeds ± half of the 95 % interval. The network, "
        "its 100 epochs, the highest rate and ρ = 0.3 were found by runs before these, on held-out "
        "images; an earlier run of five seeds that chose rate and ρ on some fifty held-out images "
        "found no gain by SAM: 66.2 ± 1.7 beside 65.7 ± 2.8, and 83.3 ± 4.4 beside 84.5 ± 3.3 "
        "under cross-entropy. The highest rate was not tried under cross-entropy.",
        ["loss", "rate of AdamW", "AdamW", *(f"SAM, ρ = {rho}" for rho in RADII)],
        rows,
    )
    alone, sam = (max(best["contrastive", r][i] for r in LOSSES["contrastive"][1]) for i in (0, 1))
    assert sam >= alone - 5.0
