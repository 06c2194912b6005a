"""Scores, the largest eigenvalue and held-out examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from short_runs import CONFIG

import curvax
from curvax.training import run_data, scoring, tasks
from curvax.training.data import labelled_images
from curvax.training.data.datasets import Split
from curvax.training.experiment import build


@pytest.fixture(scope="module")
def experiment():
    return build(CONFIG)


# Data and scores.


def test_held_out_examples_come_from_the_training_set_alone():
    task = tasks.build(CONFIG)
    whole, parted = (run_data.load(CONFIG, task, hold_out) for hold_out in (False, True))
    rows = lambda split: {image.tobytes() for image in split.inputs}
    assert rows(parted.train) | rows(parted.test) == rows(whole.train)
    assert not rows(parted.train) & rows(parted.test)
    assert parted.test.size == 6
    assert isinstance(parted.test, Split)
    right = {i.tobytes(): label for i, label in zip(*labelled_images.load("digits").train)}
    assert all(right[i.tobytes()] == label for i, label in zip(*parted.test))
    assert np.mean(parted.wrong) == pytest.approx(0.25, abs=0.01)


def test_scores_do_not_depend_on_the_batch_size(experiment):
    state, test = experiment.init(), experiment.data.test
    noise = curvax.gaussian_probe(jax.random.key(0), state.params)
    moved = jax.tree.map(lambda p, z: p + 0.3 * z, state.params, noise)
    state = state._replace(params=moved)  # a head of zeros scores every chunk alike
    whole, parts = (
        scoring.average(experiment.scores, state, test, size, experiment.parallelism)
        for size in (test.size, 100)
    )
    assert whole == pytest.approx(parts, rel=1e-6)
    few = experiment.score(state, test.rows(slice(100)))
    assert abs(few["loss"] / whole["loss"] - 1) > 1e-3


def test_largest_eigenvalue_is_that_of_the_dense_hessian():
    key = jax.random.key(0)
    batch = {"input": jax.random.normal(key, (8, 4)), "label": jnp.arange(8) % 3}
    predict = lambda params, batch: jnp.tanh(batch["input"] @ params["w"]) @ params["v"]
    clean = lambda _, batch: curvax.Objective(curvax.categorical("label"), batch, model=predict)
    params = {"w": jax.random.normal(key, (4, 3)), "v": jax.random.normal(key, (3, 3))}
    flat, unravel = ravel_pytree(params)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = lambda x: cross_entropy(predict(unravel(x), batch), batch["label"]).mean()
    eigenvalues = np.linalg.eigvalsh(jax.hessian(loss)(flat))
    found = scoring.make_largest_eigenvalue(clean)(params, {}, batch)
    assert float(found) == pytest.approx(eigenvalues[np.argmax(np.abs(eigenvalues))], rel=3e-2)
