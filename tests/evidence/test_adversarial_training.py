"""Accuracy on clean and on attacked images, of AdamW and SAM with and without adversarial training.

    python -m pytest tests/evidence/test_adversarial_training.py -m evidence

writes tests/evidence/adversarial_digits.md and its like for the other data, one of them with
`-k digits`. Learning rate and ρ are chosen on held-out images, by the mean of clean and attacked
accuracy with one seed.
"""

import itertools
from typing import Any

import evidence_tables
import jax
import numpy as np
import pytest
from wrong_labels import ended, shown

from curvax.training.augment import preprocessing
from curvax.training.config import configs
from curvax.training.evaluation import test_sets, topk
from curvax.training.experiment import Experiment, build

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_adversarial_training.py -m evidence"
SEEDS, RATES, RADII = 5, (1e-3, 2e-3), (0.05, 0.1, 0.2)
DATA: dict[str, tuple[float, dict[str, Any]]] = {
    "digits": (0.1, {}),
    "mnist": (0.1, {"patch": 7}),
    "fashion_mnist": (0.05, {"patch": 7}),
}
"""ε, and options of the Mixer."""
METHODS = {
    "AdamW": ("{base}", (0.0,)),
    "SAM": ("sam_perturb({rho}) | {base}", RADII),
}


def experiment_of(data: str, text: str, attacked: bool, hold_out: bool) -> Experiment:
    epsilon, options = DATA[data]
    config = configs.load("digits_adversarial")
    config.data.name, config.devices, config.optimizer = data, 1, text
    config.model.options.update(options)
    config.attack = f"pgd({epsilon}, steps=1)" if attacked else None
    config.hessian_examples = 0
    return build(config, hold_out=hold_out)


def accuracies(experiment: Experiment, epsilon: float) -> tuple[float, float]:
    """(on test images, on those under PGD-10) after training, in %."""
    state = ended(experiment)
    attack = preprocessing.attack(experiment.config, f"pgd({epsilon}, steps=10)")
    own = test_sets.of_run(experiment)
    few = own._replace(examples=own.examples.rows(slice(2000)))
    of = lambda rank: 100 * topk.evaluate(experiment, state, few, rank).top1
    return of(topk.make_rank(experiment)), of(topk.make_rank(experiment, attack))


@pytest.mark.parametrize("data", DATA)
def test_sam_beside_adamw_with_and_without_attacks(data):
    epsilon, _ = DATA[data]
    rows, robust = [], {}
    for attacked, (method, (text, radii)) in itertools.product((False, True), METHODS.items()):
        texts = {
            (rate, rho): text.format(rho=rho, base=f"adamw(cosine({rate}))")
            for rate, rho in itertools.product(RATES, radii)
        }
        held_out = {
            setting: accuracies(experiment_of(data, own, attacked, True), epsilon)
            for setting, own in texts.items()
        }
        rate, rho = max(held_out, key=lambda setting: sum(held_out[setting]))
        final = experiment_of(data, texts[rate, rho], attacked, False)
        found = [accuracies(final.with_seed(seed), epsilon) for seed in range(SEEDS)]
        clean, under = ([pair[i] for pair in found] for i in (0, 1))
        robust[attacked, method] = np.mean(under)
        training = f"under attack, ε = {epsilon}" if attacked else "on clean images"
        setting = f"α = {rate:g}" + (f", ρ = {rho:g}" if rho else "")
        rows.append((training, method, setting, shown(clean, 1), shown(under, 1)))
    evidence_tables.write(
        f"adversarial_{data}",
        f"Adversarial training with AdamW and with SAM: {data}",
        f"Made by `{COMMAND} -k {data}` with jax {jax.__version__}: the Mixer of two blocks of "
        "`digits_adversarial` on 512 images, 60 epochs, attacked in training by one step from a "
        f"random start. Accuracy in % on at most 2000 test images, clean and under PGD of ten "
        f"steps with ε = {epsilon}, means of {SEEDS} seeds ± half of the 95 % interval. Learning "
        f"rate from {RATES} and ρ from {RADII}, best for the mean of both accuracies on held-out "
        "images, one seed.",
        ["training", "method", "setting", "clean", "under PGD-10"],
        rows,
    )
    assert robust[True, "AdamW"] > robust[False, "AdamW"]
